"""Every setting with bounds at its least and its most, by the declarations, with a daemon that starts, serves, reloads
and stops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from forkd.config.fields import ListOf, options
from forkd.config.loader import SettingOverride, read_settings
from forkd.config.settings import Once, Settings
from forkd.config.values import ScalarKind
from tests.support.clients import dial, echoes
from tests.support.daemon import Harness, forkd
from tests.support.once_process import OnceProcess

Bound = Callable[[ScalarKind[Any]], str]

#: Those that no daemon in a test can have, by the bound's name or its beginning, and why.
LEFT_OUT = {
    ("most", "workers"): "hundreds of processes",
    ("most", "stop_delay"): "the stop would take so long",
    ("least", "boot_timeout"): "a busy machine takes longer to import anything",
    ("least_above_zero", "stall_timeout"): "a busy machine holds a worker up for longer, and it is killed",
    ("least", "rlimits.address_space"): "a worker can allocate nothing, and says so in its log",
}


def bounded(section: type = Settings, prefix: str = "") -> Iterator[tuple[str, ScalarKind[Any]]]:
    """The settings that have bounds, by their keys."""
    for name, option in options(section).items():
        kind = option.kind.item if isinstance(option.kind, ListOf) else option.kind
        if not isinstance(kind, ScalarKind):
            if isinstance(kind, type) and kind is not Once:
                yield from bounded(kind, f"{prefix}{name}.")
        elif kind.bounds is not None:
            yield prefix + name, kind


def least(kind: ScalarKind[Any]) -> str:
    assert kind.bounds is not None
    return kind.show(0 if kind.zero else kind.bounds[0])


def least_above_zero(kind: ScalarKind[Any]) -> str:
    assert kind.bounds is not None
    return kind.show(kind.bounds[0] or (0.001 if kind.name.startswith("duration") else 1))


def most(kind: ScalarKind[Any]) -> str:
    assert kind.bounds is not None
    return kind.show(kind.bounds[1])


def at_bound(bound: Bound) -> tuple[str, ...]:
    left_out = {key for beginning, key in LEFT_OUT if bound.__name__.startswith(beginning)}
    return tuple(f"{key}={bound(kind)}" for key, kind in bounded() if key not in left_out)


@pytest.mark.parametrize("bound", [least, least_above_zero, most], ids=lambda bound: bound.__name__)
def test_bounds_daemon_serves_reloads_and_stops(harness: Harness, bound: Bound) -> None:
    daemon = harness.daemon(workers=1, settings=at_bound(bound)).start()
    with dial(daemon.address) as sock:
        if bound is not least_above_zero:  # where each client's time is over at once
            assert echoes(sock)
        result = daemon.command("reload")
        assert result.returncode == 0, result.stderr
    result = daemon.command("stop")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("bound", [least, most], ids=lambda bound: bound.__name__)
def test_bounds_one_client_is_served(single: Callable[..., OnceProcess], bound: Bound) -> None:
    settings = at_bound(bound)
    kind = options(Once)["timeout"].kind
    assert isinstance(kind, ScalarKind)
    one = single(None, f"--set=once.timeout={bound(kind)}", *(f"--set={each}" for each in settings))
    with dial(one.foreground().address) as sock:
        assert echoes(sock)
    assert one.status() == 0


@pytest.mark.parametrize("key", ["recycle.age", "stall_timeout", "boot_timeout"])
def test_bounds_time_that_is_too_short_is_told(key: str) -> None:
    problems = read_settings(None, [SettingOverride(key, "1ms", "--set")]).problems
    said = rf"{key}: 1ms is too little; write (0, or )?at least (1s|100ms)"
    assert any(re.search(said, str(problem)) for problem in problems), problems


@pytest.mark.parametrize("scheme", ["tcp", "udp", "rdp"])
def test_bounds_calls_wait_for_any_time(harness: Harness, scheme: str) -> None:
    target, more = ("reliable:service", ["--rdp"]) if scheme == "rdp" else (None, [])
    listen = "tcp://127.0.0.1:0" if scheme == "tcp" else "udp://127.0.0.1:0"
    daemon = harness.daemon(workers=1, target=target, listen=(listen,)).run()
    for waits in (["--timeout", "36500d"], ["--timeout", "25d", "--deadline", "36500d"]):
        result = forkd("call", daemon.address, "68656c6c6f", "--hex", *waits, *more, cwd=harness.directory)
        assert (result.stderr, result.returncode) == ("", 0)
        assert result.stdout.strip().endswith("68656c6c6f")
