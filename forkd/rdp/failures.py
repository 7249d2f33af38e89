"""The errors that a request over datagrams ends with, each an `RdpError`."""

from __future__ import annotations

from forkd.errors import ForkdError


class RdpError(ForkdError):
    """A request that got no answer; the subclasses say why."""


class GaveUp(RdpError):
    """No answer came within the bound.

    Whether the handler ran is not known: the request or the answer may be what was lost.

    Attributes:
        tries: how often the request, or the question where its answer is, was sent since something was last heard.
        seconds: how long the request took altogether.
        unreachable: whether the server's host has said that nothing listens there, which anybody can forge.
    """

    def __init__(self, where: str, tries: int, seconds: float, *, unreachable: bool = False) -> None:
        times = "1 try" if tries == 1 else f"{tries} tries"
        hint = " (its host says that nothing listens there)" if unreachable else ""
        super().__init__(f"no answer from {where} after {times} in {seconds:.1f} s{hint}")
        self.tries = tries
        self.seconds = seconds
        self.unreachable = unreachable


class Failed(RdpError):
    """The handler ran and failed, or gave an answer above the server's limit: its log says more. It runs no more."""


class Busy(RdpError):
    """The server did not take the request: it remembers as much as it may. The handler has not run."""


class TooLarge(RdpError):
    """The request is above the server's limit (its handler has not run), or the answer above the client's."""
