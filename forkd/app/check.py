"""What `forkd check` tries: whether the addresses could be bound, the handlers and hooks imported. It changes nothing.

Handlers are imported in a child, as the user that a worker would be; `cli.check` shows what was found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

from forkd.app.detach import read_until
from forkd.config.address import Address, parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.errors import AddressInUse, ForkdError, HandlerError, printable
from forkd.master.spawn import Exit
from forkd.messages import InvalidMessage, JsonLines, MalformedLine, StepChecked, decode_check, encode
from forkd.system.identity import Identity
from forkd.system.listeners import find_holders, probe_listener
from forkd.system.logs import probe_log
from forkd.system.private_directory import probe_private_directory
from forkd.system.process import leave_terminal
from forkd.system.run_directory import run_directory
from forkd.system.working_directory import enter_directory, probe_directory

#: Bytes of what handlers print at their import that are shown at most.
_MOST_PRINTED = 1 << 16


def check_addresses(
    listeners: Sequence[Listener],
    settings: Settings,
    own_addresses: set[str],
    warn: Callable[[str], object] = lambda text: None,
) -> list[tuple[int, ForkdError]]:
    """The listeners whose address can't be bound: their numbers, and the reasons.

    Args:
        listeners: those of the settings, or those of the master's own.
        settings: the daemon's.
        own_addresses: addresses that the running daemon of this name listens on itself.
        warn: called with a sentence for each address that a host's name stands for and the machine lacks.
    """
    found: list[tuple[int, ForkdError]] = []
    in_use: list[tuple[int, AddressInUse]] = []
    for index, listener in enumerate(listeners):
        try:
            for lacking in probe_listener(listener, run_directory(settings).path):
                warn(lacking)
        except AddressInUse as error:
            if not _is_own(listener.address, own_addresses):
                in_use.append((index, error))
        except ForkdError as error:
            found.append((index, error))
    holders = find_holders([listeners[index].address for index, _ in in_use])
    for index, reason in in_use:
        holder = holders.get(listeners[index].address)
        found.append((index, AddressInUse(f"{reason} by {holder}") if holder else reason))
    return found


def _is_own(address: Address, own_addresses: set[str]) -> bool:
    """Whether the running daemon may be what has an address: it listens there, or elsewhere at its port, from where it
    can move (`listeners.bind_listener`).
    """
    ports = {(one.scheme, one.port) for one in map(parse_address, own_addresses) if one.scheme in ("tcp", "udp")}
    return str(address) in own_addresses or (address.scheme, address.port) in ports


def check_places(settings: Settings) -> list[tuple[str, ForkdError]]:
    """The directories and files of the daemon's own that can't be had: the setting of each, and why."""
    tries: list[tuple[str, Callable[[], None]]] = [("working_directory", lambda: probe_directory(settings))]
    if settings.mode != "once":
        tries.append(("run_directory", lambda: probe_private_directory(run_directory(settings).path)))
    if isinstance(target := settings.log.to, Path):
        tries.append(("log.to", lambda: probe_log(target)))
    found: list[tuple[str, ForkdError]] = []
    for key, probe in tries:
        try:
            probe()
        except ForkdError as error:
            found.append((key, error))
    return found


@dataclass(frozen=True, slots=True)
class HandlerProblem:
    """Why a handler or hook can't be had.

    Attributes:
        owner: the number of its listener; -1: the daemon's own.
        setting: what names it; `user` where the child could not become the workers' user.
        reason, details: as of `StepChecked`.
    """

    owner: int
    setting: str
    reason: str
    details: str = ""


def check_handlers(settings: Settings, identity: Identity) -> list[HandlerProblem]:
    """The handlers and hooks that can't be imported.

    They are imported in a child, within `boot_timeout`, as the user that a worker would be.
    """
    from forkd.serve.handlers import hook_names  # noqa: PLC0415 (as in `_try_handlers`)

    places = [(-1, "user"), *((number, "handler") for number in range(len(settings.listen)))]
    places += [(owner, kind) for owner, kind, _ in hook_names(settings)]
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.memfd_create("forkd-check"), "w+b", buffering=0) as printed:
        child = os.fork()
        if child == 0:
            os.close(reader)
            _leave_terminal_to(printed.fileno())
            _try_handlers(settings, identity, writer)
        os.close(writer)
        received, late = read_until(reader, settings.boot_timeout)
        if late:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        printed.seek(0)
        sys.stderr.write(printable(printed.read(_MOST_PRINTED).decode(errors="backslashreplace")))
    steps = _steps_of(received)
    found = [HandlerProblem(*places[one.step], one.reason, one.details) for one in steps if one.reason]
    if not (steps and steps[0].reason) and len(steps) < len(places):
        how = "took longer than boot_timeout" if late else f"ended the process, {Exit(child, status, usage.ru_maxrss)}"
        found.append(HandlerProblem(*places[max(1, len(steps))], f"importing it {how}"))
    return found


def _steps_of(received: bytes) -> list[StepChecked]:
    """What a child has told, up to the first line that is no message: a handler may have written to the pipe."""
    steps: list[StepChecked] = []
    with contextlib.suppress(MalformedLine, InvalidMessage):
        for line in received.splitlines(keepends=True):
            steps += map(decode_check, JsonLines().feed(line))
    return steps


def _leave_terminal_to(printed: int) -> None:
    """In a child: gives up the terminal, which may be root's while handlers are another user's. What they would print
    there goes to this descriptor, and there is nothing to read.
    """
    leave_terminal()
    with open(os.devnull, "rb") as nothing:
        for descriptor, instead in ((0, nothing.fileno()), (1, printed), (2, printed)):
            if os.isatty(descriptor):
                os.dup2(instead, descriptor)


def _try_handlers(settings: Settings, identity: Identity, writer: int) -> NoReturn:
    """In a child: drops privileges as a worker does, then imports each handler; tells each step on the pipe."""
    # Imported here, as in `daemon`: commands that need no worker do not load it.
    from forkd.serve.handlers import call_as_worker, import_handlers  # noqa: PLC0415
    from forkd.serve.import_paths import assume_identity  # noqa: PLC0415
    from forkd.serve.stream.tls import load_contexts  # noqa: PLC0415

    status = os.EX_SOFTWARE
    try:
        with contextlib.suppress(ForkdError):  # told by `check_places`
            enter_directory(settings)
        with open(writer, "wb", buffering=0) as pipe:
            if settings.preload:
                list(import_handlers(settings))
            wrong_tls = [_wrong(load_contexts, listener) for listener in settings.listen]
            try:
                assume_identity(settings, identity)
            except ForkdError as error:
                pipe.write(encode(StepChecked(0, str(error))))
                os._exit(0)
            pipe.write(encode(StepChecked(0)))
            results = enumerate(zip_longest(import_handlers(settings), wrong_tls, fillvalue=""), 1)
            call_as_worker(settings, lambda: [pipe.write(encode(_checked(step, *found))) for step, found in results])
        status = 0
    except BaseException:  # noqa: BLE001 (a bug of forkd's: this process has no other border)
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _checked(step: int, result: object, wrong_tls: str) -> StepChecked:
    if isinstance(result, HandlerError):
        return StepChecked(step, str(result), result.details)
    return StepChecked(step, wrong_tls)


def _wrong(load: Callable[[Listener], object], listener: Listener) -> str:
    """What is wrong with the certificates of a listener; empty when nothing is."""
    try:
        load(listener)
    except ForkdError as error:
        return str(error)
    return ""
