"""Messages out of a stream of bytes: bases for protocols whose messages are lines, of one size, or behind their length.

    class Shouter(LineProtocol):
        def message_received(self, message):
            self.send_message(message.upper())

A read may bring part of a message or a hundred of them: `message_received` is called once for each, whole, in order.
The bases are plain asyncio protocols, for forkd and for any other loop. Each is a thin layer over a framing object
(`LineFraming`, `FixedSizeFraming`, `LengthPrefixFraming`), which knows no socket and no loop and can be used alone.

In reading order:

* `formats`: the framings.
* `protocols`: the bases for protocols.
"""

from forkd.framing.formats import (
    LIMIT,
    FixedSizeFraming,
    Framing,
    LengthPrefixFraming,
    LineFraming,
    MessageTooLong,
)
from forkd.framing.protocols import FixedSizeProtocol, FramedProtocol, LengthPrefixProtocol, LineProtocol

__all__ = [
    "LIMIT",
    "FixedSizeFraming",
    "FixedSizeProtocol",
    "FramedProtocol",
    "Framing",
    "LengthPrefixFraming",
    "LengthPrefixProtocol",
    "LineFraming",
    "LineProtocol",
    "MessageTooLong",
]
