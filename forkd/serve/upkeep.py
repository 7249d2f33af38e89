"""The upkeep of a connection: its deadlines and its heartbeat, the ends that forkd brings about, and the record of its
end.

None of it is on the path of a request. Of a TCP connection the kernel is asked when data came and went; of a unix
socket it does not know, so there the calls that read and write note it, where there is a deadline that asks.
"""

from __future__ import annotations

import logging
from math import inf
from time import monotonic
from typing import Any

from forkd.ended import Ended, WriteBufferFull
from forkd.serve.deadlines import LOOKS, Sighting, explained, sighting_of
from forkd.serve.loop import OUT
from forkd.serve.networks import shown
from forkd.serve.receiving import ReceivingHalf
from forkd.serve.sending import is_vanished
from forkd.system.logs import ACCESS
from forkd.system.tcp_info import read_tcp_info
from forkd.system.unsent import outgoing

log = logging.getLogger("forkd.transport")
access = logging.getLogger(ACCESS)


class Upkeep(ReceivingHalf):
    """What a transport needs for it. Its subclass fills these fields, all in one go."""

    __slots__ = ("_asked", "_opened", "_queue")

    _opened: float  # when it was accepted
    _queue: int  # what lay in the kernel's queue at the last look
    _asked: float  # when the protocol's heartbeat() was last called; 0: never

    def end(self, error: Ended) -> None:
        """Ends the connection at once, of forkd's own accord: the log says why, and it is counted."""
        if self._conn_lost:
            return
        # Of a handler that wrote too much its author should hear; of the rest an operator who wants to.
        level = logging.WARNING if isinstance(error, WriteBufferFull) else logging.INFO
        log.log(level, "closed %s (%s): %s", self._name(), error.reason, error, extra=self.about())
        self._keeper.cut(error)
        self._force_close(error)

    def __lt__(self, other: object) -> bool:
        """As `deadlines.Watched`."""
        return id(self) < id(other)

    def look(self, now: float) -> float:
        """As `deadlines.Watched`."""
        patience = self._keeper.patience
        if self._conn_lost or patience is None:
            return 0.0
        seen = self._see(now)
        if self._closing or self._kept_open is not None:  # nobody waits for a word of it any more
            seen, ask = seen._replace(spoke=True, asked=0.0), inf
        elif now >= (ask := patience.heartbeat(seen)):
            self._ask(now)
            seen, ask = seen._replace(asked=self._asked), now + patience.beat
            if self._conn_lost:
                return 0.0
        when, kind = patience.end(seen)
        if now >= when:
            self.end(explained(kind, seen, now))
            return 0.0
        again = min(when, ask, now + patience.write / LOOKS) if seen.stuck and patience.write else min(when, ask)
        return 0.0 if again == inf else again

    def _see(self, now: float) -> Sighting:
        stuck = self._stall(now) if self._interest & OUT else 0.0
        if self._stamps is not None:
            stamps = self._stamps
            # Of what the handler does not read yet nobody knows since when it is there.
            heard = now if self._paused and not self._nothing_unread() else stamps.heard
            return Sighting(self._opened, stamps.bytes_in > 0, heard, stamps.told, stuck, self._asked)
        info = read_tcp_info(self._sock)
        if info is None:  # it has gone in this moment, as the next event will tell
            return Sighting(self._opened, True, now, now, stuck, self._asked)
        return sighting_of(info, self._opened, now, stuck, self._asked)

    def _stall(self, now: float) -> float:
        """Since when the client has taken nothing. The socket says that it is writable only when much has been taken,
        so what is looked at is whether the queue has changed since the last look.
        """
        try:
            queue = outgoing(self._sock)
        except OSError:  # as in `_see`
            return now
        if queue != self._queue:
            self._queue, self._stuck = queue, now
        return self._stuck

    def _ask(self, now: float) -> None:
        """Calls the protocol's `heartbeat()`; where it has none, nobody is asked and nothing is missed. The next one in
        charge may have one.
        """
        heartbeat = getattr(self._inner_protocol(), "heartbeat", None)
        if not callable(heartbeat):
            return
        self._asked = now
        try:
            self._context.run(heartbeat)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self._handler_failed(error, "protocol.heartbeat() call failed.")

    def _inner_protocol(self) -> Any:
        """The handler's protocol, also of a connection that has gone over to TLS (loop.start_tls). Until the handshake
        is done that one is not connected, and asyncio's is in charge.
        """
        protocol: Any = self._protocol
        inner, told = (getattr(protocol, name, None) for name in ("_app_protocol", "_get_extra_info"))
        return protocol if inner is None or told is None or told("ssl_object") is None else inner

    def _record(self, error: BaseException | None) -> None:
        """Writes the access log's record of a connection that ends by this error."""
        keeper, stamps = self._keeper, self._stamps
        info = read_tcp_info(self._sock) if stamps is None else None
        seconds = monotonic() - self._opened
        fields: dict[str, Any] = {"client": shown(self._peer), "listener": keeper.listener}
        fields |= {"seconds": round(seconds, 6), "reason": self._reason(error)}
        if info is not None:
            fields |= {"bytes_in": info.received, "bytes_out": info.sent, "rtt": info.rtt / 1e6}
        elif stamps is not None:
            fields |= {"bytes_in": stamps.bytes_in, "bytes_out": stamps.bytes_out}
        words = (
            "%(client)s on %(listener)s: %(seconds).3f s, in %(bytes_in)s, out %(bytes_out)s, rtt %(rtt)s, %(reason)s"
        )
        told = {"bytes_in": "-", "bytes_out": "-", "rtt": "-"} | fields
        if info is not None:
            told["rtt"] = f"{info.rtt / 1000:.3f} ms"
        access.info(words, told, extra=fields)

    def _reason(self, error: BaseException | None) -> str:
        if isinstance(error, Ended):
            return error.reason
        if error is None:
            return "closed" if self._kept_open is None else "eof"
        if is_vanished(error):
            return "vanished"
        return "reset" if isinstance(error, ConnectionError) else "error"
