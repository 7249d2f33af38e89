"""The errors that a request over datagrams ends with, each an `RdpError`, and `answer_of`, which raises them.

Both clients call `answer_of` with what their `Requester` says of a request that has ended.
"""

from __future__ import annotations

from forkd.errors import ForkdError
from forkd.rdp.packets import BUSY, FAILED, TOO_LARGE
from forkd.rdp.requester import RequestEnded


class RdpError(ForkdError):
    """A request that got no answer; the subclasses say why."""


class GaveUp(RdpError):
    """No answer came within the bound.

    Whether the handler ran is not known: the request or the answer may be what was lost.

    Attributes:
        tries: how often the request, or the question where its answer is, was sent since something was last heard.
        seconds: how long the request took altogether.
        unreachable: whether the server's host has said that nothing listens there, which any host can forge.
    """

    def __init__(self, where: str, tries: int, seconds: float, *, unreachable: bool = False) -> None:
        times = "1 try" if tries == 1 else f"{tries} tries"
        hint = " (its host says that nothing listens there)" if unreachable else ""
        super().__init__(f"no answer from {where} after {times} in {seconds:.1f} s{hint}")
        self.tries = tries
        self.seconds = seconds
        self.unreachable = unreachable


class Failed(RdpError):
    """The handler ran and failed, or its answer is above the server's limit; the log says why. It is not run again."""


class Busy(RdpError):
    """The server did not take the request: it remembers as much as it may. The handler has not run."""


class TooLarge(RdpError):
    """The request is above the server's limit (its handler has not run), or the answer above the client's."""


_REASONS = {
    FAILED: (Failed, "{} ran the request, and its handler failed; its log says why"),
    BUSY: (Busy, "{} takes no more requests for now"),
    TOO_LARGE: (TooLarge, "the request to {}, or its answer, is larger than one side takes"),
}


def address_text(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def answer_of(ended: RequestEnded, where: str, *, unreachable: bool) -> bytes:
    """The answer of a request that has ended.

    Args:
        ended: the request.
        where: the server, as `address_text` has it.
        unreachable: as of `GaveUp`.

    Raises:
        RdpError: there is no answer.
    """
    if ended.answer is not None:
        return ended.answer
    if ended.reason is None:
        raise GaveUp(where, ended.tries, ended.seconds, unreachable=unreachable)
    error, sentence = _REASONS[ended.reason]
    raise error(sentence.format(where))
