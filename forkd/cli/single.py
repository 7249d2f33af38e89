"""`forkd once`, and `run` and `start` of settings that say `mode: once`."""

from __future__ import annotations

import argparse
import json

from forkd.app.once import Ready, is_inherited, run_once, start_once
from forkd.cli.target import settings_of
from forkd.config.options import Settings


def once(command: argparse.Namespace) -> int:
    """`forkd once`."""
    return serve(settings_of(command), foreground=command.foreground, as_json=command.json)


def serve(settings: Settings, *, foreground: bool, as_json: bool = False) -> int:
    """Serves one client, in the background or in this process; the exit status.

    Args:
        settings: of mode once.
        foreground: whether in this process. An inherited socket is always served there.
        as_json: whether what is told when the client can come is an object.
    """
    if foreground or is_inherited(settings):
        return run_once(settings, lambda ready: _tell(ready, as_json=as_json))
    _tell(start_once(settings), as_json=as_json)
    return 0


def _tell(ready: Ready, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"state": ready.doing, "address": ready.address, "pid": ready.pid}), flush=True)
    else:
        print(ready.doing, ready.address, "pid", ready.pid, flush=True)
