"""What the scripts of bench/ that start a daemon of forkd's have in common."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence

#: What clients send, and get back.
MESSAGE = b"x" * 39 + b"\n"


def forkd_command(handler: str, workers: int, port: int, run: str, settings: Sequence[str] = ()) -> list[str]:
    """The command of a daemon at a port of 127.0.0.1, whose files are in a directory.

    Args:
        handler: what serves; empty: the built-in echo.
        workers: how many.
        port: where it listens.
        run: the directory.
        settings: more of them, each KEY=VALUE.
    """
    command = [sys.executable, "-m", "forkd", "run", *([handler] if handler else []), "--name", "bench"]
    command += ["--workers", str(workers), "--listen", f"tcp://127.0.0.1:{port}", "--run-directory", f"{run}/forkd"]
    return command + [word for setting in (f"log.to={run}/log", *settings) for word in ("--set", setting)]


def free_port() -> int:
    """A port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Waits until the server accepts."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as probe:
                probe.sendall(MESSAGE)
                probe.recv(100)
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
