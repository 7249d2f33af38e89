"""Metrics for those who push: statsd's datagrams, every ten seconds, and once more at the daemon's end.

Counters are sent as what was added since they were sent last, which an upgrade hands over; of a histogram its count and
its sum. Labels are parts of the name, as statsd has none: `forkd.NAME.connections_accepted.1:5|c`. Whether they are
taken is not known, and nothing waits for it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

from forkd.config.address import Address
from forkd.master.admin.metrics import GAUGE, HISTOGRAM, Metrics, Sample
from forkd.master.state import DaemonState

#: Seconds from one time to the next.
EVERY = 10.0

#: Bytes of a datagram at most, so that none is cut into fragments.
LARGEST = 1400

_ODD = re.compile(r"[^A-Za-z0-9_-]+")


class StatsdSender:
    """Sends them.

    Args:
        state: the master's.
        metrics: what is sent.
    """

    def __init__(self, state: DaemonState, metrics: Metrics) -> None:
        self._state = state
        self._metrics = metrics
        self._where: Address | None = None
        self._sock: socket.socket | None = None
        self._next = 0.0

    def advance(self, now: float) -> float | None:
        """Sends them when it is time; when it is next, None where they are wanted nowhere."""
        wanted = self._state.generation.settings.statsd
        if wanted != self._where:
            self._open(wanted, now)
        if self._sock is None:
            return None
        if now >= self._next:
            self._next = now + EVERY
            self.push()
        return self._next

    def push(self) -> None:
        """Sends what there is now. What can't be sent is left for the next time."""
        if self._sock is None:
            return
        lines, size = list[tuple[str, bytes, float | None]](), 0
        for line in self._lines():
            if size + len(line[1]) >= LARGEST:
                if not self._send(lines):
                    return
                lines, size = [], 0
            lines.append(line)
            size += len(line[1]) + 1
        self._send(lines)

    def close(self) -> None:
        """Closes the socket in this process."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _open(self, where: Address | None, now: float) -> None:
        self.close()
        self._where, self._next = where, now + EVERY
        if where is None:
            return
        # The host is a number: the name was looked up where the settings were read.
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        try:
            self._sock = socket.socket(family, socket.SOCK_DGRAM)
            self._sock.setblocking(False)
            self._sock.connect((where.host, where.port))
        except OSError:  # no way there, or no IPv6; it is tried again when the settings change
            self.close()
        if not self._state.pushed:  # what was counted before anybody wanted it is no event of now
            self._state.pushed.update({key: value for key, _, value in self._lines() if value is not None})

    def _lines(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Of each value a key, the line, and for a counter what it is then known to be. Labels whose names are the same
        here have keys of their own.
        """
        prefix = f"forkd.{_ODD.sub('_', self._state.generation.settings.name)}"
        for sample in self._metrics.collect():
            name = ".".join(
                [prefix, *(_ODD.sub("_", one) for one in (sample.name.removeprefix("forkd_"), *sample.labels))]
            )
            key, kind = " ".join([sample.name, *sample.labels]), sample.family.kind
            if kind == GAUGE:
                yield key, f"{name}:{sample.value:.10g}|g".encode(), None
                continue
            for part, value in _counted(sample) if kind == HISTOGRAM else (("", sample.value),):
                added = value - self._state.pushed.get(key + part, 0)
                if added > 0 or not self._state.pushed:
                    yield key + part, f"{name}{part}:{added:.10g}|c".encode(), value

    def _send(self, lines: list[tuple[str, bytes, float | None]]) -> bool:
        """Sends some in one datagram; whether they are on their way."""
        if not lines or self._sock is None:
            return True
        try:
            self._sock.send(b"\n".join(line for _, line, _ in lines))
        except ConnectionRefusedError:  # of one before: nobody is there
            return True
        except OSError:
            return False
        self._state.pushed.update({key: value for key, _, value in lines if value is not None})
        return True


def _counted(sample: Sample) -> tuple[tuple[str, float], ...]:
    """What a histogram has counted, by the end of the name."""
    return (".count", sample.buckets[-1][1]), (".sum", sample.value)
