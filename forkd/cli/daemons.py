"""`forkd list`: every daemon on this machine that this user may see, whichever user's and wherever its files are.

`locate.every_daemon` finds and asks them. Of a daemon that can't be asked, since it is another user's or does not
answer, there is what its process shows: name, pid and user.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from forkd.cli.locate import SeenDaemon, every_daemon
from forkd.cli.status import age, or_dash, table
from forkd.errors import escaped, printable

#: The state of a daemon that another user's process is.
_NOT_ALLOWED = "another user's"

_HEAD = ["NAME", "PID", "USER", "STATE", "WORKERS", "CLIENTS", "UPTIME", "ADDRESSES"]


def list_daemons(command: argparse.Namespace) -> int:
    """`forkd list`."""
    found = [described(one, time.time()) for one in every_daemon()]
    if command.json:
        print(json.dumps(found, indent=2))
        return 0
    print(printable("\n".join(table(_HEAD, [_row(one) for one in found]) if found else ["no daemon runs"])))
    for one in found:
        if one["error"] and one["state"] is None:
            print(printable(f"{one['name']}, pid {one['pid']}: {one['error']}"))
    return 0


def described(seen: SeenDaemon, now: float) -> dict[str, Any]:
    """A daemon as `forkd list --json` shows it; None stands for what is not known.

    Args:
        seen: what was found out.
        now: seconds since the epoch.
    """
    status, workers = seen.status, seen.status.get("workers")
    started = status.get("started")
    return {
        "name": seen.master.name,
        "pid": seen.master.pid,
        "user": seen.master.user,
        "state": status.get("state", _NOT_ALLOWED if seen.is_denied else None),
        "reason": status.get("reason", ""),
        "serving": status.get("serving"),
        "wanted": status.get("wanted"),
        "clients": None if workers is None else sum(one["clients"] for one in workers),
        "addresses": [one["address"] for one in status.get("listeners", ())],
        "started": started,
        "uptime": None if started is None else max(0.0, round(now - started, 3)),
        "version": status.get("version"),
        "source": status.get("source"),
        "run_directory": None if seen.run is None else str(seen.run.path),
        "error": seen.error,
    }


def _row(one: dict[str, Any]) -> Sequence[object]:
    workers = "-" if one["wanted"] is None else f"{one['serving']}/{one['wanted']}"
    uptime = "-" if one["uptime"] is None else age(one["uptime"])
    addresses = ", ".join(map(escaped, one["addresses"])) or "-"
    state = one["state"] or "no answer"
    return [one["name"], one["pid"], one["user"], state, workers, or_dash(one["clients"]), uptime, addresses]
