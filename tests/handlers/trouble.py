"""An echo that makes trouble of the kind that a client orders."""

from __future__ import annotations

import os
import subprocess
import time
from typing import NoReturn

from teller import Teller  # type: ignore[import-not-found]  # it is beside this file, on the daemon's python_path

MIB = 1 << 20


def spin_for_ever() -> NoReturn:
    """Keeps the interpreter busy."""
    while True:
        pass


def block_for_ever() -> None:
    """Waits in C."""
    time.sleep(1e6)


def devour_memory() -> None:
    """Takes 512 MiB, or as much of it as there is, and uses it."""
    _taken = [b"x" * MIB for _ in range(512)]


KEPT: list[bytes] = []


def grow() -> None:
    """Takes 100 MiB and keeps them."""
    KEPT.extend(b"x" * MIB for _ in range(100))


def leave_orphan() -> None:
    """Leaves a process behind whose parent is gone; it ends when the named pipe `gate` is opened and closed."""
    subprocess.run("cat gate &", shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)  # noqa: S602


def die() -> None:
    """Ends the worker as a fault in C would."""
    os._exit(3)


ORDERS = {
    b"spin": spin_for_ever,
    b"block": block_for_ever,
    b"devour": devour_memory,
    b"grow": grow,
    b"orphan": leave_orphan,
    b"die": die,
}


class Trouble(Teller):  # type: ignore[misc]
    """Sends its pid, then echoes; an order is carried out first."""

    def data_received(self, data: bytes) -> None:
        if data in ORDERS:
            ORDERS[data]()
        super().data_received(data)
