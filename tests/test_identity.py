"""Who the workers are to be: names looked up, what is not there or not allowed named with its setting."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import ChildFailed, in_child
from needs import needs_python_for_all, needs_root
from test_privileges import NOBODY, status, wanting

from forkd.config.options import Log
from forkd.errors import ForkdError
from forkd.master.generation import Generation
from forkd.master.heritage import Heritage, Place
from forkd.system.capabilities import Capability, has_capability
from forkd.system.identity import Identity, find_identity, look_up
from forkd.system.privileges import drop_privileges
from forkd.system.scoreboard import Scoreboard
from forkd.system.sockets import bind_listener

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
def test_who_is_not_there_is_named_with_the_setting(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ForkdError) as caught:
        find_identity(wanting(**more))
    assert str(caught.value).splitlines()[0] == said


def test_all_mistakes_are_told_at_once() -> None:
    assert [key for key, _ in look_up(wanting(user="nobdy", group="nogrup", groups=("x",)))[1]] == [
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

    return in_child(become)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"user": str(NOBODY), "group": "1"}, f"user: the daemon can't become {NOBODY}: it is user {STRANGER}; start"),
        ({"user": str(STRANGER), "group": "1"}, f"group: the daemon can't take the group 1: it is user {STRANGER}; "),
        ({"group": str(STRANGER), "groups": ("5",)}, f"groups: the daemon can't set groups: it is user {STRANGER}; "),
        ({"chroot": Path("/")}, f"chroot: the daemon can't change its root directory: it is user {STRANGER}; start"),
    ],
)
def test_who_is_not_root_may_not_ask_for_another(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ChildFailed, match="ForkdError: " + re.escape(said)):
        as_a_stranger(lambda: find_identity(wanting(**more)))


def test_who_is_the_user_already_may_say_so_and_keeps_its_groups() -> None:
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
        Identity.of(plain)


@pytest.mark.parametrize("found", [Identity(), Identity(1, 2, ()), Identity(0, 0, (5, 6)), Identity(None, 7, (8,))])
def test_an_identity_goes_over_to_another_process(found: Identity) -> None:
    assert Identity.of(found.plain()) == found


def test_whether_there_is_a_capability_is_asked_of_the_kernel() -> None:
    needs_root()
    assert has_capability(Capability.SETUID)
    assert not as_a_stranger(lambda: has_capability(Capability.SETUID))


# Where the log is


@pytest.mark.parametrize(
    ("owner", "mode", "wrong"),
    [
        ((0, 0), 0o755, False),
        ((0, 1234), 0o775, True),
        ((0, 4321), 0o775, False),
        ((NOBODY, 0), 0o500, True),
        ((0, 0), 0o777, True),
        ((0, 0), 0o1777, False),
    ],
)
def test_a_log_that_the_workers_could_put_elsewhere_is_refused(
    tmp_path: Path, owner: tuple[int, int], mode: int, wrong: bool
) -> None:
    needs_root()
    directory = tmp_path / "log"
    directory.mkdir()
    os.chown(directory, *owner)
    directory.chmod(mode)
    settings = wanting(user=str(NOBODY), group="1234", log=Log(to=directory / "x.log"))
    assert [key for key, _ in look_up(settings)[1]] == ["log.to"] * wrong
    assert look_up(wanting(log=Log(to=directory / "x.log")))[1] == []


def test_a_log_file_that_is_the_workers_is_refused(tmp_path: Path) -> None:
    needs_root()
    path = tmp_path / "x.log"
    path.touch()
    os.chown(path, NOBODY, 0)
    assert look_up(wanting(user=str(NOBODY), group="1", log=Log(to=path)))[1] == [
        ("log.to", f"the file may be written by {NOBODY}, as which a worker could redirect the log")
    ]


def test_another_image_of_the_master_knows_by_number_who_its_workers_are() -> None:
    """Until the reload that follows an upgrade, a worker that dies is replaced by what was handed over."""
    settings = wanting(user="a-name-that-nobody-has-by-now")
    bound = bind_listener(settings.listen[0])
    board = Scoreboard(2)
    generation = Generation(3, settings, [bound], -1, Identity(1, 2, (3, 4)))
    place = Place("/", detached=False, lock=-1)
    handed = Heritage(place, generation, 1, 0.0, -1, board, [], {}, [], []).write()
    for sock in bound.sockets:
        sock.detach()
    found = Heritage.read(handed)
    for descriptor in (handed, *found.descriptors()):
        os.close(descriptor)
    for sock in found.generation.bound[0].sockets:
        sock.detach()
    assert found.generation.identity == Identity(1, 2, (3, 4))
