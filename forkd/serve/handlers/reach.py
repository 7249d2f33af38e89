"""What a worker can import once it is another user, or has another root directory; and why, where it can't.

Python takes a directory that it may not read for an empty one: what lies there is "no module", whatever the reason. So
what every handler needs is looked at before the first is imported, and for what is not found later the log has why.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

from forkd.config.options import Settings
from forkd.errors import HandlerError

log = logging.getLogger("forkd.worker")


def check_reach(settings: Settings) -> None:
    """Looks whether this process, which has become what the settings say, can import what handlers need. From now on
    the log says, of a module that is not found, which directories may have it and can't be read.

    Raises:
        HandlerError: it can't read the interpreter's own modules, what is installed with it, or `python_path`.
    """
    if settings.user is None and settings.chroot is None:
        return
    sys.meta_path.append(_Explainer())
    if settings.chroot is not None:
        sys.path_importer_cache.clear()  # of what was outside
        if settings.preload:
            return  # who has it brings in what is needed
    own = [(str(path), "python_path") for path in settings.python_path]
    for path, what in [(_library(), "Python's own modules"), *_installed(), *own]:
        if settings.chroot is not None and what != _INSTALLED and not os.path.lexists(path):
            raise HandlerError(
                f"{path} ({what}) is not there in chroot {settings.chroot}; put it there, as by a bind mount, or have "
                "the handlers imported before, by preload: true"
            )
        if blocked := obstacle(path):
            raise HandlerError(
                f"the workers' user {settings.user or os.geteuid()} can't read {blocked}, and so nothing of {path} "
                f"({what}); let it read that, or put this where it can"
            )


_INSTALLED = "installed packages"


def _library() -> str:
    return str(Path(os.__file__).parent)


def _installed() -> list[tuple[str, str]]:
    """What is imported from, of the interpreter's own places: not the starter's, such as those in root's home."""
    prefixes = {Path(one) for one in (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)}
    return [(entry, _INSTALLED) for entry in sys.path if prefixes & set(Path(entry).parents)]


def obstacle(path: str) -> str:
    """The first directory on the way to a path that keeps this process from reading what is there; empty where nothing
    does, or where there is nothing.
    """
    real = Path(os.path.realpath(path))
    for part in (*reversed(real.parents), real):
        try:
            part.stat()
        except PermissionError:
            return str(part.parent)
        except OSError:
            return ""
    return "" if os.access(real, os.R_OK | os.X_OK * real.is_dir()) else str(real)


def obstacles(paths: Iterable[str]) -> str:
    """All of them, in a sentence's tail; empty where there are none."""
    found = list(dict.fromkeys(blocked for path in paths if (blocked := obstacle(path))))
    return f"; user {os.geteuid()} can't read {', '.join(found)}" if found else ""


class _Explainer(MetaPathFinder):
    """The last that is asked for a module. It finds none, but may know why."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name in self._told:
            return
        self._told.add(name)
        if why := obstacles(one for one in (sys.path if path is None else path) if isinstance(one, str)):
            log.warning("no module %r is found%s", name, why)
