"""What `forkd check` tries: whether the addresses could be bound and the handlers imported, changing nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

from forkd.app.launcher import read_until
from forkd.app.whereabouts import enter_directory
from forkd.config.options import Settings
from forkd.errors import AddressInUse, ForkdError, HandlerError
from forkd.master.spawn import Exit
from forkd.system.identity import Identity
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


def check_handlers(settings: Settings, identity: Identity) -> list[tuple[int, str, str]]:
    """The listeners whose handler can't be had, by number, with why and a traceback. Imports them in a child that is
    thrown away, within `boot_timeout`, and as who a worker would be. That it can't be that has the number -1.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _say_what_fails(settings, identity, writer)
    os.close(writer)
    words, late = read_until(reader, settings.boot_timeout)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    results = [json.loads(line) for line in words.splitlines()]
    if results and results[0]:
        return [(-1, *results[0])]
    found = [(index, *result) for index, result in enumerate(results[1:]) if result]
    if len(results) <= len(settings.listen):
        how = "took longer than boot_timeout" if late else f"ended the process, {Exit(child, status, usage.ru_maxrss)}"
        found.append((max(0, len(results) - 1), f"importing it {how}", ""))
    return found


def _say_what_fails(settings: Settings, identity: Identity, writer: int) -> NoReturn:
    """In a child: becomes a worker and imports each handler; writes for each of that a line with what went wrong, or
    null.
    """
    # As in `assembly.serve`.
    from forkd.serve.handlers.load import import_handlers  # noqa: PLC0415
    from forkd.serve.settle import settle  # noqa: PLC0415

    try:
        enter_directory(settings)
        with open(writer, "wb", buffering=0) as pipe:
            if settings.preload:
                list(import_handlers(settings))
            try:
                settle(settings, identity)
            except ForkdError as error:
                pipe.write(json.dumps([str(error), ""]).encode() + b"\n")
                os._exit(0)
            pipe.write(b"null\n")
            for result in import_handlers(settings):
                wrong = [str(result), result.details] if isinstance(result, HandlerError) else None
                pipe.write(json.dumps(wrong).encode() + b"\n")
    finally:
        os._exit(0)
