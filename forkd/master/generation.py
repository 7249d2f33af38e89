"""A generation: settings, the sockets bound for them, and the log that goes with them. A reload makes the next one.

`Generation` owns its listeners until another one takes over. It also knows which of them another generation shares, by
which children and the master close the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from forkd.config.settings import Settings
from forkd.errors import ForkdError, system_reason
from forkd.master.certificates import Certificates
from forkd.system.cgroups import processors
from forkd.system.identity import Identity
from forkd.system.listeners import BoundListener, update_listener

log = logging.getLogger("forkd.master")


@dataclass(slots=True)
class Generation:
    """What one generation of workers is made from.

    Attributes:
        number: from 1 on; no two have the same.
        settings: what it serves by.
        bound: the settings' listeners, in their order.
        log: the descriptor that it logs to.
        identity: the user and groups of its workers, by number.
        certificates: those of its listeners, read when it is made.
        services: where the master itself answers, in the order of `settings.services`; no worker has them.
    """

    number: int
    settings: Settings
    bound: list[BoundListener]
    log: int
    identity: Identity = field(default_factory=Identity)
    services: list[BoundListener] = field(default_factory=list)
    certificates: Certificates = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.certificates = Certificates(self.settings.listen)

    def close_all_but(self, kept: Generation) -> None:
        """In a forked child: closes the sockets and the log that another generation does not have."""
        for bound in self.listeners_not_in(kept):
            bound.close()
        if self.log != kept.log:
            os.close(self.log)

    def hand_listeners_to(self, other: Generation) -> None:
        """Closes, for good, the listeners that another generation does not have; the others follow its settings."""
        for bound in (*self.listeners_not_in(other), *_missing(self.services, other.services)):
            bound.stop_receiving()
            bound.remove()
        before = {sock.fileno(): bound.listener for bound in self.bound for sock in bound.sockets}
        for bound in (*other.bound, *other.services):
            try:
                update_listener(bound, before.get(bound.sockets[0].fileno()))
            except (OSError, ForkdError) as error:
                log.warning("listener %s can't follow its new settings: %s", bound.address, system_reason(error))

    def listeners_not_in(self, other: Generation) -> list[BoundListener]:
        """The listeners that another generation does not have."""
        return _missing(self.bound, other.bound)

    def close_services(self) -> None:
        """In a forked child: closes what is the master's alone."""
        for bound in self.services:
            bound.close()


def _missing(ours: Iterable[BoundListener], theirs: Iterable[BoundListener]) -> list[BoundListener]:
    """Those of ours whose sockets none of theirs has."""
    kept = {sock.fileno() for bound in theirs for sock in bound.sockets}
    return [bound for bound in ours if not kept & {sock.fileno() for sock in bound.sockets}]


def wanted_workers(settings: Settings) -> int:
    """The number of workers that the settings mean."""
    return settings.workers or processors()


def wanted_after(before: Settings, wanted: int, after: Settings) -> int:
    """The number of workers after a change of settings: the one asked for since, where they still say the same."""
    return wanted if before.workers == after.workers else wanted_workers(after)
