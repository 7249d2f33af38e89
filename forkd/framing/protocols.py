"""Bases of protocols whose messages are framed: `LineProtocol`, `FixedSizeProtocol`, `LengthPrefixProtocol`.

`FramedProtocol` does what is between a transport and messages: pausing, closing and handing over in the middle of what
one read brought, and the end of file. Users' handlers derive from these; forkd itself calls them as any protocol.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from math import inf
from time import monotonic
from typing import ClassVar, Literal

from forkd.framing.formats import LIMIT, FixedSizeFraming, Framing, LengthPrefixFraming, LineFraming, MessageTooLong

#: Seconds for which messages of one connection are delivered at a time; then the others of the loop have their turn.
TURN = 0.0005


class FramedProtocol(asyncio.Protocol, ABC):
    """The base of the three below. Of asyncio's calls it takes `data_received` and `eof_received` for itself; a
    subclass that overrides `connection_made`, `connection_lost`, `pause_writing` or `resume_writing` calls the base's.

    * Messages stop when the transport is closed or aborted, also in the middle of what one read brought.
    * Where a read brings many, the loop turns between them, and meanwhile no more is read: a client that sends much at
      once does not hold up the others.
    * After `pause_reading()` (the protocol's own, not the transport's) what was read already is held back too, and the
      end of file; `resume_reading()` lets them come, soon but never from within that call. Nothing is delivered from
      a client that does not read its answers either, by the same means.
    * Another protocol that takes over (`transport.set_protocol`) finds what this one has not used in `take_unread()`.
      A protocol that begins TLS pauses first, and drops or refuses what a client has sent behind its request for it:
      taken for part of the encrypted stream, it could be an attacker's words (RFC 3207, section 6).

    Attributes:
        transport: the connection, from `connection_made` on.
    """

    transport: asyncio.Transport

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        if cls.__module__ != __name__:  # a mistake in the class is told where it is written
            cls._make_framing()

    @classmethod
    @abstractmethod
    def _make_framing(cls) -> Framing:
        """What tells the messages apart. Raises ValueError for attributes of the class that make no framing."""

    # For subclasses to write

    @abstractmethod
    def message_received(self, message: bytes) -> None:
        """A message has come, whole."""

    def message_too_long(self, error: MessageTooLong) -> None:
        """The next message is over the limit. May say so to the client and close the transport; if it does not close
        it, the connection is aborted with the error, which `connection_lost` is then called with (over TLS with None).
        """

    def unfinished_received(self, rest: bytes) -> None:
        """The client has ended its side in the middle of a message, of which this much has come. Forgotten here."""

    def messages_ended(self) -> bool | None:
        """The client has ended its side, and all that it sent was delivered. When this returns true the connection
        stays open for sending, as with asyncio's `eof_received`; else it is closed when all is sent.
        """

    # For subclasses to call

    def send_message(self, message: bytes) -> None:
        """Sends a message, framed as those that come.

        Raises:
            ValueError: this framing can't carry it: it is too long, or has the delimiter in it.
        """
        self.transport.write(self._framing.encode(message))

    def pause_reading(self) -> None:
        """Neither reads nor delivers from now on."""
        self._delivery_paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Delivers what was held back, then reads again."""
        self._delivery_paused, self._reads_on = False, True
        self._continue_soon()

    def take_unread(self) -> bytes:
        """What was read and is not part of a message that was delivered; it is the caller's from now on."""
        return self._framing.take_unread()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._loop = asyncio.get_running_loop()
        self.transport = transport  # type: ignore[assignment]
        self._framing = self._make_framing()
        self._delivery_paused = False  # by pause_reading, or because another protocol is in charge
        self._writing_paused = False  # by pause_writing
        self._end_is_due = False  # whether an end of file is held back
        self._continues = False  # whether the loop will deliver what was read, before more is
        self._reads_on = False  # whether the transport is to read on when that is done

    def connection_lost(self, error: Exception | None) -> None:
        """Forgets what was held back."""
        self._framing.take_unread()

    def pause_writing(self) -> None:
        """Reads no more from a client that does not read."""
        self._writing_paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Reads from it again."""
        self._writing_paused, self._reads_on = False, True
        self._continue_soon()

    def data_received(self, data: bytes) -> None:
        """Delivers the messages that are whole now."""
        self._framing.feed(data)
        if self._continues:
            self._pause_transport()
        else:
            self._deliver()

    def eof_received(self) -> bool | None:
        """Ends, or keeps the end for when the messages before it may be delivered."""
        if self._continues and self.transport.get_extra_info("ssl_object") is not None:
            self._deliver(inf)  # asyncio's TLS closes after this call, whatever it returns
        elif self._continues:
            self._end_is_due = True
            return True
        if self._delivery_paused or self._writing_paused:
            self._end_is_due = True
            return True
        return self._end()

    def _deliver(self, until: float = 0.0) -> bool:
        """Delivers messages until this time, 0: for a turn from the second one on, since most reads bring one, which
        then needs no clock; whether another protocol has taken over that reading is for.
        """
        transport, framing = self.transport, self._framing
        # On TLS that began on an open connection the transport known here may not be the one that calls yet. So what
        # counts is whether another protocol takes over meanwhile, not which one is in charge.
        in_charge = transport.get_protocol()
        first = not until
        while not (self._delivery_paused or self._writing_paused or transport.is_closing()):
            try:
                message = framing.next_message()
            except MessageTooLong as error:
                self._refuse_message(error)
                return False
            if message is None:
                return False
            if first:
                first = False
            elif not until:
                until = monotonic() + TURN
            self.message_received(message)
            if transport.get_protocol() is not in_charge:
                paused, self._delivery_paused = self._delivery_paused, True
                return not paused
            if until and monotonic() > until:
                self._pause_transport()
                self._continue_soon()
                break
        return False

    def _pause_transport(self) -> None:
        if self.transport.is_reading():  # else the handler has paused it, or this protocol
            self.transport.pause_reading()
            self._reads_on = True

    def _refuse_message(self, error: MessageTooLong) -> None:
        self._framing.take_unread()
        self.message_too_long(error)
        if not self.transport.is_closing():
            _abort_with(self.transport, error)

    def _end(self) -> bool | None:
        if rest := self._framing.take_unread():
            self.unfinished_received(rest)
        return self.messages_ended()

    def _read_on(self) -> None:
        if self._reads_on:
            self._reads_on = False
            self.transport.resume_reading()

    def _continue_soon(self) -> None:
        if not self._continues:
            self._continues = True
            self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        """Delivers what was held back; reads again when nothing is."""
        self._continues = False
        if self.transport.is_closing():
            return
        try:
            if self._deliver(monotonic() + TURN):
                self._read_on()
            if self._delivery_paused or self._writing_paused or self._continues or self.transport.is_closing():
                return
            if not self._end_is_due:
                self._read_on()
            elif not self._end():
                self.transport.close()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border, where no transport calls)
            message = "Fatal error: protocol.message_received() call failed."
            context = {"message": message, "exception": error, "transport": self.transport, "protocol": self}
            self._loop.call_exception_handler(context)
            _abort_with(self.transport, error)


def _abort_with(transport: asyncio.Transport, error: BaseException) -> None:
    """Aborts, so that `connection_lost` is called with the error. asyncio's transports, uvloop's and forkd's all have a
    method for that, though not a public one. With another kind of transport it is called with None, and so it is over
    TLS, whose method fails in Python 3.11.
    """
    force_close = getattr(transport, "_force_close", None)
    if force_close is None or transport.get_extra_info("ssl_object") is not None:
        transport.abort()
    else:
        force_close(error)


class LineProtocol(FramedProtocol):
    """Messages are lines, delivered without what ends them.

    Attributes:
        delimiter: what ends a line.
        limit: bytes of a line at most, without what ends it.
        strip_cr: whether a carriage return before a line feed belongs to it, so that clients may send LF or CRLF.
    """

    delimiter: ClassVar[bytes] = b"\n"
    limit: ClassVar[int] = LIMIT
    strip_cr: ClassVar[bool] = True

    @classmethod
    def _make_framing(cls) -> Framing:
        return LineFraming(cls.delimiter, cls.limit, strip_cr=cls.strip_cr)


class FixedSizeProtocol(FramedProtocol):
    """Messages all have the same size.

    Attributes:
        size: bytes of each; every subclass says how many.
    """

    size: ClassVar[int] = 0

    @classmethod
    def _make_framing(cls) -> Framing:
        return FixedSizeFraming(cls.size)


class LengthPrefixProtocol(FramedProtocol):
    """Messages stand behind their length, an unsigned number that does not count itself.

    Attributes:
        prefix_size: bytes of that number: 1, 2, 4 or 8.
        byte_order: of that number, "big" (the network's) or "little".
        limit: bytes of a message at most, without the number.
    """

    prefix_size: ClassVar[int] = 4
    byte_order: ClassVar[Literal["big", "little"]] = "big"
    limit: ClassVar[int] = LIMIT

    @classmethod
    def _make_framing(cls) -> Framing:
        return LengthPrefixFraming(cls.prefix_size, cls.byte_order, cls.limit)
