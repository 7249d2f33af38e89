"""The C library's functions: looked up once, and their errors raised."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from forkd.system.libc import c_function


def test_c_function_is_looked_up_once_for_the_same_types() -> None:
    assert c_function("close", ctypes.c_int) is c_function("close", ctypes.c_int)
    assert c_function("close", ctypes.c_int) is not c_function("close", ctypes.c_long)


def test_c_function_returns_what_the_function_does() -> None:
    assert c_function("getpid")() == os.getpid()


def test_c_function_raises_the_error_that_the_system_gave() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as raised:
        c_function("close", ctypes.c_int)(-1)
    assert raised.value.errno == errno.EBADF


def test_c_function_that_is_unknown_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        c_function("there_is_none")
