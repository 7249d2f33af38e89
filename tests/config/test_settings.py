"""The declarations: what a change of each setting needs, and the defaults that they give."""

from __future__ import annotations

import itertools

import pytest

from forkd.config.fields import Needs, default_of, options
from forkd.config.listener import ConnectionLimits
from forkd.config.settings import Log, Recycle, Settings


def test_needs_are_ordered_reload_upgrade_restart() -> None:
    assert max(Needs.RELOAD, Needs.RELOAD) is Needs.RELOAD
    assert max(Needs.RELOAD, Needs.UPGRADE) is Needs.UPGRADE
    for order in itertools.permutations(Needs):
        assert max(order) is Needs.RESTART
        assert sorted(order) == [Needs.RELOAD, Needs.UPGRADE, Needs.RESTART]


def test_settings_fixed_while_running_need_more_than_a_reload() -> None:
    needs = {name: option.needs for name, option in options(Settings).items()}
    assert {name for name, found in needs.items() if found is Needs.RESTART} == {
        "name",
        "run_directory",
        "working_directory",
        "mode",
    }
    assert {name for name, found in needs.items() if found is Needs.UPGRADE} == {"preload"}


def test_section_is_declared_by_its_class_and_defaults() -> None:
    assert options(Settings)["log"].kind is Log
    assert default_of(Settings, "log") == Log()
    assert default_of(Log, "level") == "info"
    assert default_of(ConnectionLimits, "write_buffer") == 64 << 20


def test_a_worker_is_never_recycled_unless_the_settings_say_when() -> None:
    assert default_of(Settings, "recycle") == Recycle(connections=0, age=0.0, memory=0, jitter=0.1)


def test_required_setting_has_no_default() -> None:
    assert options(Settings)["listen"].required
    with pytest.raises(KeyError):
        default_of(Settings, "listen")
