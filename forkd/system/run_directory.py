"""The run directory of a daemon, with its pid file and its control socket: where it is, and what lies in it.

The commands about a running daemon find it by these paths, so this loads nothing of the settings, of which a start
makes the directory (`private_directory`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from forkd.system.pidfile import PidFile

if TYPE_CHECKING:
    from forkd.config.settings import Settings

#: Where root's daemons, and those of systemd's units, have their run directories (file-hierarchy(7)).
ROOT_DIRECTORY = Path("/run/forkd")


class RunDirectory:
    """The paths of a daemon: its run directory, and what lies in it.

    Args:
        name: the daemon's name.
        path: where the settings put it, or None for the default.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self.name = name
        self.path = path or default_run_directory(name)
        self.control = self.path / "control.sock"
        self.pid_file = PidFile(self.path / "pid", name)

    def remove(self, *, own_directory: bool) -> None:
        """At the daemon's end: removes the pid file, if it is this process's, and then the directory if it is empty.

        Args:
            own_directory: whether the directory is in the default place, and not one that the settings name.
        """
        if self.pid_file.remove() and own_directory:
            with contextlib.suppress(OSError):  # a start may have made a file there by now
                self.path.rmdir()


def run_directory(settings: Settings) -> RunDirectory:
    """The run directory that the settings mean."""
    return RunDirectory(settings.name, settings.run_directory)


def default_run_directory(name: str) -> Path:
    """Where the daemon `name` keeps its pid file and control socket unless told otherwise (file-hierarchy(7))."""
    if os.geteuid() == 0:
        return ROOT_DIRECTORY / name
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "forkd", name)
    return Path(tempfile.gettempdir(), f"forkd-{os.geteuid()}", name)


def is_put_by_root(path: Path) -> bool:
    """Whether a run directory is in /run/forkd, where root alone has put it, also where it is another user's: systemd
    makes it for a unit with `User=`. Raises OSError.
    """
    above = path.parent.lstat()
    return path.parent == ROOT_DIRECTORY and above.st_uid == 0 and not above.st_mode & 0o022
