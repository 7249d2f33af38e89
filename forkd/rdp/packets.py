"""The packets on the wire, as docs/rdp.md has them: numbers in network byte order, a fixed size for each kind but for
payloads.

`decode` refuses all that is not exactly one well-formed packet with `BadPacket`, and raises nothing else; what it
returns is consistent in itself (a part's number and size fit the length announced). The state machines call both.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

#: The first byte of every packet: a mark, and the version 1.
MARK = 0xF1
REQUEST, RECEIVED, ANSWER, TAKEN, REFUSED = range(1, 6)
#: Why a request is refused.
FAILED, BUSY, TOO_LARGE = range(1, 4)

#: Bytes of payload in every part but the last. With the headers below and IPv6's and UDP's a part is 1,274 bytes: the
#: least that every IPv6 path carries whole is 1,280 (RFC 8200, section 5).
PART = 1200
#: Parts that one acknowledgement can name beyond the first that is missing.
AHEAD = 64

_DATA = struct.Struct("!BBQQII")  # mark, kind, message id, token, length of the whole, number of the part
_STATE = struct.Struct("!BBQQIQB")  # mark, kind, message id, token, first missing part, those after it, flags
_REFUSAL = struct.Struct("!BBQB")  # mark, kind, message id, reason
DATA_HEADER = _DATA.size
LARGEST_PACKET = DATA_HEADER + PART
_PROVE = 1


class BadPacket(ValueError):
    """Bytes that are no packet of this format."""


class Data(NamedTuple):
    """A part of a request (kind REQUEST) or of an answer (ANSWER)."""

    kind: int
    id: int
    token: int
    length: int
    part: int
    payload: bytes


class ExchangeState(NamedTuple):
    """What of the request has arrived (kind RECEIVED), or of the answer (TAKEN).

    All parts below `first_missing` are there, and part `first_missing + 1 + n` where bit n of `ahead` is set. `prove`
    asks a client to send the token back.
    """

    kind: int
    id: int
    token: int
    first_missing: int
    ahead: int
    prove: bool = False


class Refusal(NamedTuple):
    """The request gets no answer."""

    id: int
    reason: int


def parts_of(length: int) -> int:
    """How many parts a payload of `length` bytes has; an empty one has one."""
    return max(1, -(-length // PART))


def encode(packet: Data | ExchangeState | Refusal) -> bytes:
    """The datagram for a packet."""
    if isinstance(packet, Data):
        kind, message, token, length, part, payload = packet
        return _DATA.pack(MARK, kind, message, token, length, part) + payload
    if isinstance(packet, ExchangeState):
        return _STATE.pack(MARK, *packet)
    return _REFUSAL.pack(MARK, REFUSED, *packet)


def decode(data: bytes) -> Data | ExchangeState | Refusal:
    """The packet in a datagram.

    Raises:
        BadPacket: there is none.
    """
    if len(data) < 2 or data[0] != MARK:
        raise BadPacket("it does not begin with the mark of version 1")
    kind = data[1]
    try:
        if kind in {REQUEST, ANSWER}:
            return _data(data)
        if kind in {RECEIVED, TAKEN}:
            return _state(data)
        if kind == REFUSED:
            _, _, message, reason = _REFUSAL.unpack(data)
            if not FAILED <= reason <= TOO_LARGE:
                raise BadPacket(f"reason {reason} is not known")
            return Refusal(message, reason)
    except struct.error as error:
        raise BadPacket(f"kind {kind} has another size") from error
    raise BadPacket(f"kind {kind} is not known")


def _data(data: bytes) -> Data:
    _, kind, message, token, length, part = _DATA.unpack_from(data)
    last = parts_of(length) - 1
    if part > last or len(data) - DATA_HEADER != (PART if part < last else length - last * PART):
        raise BadPacket(f"part {part} of {length} bytes has another size")
    return Data(kind, message, token, length, part, data[DATA_HEADER:])


def _state(data: bytes) -> ExchangeState:
    _, kind, message, token, first_missing, ahead, flags = _STATE.unpack(data)
    if flags & ~_PROVE:
        raise BadPacket(f"flags {flags:#x} are not known")
    return ExchangeState(kind, message, token, first_missing, ahead, bool(flags))
