"""Messages over a connected stream socket that never blocks: a worker's channel to the master, a client of the control
socket, and the command line's end of it.

What is sent waits here until the socket takes it, up to a bound; what comes is decoded by `wire`. End of file means
that the other side is gone, and is how a worker learns that its master died.
"""

from __future__ import annotations

import socket
import struct

from forkd.wire import LARGEST, Decoder, Message, WireError, encode

_CHUNK = 65536


class ChannelClosed(ConnectionError):
    """The other side is gone, or said what is no message."""


class Channel:
    """One end.

    Args:
        sock: a connected stream socket; the channel owns it and makes it non-blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = Decoder()
        self._out = bytearray()

    def fileno(self) -> int:
        """The descriptor, -1 after `close`."""
        return self._sock.fileno()

    @property
    def waiting(self) -> bool:
        """Whether something waits for the socket to be writable."""
        return bool(self._out)

    def send(self, message: Message) -> None:
        """Sends, or keeps for `flush`.

        Raises:
            ChannelClosed: the other side is gone, or lets more than `wire.LARGEST` bytes lie.
        """
        if len(self._out) > LARGEST:
            raise ChannelClosed("the other side does not read")
        self._out += encode(message)
        self.flush()

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
            raise ChannelClosed(str(error)) from None

    def receive(self) -> list[Message]:
        """The messages that one read completes; empty when there is nothing whole yet.

        Raises:
            ChannelClosed: end of file, or the other side said what is no message.
        """
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed(str(error)) from None
        if not data:
            raise ChannelClosed("end of file")
        try:
            return self._decoder.feed(data)
        except WireError as error:
            raise ChannelClosed(str(error)) from None

    def close(self) -> None:
        """Closes the socket. What still waits is lost."""
        self._sock.close()


def channel_pair() -> tuple[Channel, Channel]:
    """Two connected channels, for the two sides of a fork. Raises OSError."""
    ours, theirs = socket.socketpair()
    return Channel(ours), Channel(theirs)


def peer_uid(sock: socket.socket) -> int:
    """The user that connected a unix socket (unix(7), SO_PEERCRED). Raises OSError."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)
