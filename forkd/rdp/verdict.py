"""What both clients do alike: the timers that a caller asked for, and the error that a request ends with."""

from __future__ import annotations

from dataclasses import replace

from forkd.rdp.failures import Busy, Failed, GaveUp, TooLarge
from forkd.rdp.packets import BUSY, FAILED, TOO_LARGE
from forkd.rdp.requester import Ended
from forkd.rdp.timers import Timers

_REASONS = {
    FAILED: (Failed, "{} ran the request, and its handler failed; its log says why"),
    BUSY: (Busy, "{} takes no more requests for now"),
    TOO_LARGE: (TooLarge, "the request to {}, or its answer, is larger than one side takes"),
}


def timers_for(timers: Timers | None, timeout: float | None, retries: int | None) -> Timers:
    """The timers with the first try's time and the number of further tries put in."""
    found = timers or Timers()
    if timeout is not None:
        found = replace(found, ack_timeout=timeout)
    return found if retries is None else replace(found, max_retransmit=retries)


def address_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def answer_of(ended: Ended, where: str, *, unreachable: bool) -> bytes:
    """The answer of a request that has ended.

    Raises:
        RdpError: it has none.
    """
    if ended.answer is not None:
        return ended.answer
    if ended.reason is None:
        raise GaveUp(where, ended.tries, ended.seconds, unreachable=unreachable)
    error, sentence = _REASONS[ended.reason]
    raise error(sentence.format(where))
