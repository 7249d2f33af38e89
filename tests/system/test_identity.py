"""The workers' user and groups: names looked up; what is missing or not allowed is named with its setting."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkd.errors import ForkdError
from forkd.master.generation import Generation
from forkd.master.upgrade import LaunchContext, MasterSnapshot
from forkd.system.capabilities import Capability, has_capability
from forkd.system.identity import Identity, find_identity, look_up_identity
from forkd.system.listeners import bind_listener
from forkd.system.privileges import drop_privileges
from forkd.system.scoreboard import Scoreboard
from tests.support.forked import ChildFailed, run_in_child
from tests.support.needs import needs_python_for_all, needs_root
from tests.system.test_privileges import NOBODY, status, wanting

STRANGER = 54321  # a number that no user has


def test_names_are_looked_up() -> None:
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    assert find_identity(wanting()) == Identity(None, None, None)
    found = find_identity(wanting(user=user.pw_name))
    assert (found.uid, found.gid) == (user.pw_uid, user.pw_gid)
    found = find_identity(wanting(group=group.gr_name))
    assert (found.uid, found.gid) == (None, group.gr_gid)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"user": "nobdy"}, "user: there is no user 'nobdy' on this machine"),
        ({"group": "nogrup"}, "group: there is no group 'nogrup' on this machine"),
        ({"groups": ("wheeel",)}, "groups: there is no group 'wheeel' on this machine"),
        ({"user": "4294967295"}, "user: 4294967295 is no user's or group's number; they end at 4294967294"),
        ({"user": "9" * 5000}, "user: 99999999999999999999 is no user's or group's number; they end at 4294967294"),
        ({"user": "²"}, "user: there is no user '²' on this machine"),
        ({"user": str(STRANGER)}, f"user: this machine knows no user {STRANGER}, and so no group of it; set group too"),
        ({"chroot": Path("/etc/passwd")}, "chroot: /etc/passwd is not a directory"),
    ],
)
def test_missing_user_or_group_is_named_with_its_setting(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ForkdError) as caught:
        find_identity(wanting(**more))
    assert str(caught.value).splitlines()[0] == said


def test_all_mistakes_are_told_at_once() -> None:
    assert [key for key, _ in look_up_identity(wanting(user="nobdy", group="nogrup", groups=("x",)))[1]] == [
        "user",
        "group",
        "groups",
    ]


def as_a_stranger(function: Callable[[], Any]) -> Any:
    needs_root()

    def become() -> Any:
        os.setgroups([77])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
        return function()

    return run_in_child(become)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"user": str(NOBODY), "group": "1"}, f"user: the daemon can't become {NOBODY}: it is user {STRANGER}; start"),
        ({"user": str(STRANGER), "group": "1"}, f"group: the daemon can't take the group 1: it is user {STRANGER}; "),
        ({"group": str(STRANGER), "groups": ("5",)}, f"groups: the daemon can't set groups: it is user {STRANGER}; "),
        ({"chroot": Path("/")}, f"chroot: the daemon can't change its root directory: it is user {STRANGER}; start"),
    ],
)
def test_user_that_is_not_root_can_not_become_another(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ChildFailed, match="ForkdError: " + re.escape(said)):
        as_a_stranger(lambda: find_identity(wanting(**more)))


def test_user_that_stays_the_same_keeps_its_groups() -> None:
    needs_python_for_all()
    settings = wanting(user=str(STRANGER), group=str(STRANGER))

    def become() -> list[Any]:
        drop_privileges(settings, find_identity(settings))
        return [os.getresuid(), os.getgroups(), status()["NoNewPrivs"]]

    assert as_a_stranger(become) == [[STRANGER] * 3, [77], "1"]


@pytest.mark.parametrize("lost", ["SETUID", "SETGID", "KILL"])
def test_a_root_that_lacks_what_is_needed_is_told_what(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    needs_root()
    monkeypatch.setattr("forkd.system.identity.has_capability", lambda one: one is not Capability[lost])
    with pytest.raises(ForkdError, match=rf"^user: .*: it is root, but without CAP_{lost}; give it that"):
        find_identity(wanting(user=str(NOBODY)))


@pytest.mark.parametrize(
    "plain",
    [
        {"uid": -1, "gid": None, "groups": None},
        {"uid": "0", "gid": None, "groups": None},
        {"uid": None, "gid": True, "groups": None},
        {"uid": None, "gid": None, "groups": [1, 1 << 32]},
        {"uid": None, "gid": None, "groups": [None, 1.5]},
        {"uid": None, "gid": None, "groups": 7},
        {"uid": None},
        [],
    ],
)
def test_an_identity_that_is_none_is_not_taken(plain: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Identity.from_plain(plain)


@pytest.mark.parametrize("found", [Identity(), Identity(1, 2, ()), Identity(0, 0, (5, 6)), Identity(None, 7, (8,))])
def test_an_identity_goes_over_to_another_process(found: Identity) -> None:
    assert Identity.from_plain(found.to_plain()) == found


def test_whether_there_is_a_capability_is_asked_of_the_kernel() -> None:
    needs_root()
    assert has_capability(Capability.SETUID)
    assert not as_a_stranger(lambda: has_capability(Capability.SETUID))


def test_upgraded_master_knows_its_workers_user_by_number() -> None:
    """Until the reload that follows an upgrade, a worker that dies is replaced by what was handed over."""
    settings = wanting(user="a-name-that-no-user-has-by-now")
    bound = bind_listener(settings.listen[0])
    board = Scoreboard(2)
    generation = Generation(3, settings, [bound], -1, Identity(1, 2, (3, 4)))
    place = LaunchContext("/", detached=False, lock=-1)
    handed = MasterSnapshot(place, generation, 1, 0.0, -1, board, [], {}, [], []).write()
    for sock in bound.sockets:
        sock.detach()
    found = MasterSnapshot.read(handed)
    for descriptor in (handed, *found.descriptors()):
        os.close(descriptor)
    for sock in found.generation.bound[0].sockets:
        sock.detach()
    assert found.generation.identity == Identity(1, 2, (3, 4))


def test_environment_is_that_of_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", lambda path: os.lstat("/proc/self/nothing"))
    identity = Identity(7, 8, (), ("carol", "/home/carol", "/bin/zsh"))
    found = identity.environment()
    assert [found[one] for one in ("HOME", "USER", "LOGNAME", "SHELL")] == ["/home/carol", "carol", "carol", "/bin/zsh"]
    assert found["XDG_RUNTIME_DIR"] is None
    assert found["SSH_AUTH_SOCK"] is None
    assert Identity.from_plain(identity.to_plain()) == identity


def test_environment_of_the_own_user_stays() -> None:
    assert Identity(os.geteuid(), 0, ()).environment() == {}
    with pytest.raises(ValueError, match="is no identity"):
        Identity.from_plain({**Identity().to_plain(), "account": ["carol", 1, "/bin/sh"]})
