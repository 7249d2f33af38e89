"""`forkd once`, and `run` and `start` of settings that say `mode: once`.

The process is made by `app.once`; here it is told, on standard output, when the client can come.
"""

from __future__ import annotations

import argparse
import json

from forkd.app.once import is_inherited, run_once, start_once
from forkd.cli.settings import settings_of
from forkd.config.settings import Settings
from forkd.messages import OnceReady


def once(command: argparse.Namespace) -> int:
    """`forkd once`."""
    return serve(settings_of(command), foreground=command.foreground, as_json=command.json)


def serve(settings: Settings, *, foreground: bool, as_json: bool = False) -> int:
    """Serves one client, in the background or in this process; the exit status.

    Args:
        settings: of mode once.
        foreground: whether in this process. An inherited socket is always served there.
        as_json: whether an object is printed when the client can come, in place of a line.
    """
    if foreground or is_inherited(settings):
        return run_once(settings, lambda ready: _print(ready, as_json=as_json))
    _print(start_once(settings), as_json=as_json)
    return 0


def _print(ready: OnceReady, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"state": ready.state, "address": ready.address, "pid": ready.pid}), flush=True)
    else:
        print(ready.state, ready.address, "pid", ready.pid, flush=True)
