"""The second half of an upgrade: a new image of the master, which goes on where the old one left off, or tries whether
it could.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from forkd import signals
from forkd.app.assembly import Daemon, Held, preload
from forkd.app.check import check_addresses
from forkd.app.prepare import check_reloadable
from forkd.app.whereabouts import enter_directory, run_directory
from forkd.config.options import Settings
from forkd.errors import ForkdError, HandlerError
from forkd.master.heritage import Heritage, handed_settings
from forkd.system.identity import find_identity
from forkd.system.logs import start_logging
from forkd.system.process import dump_stacks_on

log = logging.getLogger("forkd")


def resume(state: str, reread: Callable[[], Settings]) -> None:
    """Goes on with a running daemon to its end, or tries whether that could be.

    Args:
        state: what `wire.RESUME` says.
        reread: reads the settings, as the command line of the start means them.

    Raises:
        ForkdError: it can't; or the daemon gave up.
    """
    _, trying, number = state.rpartition("check:")
    descriptor = int(number)
    if trying:
        _try(handed_settings(descriptor), reread)
    else:
        heritage = Heritage.read(descriptor)
        os.close(descriptor)
        _go_on(heritage, reread)


def _try(present: Settings, reread: Callable[[], Settings]) -> None:
    """All that could go wrong later, changing nothing."""
    from forkd.serve.handlers.load import import_handlers  # noqa: PLC0415 (nobody but this child pays for it here)
    from forkd.serve.settle import settle  # noqa: PLC0415

    dump_stacks_on(signals.DUMP)
    settings = reread()
    check_reloadable(_as_started(present, settings), settings)
    ours = {str(listener.address) for listener in present.listen}
    for _, error in check_addresses(settings, ours):
        raise error
    enter_directory(settings)
    if settings.preload:
        preload(settings)
    settle(settings, find_identity(settings))
    for handler in import_handlers(settings):
        if isinstance(handler, HandlerError):
            raise handler


def _go_on(heritage: Heritage, reread: Callable[[], Settings]) -> None:
    for descriptor in heritage.descriptors():
        os.set_inheritable(descriptor, False)
    generation, place = heritage.generation, heritage.place
    settings = generation.settings
    start_logging(settings.name, settings.log.level, settings.log.form, generation.log)
    fresh = settings
    with _surviving():
        fresh = reread()  # before the directory is another: what the command line says is relative to this one
    with _surviving():
        enter_directory(settings)
    with _surviving():
        if fresh.preload:
            preload(fresh)
        generation.settings = _as_started(settings, fresh)
    run = run_directory(settings)
    run.pid_file.adopt(place.lock, lent=False)
    try:
        Daemon(Held(run, generation.bound), place, reread).resume(heritage)
    finally:
        run.pid_file.remove()


@contextlib.contextmanager
def _surviving() -> Iterator[None]:
    """For what was tried, and has changed since: the old workers serve on. The reload will say what is wrong, too."""
    try:
        yield
    except ForkdError as error:
        log.error("%s", error)


def _as_started(present: Settings, fresh: Settings) -> Settings:
    """The settings of the generation that serves, but what an image decides when it starts is as it is now."""
    return replace(present, preload=fresh.preload)
