"""Runs a function in a forked child, which may change itself for good, and hands back what it returned."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable
from typing import Any

PATIENCE = 20.0


class ChildFailed(Exception):
    """What the child raised, as `TYPE: MESSAGE`."""


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a child, by way of JSON; raises ChildFailed with what it raises there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = {"value": function()}
        except BaseException as error:  # noqa: BLE001 (it is the parent's to judge)
            said = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert select.select([pipe], [], [], PATIENCE)[0], "the child hangs"
            said = json.loads(pipe.read() or b'{"error": "it died"}')
    finally:
        os.waitpid(child, 0)
    if "error" in said:
        raise ChildFailed(said["error"])
    return said["value"]
