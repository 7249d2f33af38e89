"""What this process can import for its handlers once it is another user or has another root directory; and why, where
it can't.

Python takes a directory that it may not read for an empty one: what lies there is "no module", whatever the reason. So
what every handler needs is checked before the first handler is imported, and for a module that is not found later the
log has the reason. Every process that is to run handlers calls `assume_identity` first: workers, `forkd once`, and the
children that only try whether handlers can be imported.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

import forkd.builtin  # noqa: F401  # the one module of forkd that may serve as a handler: it must not be missed later
from forkd.config.settings import Settings
from forkd.errors import HandlerError
from forkd.system.identity import Identity
from forkd.system.privileges import drop_privileges

log = logging.getLogger("forkd.worker")

_INSTALLED = "installed packages"


def assume_identity(settings: Settings, identity: Identity) -> None:
    """Makes this process the settings' user in their root directory, for good, before any handler is imported.

    Args:
        settings: what the process may.
        identity: the user and the groups that it gets.

    Raises:
        PrivilegeError: it can't become that, or not all of it.
        HandlerError: it can't read what every handler needs.
    """
    drop_privileges(settings, identity)
    for name, value in identity.environment().items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    check_import_paths(settings)


def check_import_paths(settings: Settings) -> None:
    """Checks that this process, which has become the settings' user, can import what handlers need. From now on the log
    says, of a module that is not found, which directories may have it and can't be read.

    Raises:
        HandlerError: it can't read the interpreter's own modules, what is installed with it, or `python_path`.
    """
    if settings.user is None and settings.chroot is None:
        return
    sys.meta_path.append(MissingModuleExplainer())
    if settings.chroot is not None:
        sys.path_importer_cache.clear()  # of what was outside
        if settings.preload:
            return  # the master had the modules before the fork
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


def _library() -> str:
    return str(Path(os.__file__).parent)


def _installed() -> list[tuple[str, str]]:
    """Where the interpreter's own installation has packages; not the starting user's places, as in root's home."""
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
    """The obstacles to several paths, as the end of a sentence; empty where there are none."""
    found = list(dict.fromkeys(blocked for path in paths if (blocked := obstacle(path))))
    return f"; user {os.geteuid()} can't read {', '.join(found)}" if found else ""


class MissingModuleExplainer(MetaPathFinder):
    """The last finder that Python asks for a module. It finds none, but may know why the others did not."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Logs, once for each name, which directories can't be read."""
        if name in self._logged:
            return
        self._logged.add(name)
        if reason := obstacles(one for one in (sys.path if path is None else path) if isinstance(one, str)):
            log.warning("module %r not found%s", name, reason)
