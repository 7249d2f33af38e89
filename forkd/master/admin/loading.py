"""Imports what the admin endpoint needs and other daemons do without: h11 and prometheus_client, of the extra `admin`.

It is done by whatever checks settings or prepares a start, a reload or an upgrade, so that a missing package is told
before anything has changed; and in the master, before its loop would have to.
"""

from __future__ import annotations

import gc
import importlib
import sys

from forkd.config.settings import Settings
from forkd.errors import ForkdError, how_to_install

_NEEDED = ("forkd.master.admin.http", "forkd.master.admin.exposition")


def load_extras(settings: Settings) -> None:
    """Imports what these settings need. Raises ForkdError, with what to install, where that is not there."""
    if not settings.admin.address or all(name in sys.modules for name in _NEEDED):
        return
    importlib.invalidate_caches()  # it may have been installed since this process began
    try:
        import forkd.master.admin.exposition  # noqa: PLC0415
        import forkd.master.admin.http  # noqa: F401, PLC0415
    except ImportError as error:
        raise ForkdError(
            f"admin: needs h11 and prometheus_client, and {error.name or 'a part of them'} can't be imported; "
            f"{how_to_install('admin')}"
        ) from None
    # Workers share it with the master: the collector would write to every page of it.
    gc.collect()
    gc.freeze()
