"""Messages between processes: one JSON object a line.

Used on the control socket and on each worker's channel, so there is one decoder to trust. It takes any chunking, and
refuses what is too long, what is not JSON and what is not an object: the sender may be a stranger or a broken worker.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

#: Bytes of one message at most. A traceback or the state of a thousand workers fits; a flood does not.
LARGEST = 1 << 20


#: The environment variable by which one image of the master names its state's descriptor to the next; with `check:`
#: before the number, that is to try whether it could go on, and tell.
RESUME = "FORKD_RESUME"


class WireError(ValueError):
    """What came is no message; the connection that it came on is of no more use."""


def encode(message: Message) -> bytes:
    """The bytes of a message, with its line feed. JSON escapes those inside it."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Decoder:
    """Bytes in any portions in, messages out."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes.

        Raises:
            WireError: a line is over `LARGEST` bytes, or is no JSON object.
        """
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        if len(rest) > LARGEST:
            raise WireError(f"a message of more than {LARGEST} bytes")
        self._rest = rest
        return [self._parse(line) for line in lines]

    @staticmethod
    def _parse(line: bytearray) -> Message:
        if len(line) > LARGEST:
            raise WireError(f"a message of more than {LARGEST} bytes")
        try:
            message = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise WireError(f"not JSON: {error}") from None
        if not isinstance(message, dict):
            raise WireError("not a JSON object")
        return message
