"""A generation: settings, the sockets bound for them, and the log that goes with them. A reload makes the next one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from forkd.config.options import Settings
from forkd.errors import ForkdError
from forkd.system.bound import BoundListener
from forkd.system.identity import Identity
from forkd.system.process import processors
from forkd.system.sockets import update_listener

log = logging.getLogger("forkd.master")


@dataclass(slots=True)
class Generation:
    """What one generation of workers is made from.

    Attributes:
        number: from 1 on; no two have the same.
        settings: what it serves by.
        bound: the settings' listeners, in their order.
        log: the descriptor that it logs to.
        identity: who its workers are, by number.
    """

    number: int
    settings: Settings
    bound: list[BoundListener]
    log: int
    identity: Identity = field(default_factory=Identity)

    def close_all_but(self, kept: Generation) -> None:
        """Closes, in a forked child, the sockets and the log that another generation does not have."""
        for bound in self.lacking(kept):
            bound.close()
        if self.log != kept.log:
            os.close(self.log)

    def give_way(self, other: Generation) -> None:
        """Closes the listeners that another generation does not have, for good; those that stay follow its settings."""
        for bound in self.lacking(other):
            bound.fall_silent()
            bound.remove()
        before = {sock.fileno(): bound.listener for bound in self.bound for sock in bound.sockets}
        for bound in other.bound:
            try:
                update_listener(bound, before.get(bound.sockets[0].fileno()))
            except (OSError, ForkdError) as error:
                log.warning("%s can't follow its new settings: %s", bound.address, error)

    def lacking(self, other: Generation) -> list[BoundListener]:
        """The listeners that another generation does not have."""
        theirs = {sock.fileno() for bound in other.bound for sock in bound.sockets}
        return [bound for bound in self.bound if not theirs & {sock.fileno() for sock in bound.sockets}]


def wanted_workers(settings: Settings) -> int:
    """The number of workers that the settings mean."""
    return settings.workers or processors()


def wanted_after(before: Settings, wanted: int, after: Settings) -> int:
    """The number of workers after a change of settings: the one asked for since, where they still say the same."""
    return wanted if before.workers == after.workers else wanted_workers(after)
