"""`check`: what is wrong with the settings, the addresses and the handlers of a daemon that may be started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from forkd.app.check import check_addresses, check_handlers, check_places
from forkd.app.reload_helper import exposures, resolve_statsd
from forkd.cli.locate import connect
from forkd.cli.settings import read_target, starting_daemon
from forkd.cli.target import WantedDaemon
from forkd.config.loader import LoadResult
from forkd.config.settings import Settings
from forkd.config.values import DURATION
from forkd.errors import ConfigError, ForkdError, printable
from forkd.master.admin.loading import load_extras
from forkd.master.plan import STOP_MARGIN
from forkd.messages import StatusReply, StatusRequest
from forkd.system.identity import Identity, look_up_identity
from forkd.system.proc import need_proc
from forkd.system.rlimits import descriptor_warnings
from forkd.system.safe_paths import unsafe_settings
from forkd.system.working_directory import starting_directory

#: For which a unit of ours waits (TimeoutStopSec), before it is asked for more.
_UNIT_STOP_SECONDS = 60.0


def check(command: argparse.Namespace) -> int:
    """`forkd check`."""
    need_proc()
    starting_directory()
    result = read_target(command)
    check_all(result, starting_daemon(command, result))
    if result.problems:
        raise ConfigError(result.problems)
    settings = result.settings
    for warning in (*descriptor_warnings(settings), *_stop_warnings(settings), *exposures(settings)):
        _print_warning(warning)
    print(f"{settings.name}: the settings, the addresses and the handlers are in order")
    return 0


def _print_warning(text: str) -> None:
    print(printable(f"warning: {text}"), file=sys.stderr)


def _stop_warnings(settings: Settings) -> Iterator[str]:
    """What its settings for the end of a daemon should be known to lead to."""
    if settings.mode == "once":
        return
    if settings.drain_spread and settings.drain_spread >= settings.drain_timeout:
        timeout = DURATION.text(settings.drain_timeout)
        yield f"drain_spread should be below drain_timeout, {timeout}: the last clients are asked to leave too late"
    longest = settings.stop_delay + settings.drain_timeout + STOP_MARGIN
    if longest > _UNIT_STOP_SECONDS:
        parts = (
            DURATION.text(seconds) for seconds in (longest, settings.stop_delay, settings.drain_timeout, STOP_MARGIN)
        )
        yield (
            "a stop may take {} (stop_delay {}, drain_timeout {}, and {}): systemd is told so; docker stop, a pod's "
            "terminationGracePeriodSeconds and the like must allow it"
        ).format(*parts)


def check_all(result: LoadResult, wanted: WantedDaemon) -> None:
    """Tries the addresses and the handlers, and adds what is wrong to the problems of the settings themselves.

    Args:
        result: what was read, and what is wrong with it.
        wanted: the daemon that has addresses of them, if it runs.
    """
    try:
        with connect(wanted) as master:
            status = master.ask(StatusRequest(), StatusReply).status
            ours = {item["address"] for item in (*status["listeners"], *status.get("services", ()))}
    except ForkdError:
        ours = set()
    for key, error in check_places(result.settings):
        result.add_problem(str(error), *key.split("."))
    for index, error in check_addresses(result.settings.listen, result.settings, ours, _print_warning):
        result.add_problem(str(error), "listen", result.listeners[index], "address")
    for index, error in check_addresses(result.settings.service_listeners, result.settings, ours, _print_warning):
        result.add_problem(str(error), *result.settings.services[index].keys)
    for key, try_it in (("admin", load_extras), ("statsd", resolve_statsd)):
        try:
            try_it(result.settings)
        except ForkdError as error:
            result.add_problem(str(error).removeprefix(f"{key}: "), key)
    _check_code(result)


def _check_code(result: LoadResult) -> None:
    """Tries the handlers, as far as their code may be run here; as of `check_all`."""
    settings, (identity, mistakes) = result.settings, look_up_identity(result.settings)
    if os.geteuid() == 0 and (mistakes or unsafe_settings(settings, identity)):
        return  # the handlers' code is not run as root where the workers are not to be root, or others may write it
    if mistakes:
        settings, identity = replace(settings, user=None, chroot=None), Identity()
    told: set[str] = set()
    for found in check_handlers(settings, identity):
        what, reason = "tls" if found.reason.startswith("tls.") else found.setting, found.reason
        for key in ("command", "directory"):
            if reason.startswith(f"{key}: "):
                what, reason = key, reason.removeprefix(f"{key}: ")
        if what == "user" and settings.user is None:
            what = "chroot"
        place = ("listen", result.listeners[found.owner]) if found.owner >= 0 else ()
        result.add_problem(reason, *place, what)
        if found.details not in told:
            print(printable(found.details), end="", file=sys.stderr)
        told.add(found.details)
