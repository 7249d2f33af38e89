"""The C library: what it has and Python has no name for. What fails raises OSError, as everywhere else."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def prctl(option: int, argument: int = 0, second: int = 0) -> int:
    """As prctl(2), where there is one; elsewhere 0. Raises OSError."""
    if sys.platform != "linux":
        return 0
    return c_function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)(option, argument, second, 0, 0)


@cache
def c_function(name: str, *arguments: type[Any], result: type[Any] = ctypes.c_int) -> Callable[..., int]:
    """A function of the C library that says by a negative number that it has failed.

    Each is looked up once. What `ctypes` makes for a look-up is a class, which holds itself and goes with a full
    collection alone: those of the master, which are rare, would let it grow with each worker that it starts.

    Args:
        name: its name.
        arguments: the types of its arguments.
        result: a signed type that its result fits into.

    Returns:
        A function that raises OSError where it fails.

    Raises:
        AttributeError: the system has no such function.
    """
    function = _library()[name]  # by its name: as an attribute it would be shared with who wants other types
    function.argtypes, function.restype, function.errcheck = arguments, result, _check  # type: ignore[assignment]
    called: Callable[..., int] = function
    return called


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, _: object, arguments: object) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
