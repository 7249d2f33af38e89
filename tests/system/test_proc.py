"""What /proc tells of descriptors and unix sockets, also while they come and go, and by odd names."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from forkd.system.proc import descriptors_of, unix_sockets


def test_descriptors_that_come_and_go_are_passed_over() -> None:
    over = threading.Event()

    def open_and_close() -> None:
        while not over.is_set():
            for one in [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]:
                os.close(one)

    thread = threading.Thread(target=open_and_close)
    thread.start()
    try:
        links = [descriptors_of(os.getpid()) for _ in range(300)]
    finally:
        over.set()
        thread.join()
    assert min(map(len, links)) > 2


@pytest.mark.parametrize("name", [b"plain", b"a name", b"end ", b"\xff\xfe", b"\x0c \x85", "\u2028".encode(), b"a\rb"])
def test_sockets_of_any_name_are_told(name: bytes) -> None:
    wanted = f"@{os.getpid()} ".encode() + name
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(b"\0" + wanted[1:])
        found = [(inode, listens) for inode, told, listens in unix_sockets(os.getpid()) if os.fsencode(told) == wanted]
        assert found == [(str(os.fstat(sock.fileno()).st_ino), False)]
        sock.listen()
        assert [listens for _, told, listens in unix_sockets(os.getpid()) if os.fsencode(told) == wanted] == [True]
