"""A daemon as a container has it: PID 1 of a namespace of its own, with no terminal, no HOME and nothing to write to.

All that is mounted is read-only there but the run directory, and the log is standard error's. Its pids are told as this
process sees them, since what the daemon calls 1 is somebody else here.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from harness import Daemon
from processes import descendants

#: Opens the log, while it is there to be written to.
_LOG = ["sh", "-c", 'exec "$@" 2>>"$LOG"', "sh"]
_UNSHARE = [
    "setsid",
    "--wait",
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
]

#: Makes the run directory a mount of its own and all others read-only.
_ENTER = """
mount --bind "$RUN" "$RUN"
while read -r _ _ _ _ where _; do
  [ "$where" = "$RUN" ] || mount -o remount,bind,ro "$where"
done </proc/self/mountinfo
exec "$@"
"""


class Contained(Daemon):
    """Such a daemon; `run` alone starts it."""

    def __init__(self, directory: Path, **more: Any) -> None:
        super().__init__(directory, "contained", **more, settings=("log.to=stderr",))
        self.run_directory.mkdir()
        self.prefix = [*_LOG, *_UNSHARE, "sh", "-c", _ENTER, "sh"]
        self.environment = {"PATH": os.environ["PATH"], "LOG": str(self.log), "RUN": str(self.run_directory)}

    def outer(self) -> dict[int, int]:
        """The pids that are told here of all processes in there, by those that they have there."""
        found = {}
        assert self.process is not None
        for pid in descendants(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                inner = re.findall(r"(?m)^NSpid:\s+\d+\s+(\d+)$", Path(f"/proc/{pid}/status").read_text())
                found.update({int(one): pid for one in inner})
        return found

    def status(self) -> dict[str, Any]:
        """What the master tells of itself, its pids told as here; who has gone meanwhile is left out."""
        found, outer = super().status(), self.outer()
        if found["pid"] not in outer:
            raise ConnectionResetError("the master ended after it had answered")
        found["pid"] = outer[found["pid"]]
        found["workers"] = [one | {"pid": outer[one["pid"]]} for one in found["workers"] if one["pid"] in outer]
        return found
