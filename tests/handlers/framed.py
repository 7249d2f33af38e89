"""Handlers by the bases of `forkd.framing`: each answers a message with what is known of it, in the same framing."""

from __future__ import annotations

import logging

from forkd.framing import FixedSizeProtocol, LengthPrefixProtocol, LineProtocol, MessageTooLong

log = logging.getLogger("framed")


class Lines(LineProtocol):
    """Sends each line back reversed; says goodbye to a line that is too long, and logs one that is not finished."""

    limit = 1000

    def message_received(self, message: bytes) -> None:
        self.send_message(message[::-1])

    def message_too_long(self, error: MessageTooLong) -> None:
        self.send_message(b"at most %d bytes" % error.limit)
        self.transport.close()

    def unfinished_received(self, rest: bytes) -> None:
        log.info("unfinished: %d bytes", len(rest))


class Prefixed(LengthPrefixProtocol):
    """Sends each message back reversed; a message that is too long ends the connection, and the log says why."""

    prefix_size = 2
    byte_order = "little"
    limit = 40_000

    def message_received(self, message: bytes) -> None:
        self.send_message(message[::-1])

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        log.info("lost by %r", error)


class Fixed(FixedSizeProtocol):
    """Sends each message of five bytes back reversed."""

    size = 5

    def message_received(self, message: bytes) -> None:
        self.send_message(message[::-1])
