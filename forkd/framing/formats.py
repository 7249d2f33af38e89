"""Framings: how messages are told apart in a stream of bytes. They know no socket and no loop: bytes in, messages out.

The same bytes give the same messages however they are cut, and the same error at a message that is over the limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

#: Bytes of one message at most, where a class says nothing else.
LIMIT = 64 * 1024


class MessageTooLong(ConnectionAbortedError):
    """A message has more bytes than the limit, or has more already: what the connection is aborted with.

    Attributes:
        limit: the limit.
        length: how long the message says it is, behind a length; None for a line, whose end has not come.
    """

    def __init__(self, limit: int, length: int | None = None) -> None:
        said = "" if length is None else f": it says {length}"
        super().__init__(f"a message of more than {limit} bytes{said}")
        self.limit = limit
        self.length = length


class Framing(ABC):
    """Bytes in any portions in, messages out, one at a time. The cost is linear however small the portions are."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Takes what was read."""
        self._buffer += data

    @abstractmethod
    def next_message(self) -> bytes | None:
        """The next whole message; None while there is none.

        Raises:
            MessageTooLong: the next one is over the limit. There is no way on from there.
        """

    @abstractmethod
    def encode(self, message: bytes) -> bytes:
        """The bytes that stand for a message.

        Raises:
            ValueError: the framing can't carry this one.
        """

    def take_unread(self) -> bytes:
        """What is not yet part of a message that was handed out, which is then forgotten here."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def _take(self, start: int, end: int, beyond: int) -> bytes:
        """The bytes from `start` to `end`; all before `beyond` is forgotten."""
        with memoryview(self._buffer) as view:
            message = bytes(view[start:end])
        del self._buffer[:beyond]  # CPython moves the start and copies nothing
        return message


class LineFraming(Framing):
    """Messages that end with a delimiter, which is not part of them.

    Args:
        delimiter: what ends a line.
        limit: bytes of a line at most, without its delimiter.
        strip_cr: whether a carriage return before a line feed is not part of the line either, so that lines may end
            with LF or CRLF. Says nothing where the delimiter is another one.

    Raises:
        ValueError: there is no such framing.
    """

    def __init__(self, delimiter: bytes = b"\n", limit: int = LIMIT, *, strip_cr: bool = True) -> None:
        super().__init__()
        if not delimiter:
            raise ValueError("an empty delimiter ends no line")
        self._delimiter = delimiter
        self._limit = _checked_limit(limit)
        self._strip_cr = strip_cr and delimiter == b"\n"
        # More bytes than these without a delimiter are too long a line, even if its delimiter lacks but one byte.
        self._most = limit + self._strip_cr + len(delimiter) - 1
        self._searched = 0  # no delimiter starts before here

    def next_message(self) -> bytes | None:
        """The next line; see `Framing`."""
        end = self._buffer.find(self._delimiter, self._searched)
        if end < 0:
            if len(self._buffer) > self._most:
                raise MessageTooLong(self._limit)
            self._searched = max(0, len(self._buffer) - len(self._delimiter) + 1)
            return None
        has_cr = self._strip_cr and end > 0 and self._buffer[end - 1] == 0x0D
        length = end - has_cr
        if length > self._limit:
            raise MessageTooLong(self._limit)
        self._searched = 0
        return self._take(0, length, end + len(self._delimiter))

    def encode(self, message: bytes) -> bytes:
        """The line and its delimiter; see `Framing`."""
        _check_length(message, self._limit)
        data = message + self._delimiter
        if data.find(self._delimiter) != len(message):
            raise ValueError(f"the line has the delimiter {self._delimiter!r} in it, and would be read as several")
        if self._strip_cr and message.endswith(b"\r"):
            raise ValueError("the line ends with a carriage return, which would be read as part of the delimiter")
        return data

    def take_unread(self) -> bytes:
        """See `Framing`."""
        self._searched = 0
        return super().take_unread()


class FixedSizeFraming(Framing):
    """Messages that all have the same number of bytes.

    Args:
        size: that number.

    Raises:
        ValueError: there is no such framing.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"messages of {size} bytes: set `size` to 1 or more")
        self._size = size

    def next_message(self) -> bytes | None:
        """The next message; see `Framing`. None is too long."""
        return None if len(self._buffer) < self._size else self._take(0, self._size, self._size)

    def encode(self, message: bytes) -> bytes:
        """The message as it is; see `Framing`."""
        if len(message) != self._size:
            raise ValueError(f"a message of {len(message)} bytes, where each has {self._size}")
        return bytes(message)


class LengthPrefixFraming(Framing):
    """Messages behind their length, an unsigned number that does not count itself.

    Args:
        prefix_size: bytes of that number: 1, 2, 4 or 8.
        byte_order: of that number.
        limit: bytes of a message at most, without the number. A longer one is refused before any of it is kept.

    Raises:
        ValueError: there is no such framing.
    """

    def __init__(self, prefix_size: int = 4, byte_order: Literal["big", "little"] = "big", limit: int = LIMIT) -> None:
        super().__init__()
        if prefix_size not in (1, 2, 4, 8):
            raise ValueError(f"a length of {prefix_size} bytes: it has 1, 2, 4 or 8")
        if byte_order not in ("big", "little"):
            raise ValueError(f"the byte order {byte_order!r} is neither 'big' nor 'little'")
        self._prefix_size = prefix_size
        self._byte_order: Literal["big", "little"] = byte_order
        self._limit = min(_checked_limit(limit), (1 << 8 * prefix_size) - 1)

    def next_message(self) -> bytes | None:
        """The next message; see `Framing`."""
        start = self._prefix_size
        if len(self._buffer) < start:
            return None
        length = int.from_bytes(self._buffer[:start], self._byte_order)
        if length > self._limit:
            raise MessageTooLong(self._limit, length)
        end = start + length
        return None if len(self._buffer) < end else self._take(start, end, end)

    def encode(self, message: bytes) -> bytes:
        """The length and the message; see `Framing`."""
        _check_length(message, self._limit)
        return len(message).to_bytes(self._prefix_size, self._byte_order) + message


def _checked_limit(limit: int) -> int:
    if limit < 0:
        raise ValueError(f"a limit of {limit} bytes")
    return limit


def _check_length(message: bytes, limit: int) -> None:
    if len(message) > limit:
        raise ValueError(f"a message of {len(message)} bytes, where one has at most {limit}")
