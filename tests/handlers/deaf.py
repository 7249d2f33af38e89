"""An echo that does what its client says: it hears no more after `stop`, and after `send N` says so many bytes."""

from __future__ import annotations

import logging

from forkd.builtin import Echo

log = logging.getLogger("deaf")


class Deaf(Echo):
    """The echo."""

    def data_received(self, data: bytes) -> None:
        word, _, rest = data.partition(b" ")
        if word == b"stop":
            self._transport.pause_reading()
        if word == b"send":
            self._transport.write(bytes(int(rest)))
        else:
            super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        log.info("lost it by %s, %s", type(error).__name__, getattr(error, "reason", ""))
        super().connection_lost(error)
