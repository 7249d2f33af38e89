"""Handlers by the framing bases, hosted by a real daemon."""

from __future__ import annotations

import socket

from tests.support.clients import at_end, read
from tests.support.daemon import Harness


def test_several_lines_in_one_read_and_one_over_many(harness: Harness) -> None:
    daemon = harness.daemon(target="framed:Lines", workers=1).start()
    client = harness.connect(daemon)
    client.sendall(b"abc\n\ndef\r\n")
    assert read(client, 9) == b"cba\n\nfed\n"
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in b"0123456789" * 10 + b"\n":
        client.sendall(bytes([byte]))
    assert read(client, 101) == b"9876543210" * 10 + b"\n"
    client.sendall(b"last\nunfinished")
    client.shutdown(socket.SHUT_WR)
    assert read(client, 100) == b"tsal\n"
    daemon.wait_log("unfinished: 10 bytes")


def test_line_that_is_too_long_ends_the_connection(harness: Harness) -> None:
    daemon = harness.daemon(target="framed:Lines", workers=1).start()
    client = harness.connect(daemon)
    client.sendall(b"x" * 1002)
    assert read(client, 100) == b"at most 1000 bytes\n"
    other = harness.connect(daemon)
    other.sendall(b"x" * 1000 + b"\n")
    assert read(other, 1001) == b"x" * 1000 + b"\n"


def test_messages_behind_their_length(harness: Harness) -> None:
    daemon = harness.daemon(target="framed:Prefixed", workers=1).start()
    client = harness.connect(daemon)
    large = bytes(range(200)) * 200
    client.sendall(b"\3\0abc\0\0" + len(large).to_bytes(2, "little") + large)
    assert read(client, 5 + 2 + 2 + len(large)) == b"\3\0cba\0\0" + len(large).to_bytes(2, "little") + large[::-1]
    client.sendall(b"\xff\xff")
    assert at_end(client)
    daemon.wait_log("lost by MessageTooLong")
    assert daemon.status()["workers"][0]["errors"] == 0


def test_messages_of_one_size(harness: Harness) -> None:
    daemon = harness.daemon(target="framed:Fixed", workers=1).start()
    client = harness.connect(daemon)
    client.sendall(b"abcdefgh")
    assert read(client, 5) == b"edcba"
    client.sendall(b"ij")
    assert read(client, 5) == b"jihgf"
