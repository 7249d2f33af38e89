"""What `forkd check` tries: whether the addresses could be bound and the handlers imported, changing nothing."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import NoReturn

from forkd.app.assembly import enter_directory
from forkd.config.options import Settings
from forkd.errors import AddressInUse, ForkdError, HandlerError
from forkd.system.sockets import probe_listener


def check_addresses(settings: Settings, ours: set[str]) -> list[tuple[int, ForkdError]]:
    """The listeners whose address can't be had, by number, with why.

    Args:
        settings: whose listeners.
        ours: addresses that the running daemon of this name holds itself.
    """
    found: list[tuple[int, ForkdError]] = []
    for index, listener in enumerate(settings.listen):
        try:
            probe_listener(listener)
        except AddressInUse as error:
            if str(listener.address) not in ours:
                found.append((index, error))
        except ForkdError as error:
            found.append((index, error))
    return found


def check_handlers(settings: Settings) -> list[tuple[int, str, str]]:
    """The listeners whose handler can't be had, by number, with why and a traceback. Imports them in a child that is
    thrown away, within `boot_timeout`.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _say_what_fails(settings, writer)
    os.close(writer)
    words = b""
    deadline = time.monotonic() + settings.boot_timeout
    with open(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            portion = pipe.read(65536)
            if not portion:
                break
            words += portion
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not words:
        return [(0, f"importing the handlers ended the process ({status}) or took longer than boot_timeout", "")]
    return [(index, reason, details) for index, reason, details in json.loads(words)]


def _say_what_fails(settings: Settings, writer: int) -> NoReturn:
    """In a child: imports each handler and says what went wrong."""
    from forkd.serve.worker import import_handlers  # noqa: PLC0415 (as in `assembly.serve`)

    try:
        enter_directory(settings)
        found = [
            (index, str(result), result.details)
            for index, result in enumerate(import_handlers(settings))
            if isinstance(result, HandlerError)
        ]
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(found).encode())
    finally:
        os._exit(0)
