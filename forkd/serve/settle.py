"""From a fork of the master to a worker: whom it becomes, and whether it can then import what handlers need."""

from __future__ import annotations

from forkd.config.options import Settings
from forkd.serve.handlers.reach import check_reach
from forkd.system.identity import Identity
from forkd.system.privileges import drop_privileges


def settle(settings: Settings, identity: Identity) -> None:
    """Makes this process a worker's, for good, before any handler is imported.

    Args:
        settings: what the worker may.
        identity: whom it becomes.

    Raises:
        PrivilegeError: it can't become that, or not all of it.
        HandlerError: it can't read what every handler needs.
    """
    # Of forkd itself all has been imported by now but this, which may serve as a handler.
    import forkd.builtin  # noqa: F401, PLC0415

    drop_privileges(settings, identity)
    check_reach(settings)
