"""Messages over a connected stream socket that never blocks: between a worker and the master, and on both ends of the
control socket.

What is sent waits here until the socket takes it, up to a bound; what comes is cut into JSON objects, which `messages`
decodes. Descriptors are only taken from a side that may send them. End of file means that the other side is gone, and
is how a worker learns that its master died.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

from forkd.errors import system_reason
from forkd.messages import LARGEST, JsonLines, JsonObject, MalformedLine, Message, encode

_CHUNK = 65536
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_MOST_OPTION = 1024  # bytes that Python's getsockopt takes

#: Descriptors that one message carries at most (SCM_MAX_FD of unix(7)).
MOST_DESCRIPTORS = 253


class ChannelClosed(ConnectionError):
    """The other side is gone, or does not read."""


class MalformedInput(ChannelClosed):
    """The other side sent what is no message."""


def wait_ready(descriptor: Any, events: int, seconds: float | None = None) -> bool:
    """Waits for a descriptor, also for one above 1023, of which select(2) knows nothing.

    Args:
        descriptor: its number, or what has it.
        events: of poll(2); a hang-up and an error always count.
        seconds: to wait at most; None: as long as it takes.

    Returns:
        Whether one of the events is there.
    """
    poller = select.poll()
    poller.register(descriptor, events)
    return bool(poller.poll(None if seconds is None else math.ceil(seconds * 1000)))


class Channel:
    """One end of a connection.

    Args:
        sock: a connected stream socket; the channel owns it and makes it non-blocking.
        takes_descriptors: whether the other side may send descriptors; from one that may not, the kernel drops them.
        largest: bytes of a message that comes at most.

    Attributes:
        takes_descriptors: as the argument.
        descriptors: those that came and were not taken yet, in the order of their messages; the caller that takes one
            out owns it.
    """

    def __init__(self, sock: socket.socket, *, takes_descriptors: bool = False, largest: int = LARGEST) -> None:
        if sock.fileno() >= 0:
            sock.setblocking(False)
        self._sock = sock
        self._decoder = JsonLines(largest)
        self._out = bytearray()
        self.takes_descriptors = takes_descriptors
        self.descriptors: list[int] = []

    @classmethod
    def from_descriptor(cls, descriptor: int) -> Channel:
        """The channel of a socket that an earlier image of this process left open; a closed one for -1."""
        if descriptor < 0:
            sock = socket.socket(socket.AF_UNIX)
            sock.close()
            return cls(sock)
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """The descriptor, -1 after `close`."""
        return self._sock.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits until the socket is writable."""
        return bool(self._out)

    def send(self, message: Message | JsonObject) -> None:
        """Sends, or keeps for `flush`.

        Raises:
            ChannelClosed: the other side is gone, or lets more than `messages.LARGEST` bytes lie.
        """
        if len(self._out) > LARGEST:
            raise ChannelClosed("the other side does not read")
        self._out += encode(message)
        self.flush()

    def send_with_descriptors(self, message: Message | JsonObject, descriptors: Sequence[int]) -> None:
        """Sends a message, and copies of these descriptors with it (SCM_RIGHTS of unix(7)).

        Raises:
            ChannelClosed: the other side is gone, or has not read what was sent before: a descriptor can't wait.
        """
        data = encode(message)
        if self._out:
            raise ChannelClosed("the other side does not read")
        try:
            sent = socket.send_fds(self._sock, [data], list(descriptors))
        except OSError as error:
            raise ChannelClosed(system_reason(error)) from None
        self._out += data[sent:]

    def flush(self) -> None:
        """Sends what waits, as far as the socket takes it.

        Raises:
            ChannelClosed: the other side is gone.
        """
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelClosed(system_reason(error)) from None

    def receive(self) -> list[JsonObject]:
        """The objects that one read completes; empty when there is nothing whole yet.

        Raises:
            ChannelClosed: end of file.
            MalformedInput: the other side sent what is no message.
        """
        try:
            data = self._receive_with_descriptors() if self.takes_descriptors else self._sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed(system_reason(error)) from None
        if not data:
            raise ChannelClosed("end of file")
        try:
            return self._decoder.feed(data)
        except MalformedLine as error:
            raise MalformedInput(str(error)) from None

    def _receive_with_descriptors(self) -> bytes:
        data, descriptors, _, _ = socket.recv_fds(self._sock, _CHUNK, MOST_DESCRIPTORS)
        for descriptor in descriptors:  # recvmsg(2) without MSG_CMSG_CLOEXEC leaves them to programs that are started
            os.set_inheritable(descriptor, False)
        self.descriptors += descriptors
        return data

    def close(self) -> None:
        """Closes the socket, and the descriptors that were not taken. What still waits is lost."""
        self._sock.close()
        while self.descriptors:
            with contextlib.suppress(OSError):
                os.close(self.descriptors.pop())


def channel_pair() -> tuple[Channel, Channel]:
    """Two connected channels, for the two sides of a fork: ours and the child's. Only the child takes descriptors that
    it did not ask for. Raises OSError.
    """
    ours, theirs = socket.socketpair()
    return Channel(ours), Channel(theirs, takes_descriptors=True)


def peer_groups(sock: socket.socket) -> set[int]:
    """The groups of the process that connected a unix socket (SO_PEERGROUPS of linux/socket.h); of one that
    is in more than 256 the primary group alone. Raises OSError.
    """
    size = struct.calcsize("i")
    _, _, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * size))
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_OPTION)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        found = b""
    return {gid, *struct.unpack(f"{len(found) // size}i", found)}


def peer_uid(sock: socket.socket) -> int:
    """The user that connected a unix socket (unix(7), SO_PEERCRED). Raises OSError."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)
