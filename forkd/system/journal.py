"""systemd's journal: records with fields, by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

A record is one datagram of assignments; one that is larger than a datagram may be goes as a sealed memfd. Where
standard error is a stream into the journal, lines with a priority before them are what it understands (sd-daemon(3)).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct

from forkd.errors import ForkdError

_SOCKET = "/run/systemd/journal/socket"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def open_journal() -> int:
    """A descriptor that leads to the journal. Raises ForkdError where there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_SOCKET)
        except OSError as error:
            raise ForkdError(f"can't log to the journal: {_SOCKET}: {error.strerror}") from None
        return sock.detach()


def is_journal_stream(descriptor: int) -> bool:
    """Whether what is written there goes to the journal as lines: systemd says so by device and inode
    (`$JOURNAL_STREAM`, systemd.exec(5)).
    """
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def priority(level: int) -> int:
    """syslog(3)'s priority of a level of logging."""
    for least, number in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return number
    return 7


def encode(fields: dict[str, str]) -> bytes:
    """A record's datagram. Values of several lines are length-prefixed; a value can't forge a field."""
    data = bytearray()
    for name, text in fields.items():
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            data += name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
        else:
            data += name.encode() + b"=" + value + b"\n"
    return bytes(data)


def send(descriptor: int, data: bytes) -> None:
    """Sends a record.

    Args:
        descriptor: by `open_journal`.
        data: by `encode`.

    Raises:
        OSError: the journal does not take it.
    """
    try:
        os.write(descriptor, data)
    except OSError as error:
        if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
            raise
        _send_large(descriptor, data)


def _send_large(descriptor: int, data: bytes) -> None:
    file = os.memfd_create("forkd-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            socket.send_fds(sock, [b""], [file])
    finally:
        os.close(file)
