"""The drop, in children that become somebody: each step, what is verified after it, and what it says when it fails."""

from __future__ import annotations

import grp
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import ChildFailed, in_child
from needs import needs_root

from forkd.config.address import parse_address
from forkd.config.options import Listener, Log, Rlimits, Settings
from forkd.errors import ForkdError
from forkd.system import capabilities, privileges
from forkd.system.capabilities import Capability, has_capability
from forkd.system.identity import Identity, find_identity, look_up
from forkd.system.privileges import drop_privileges

NOBODY = 65534
STRANGER = 54321  # a number that no user has


def wanting(**more: Any) -> Settings:
    listener = Listener(address=parse_address("tcp://127.0.0.1:0"), handler="forkd.builtin:Echo")
    return Settings(listen=(listener,), **more)


def dropped(look: Callable[[], Any], **more: Any) -> Any:
    """What a process sees once it is a worker's by these settings."""
    settings = wanting(**more)

    def become() -> Any:
        drop_privileges(settings, find_identity(settings))
        return look()

    return in_child(become)


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


@pytest.fixture
def _root() -> None:
    needs_root()


# Who it becomes


@pytest.mark.usefixtures("_root")
def test_a_worker_is_its_user_with_no_group_and_no_capability_left() -> None:
    found = dropped(status, user=str(NOBODY), group="1234")
    assert found["Uid"].split() == [str(NOBODY)] * 4
    assert found["Gid"].split() == ["1234"] * 4
    assert found["Groups"] == ""
    assert {found[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1"


@pytest.mark.usefixtures("_root")
def test_supplementary_groups_are_those_that_were_asked_for() -> None:
    assert dropped(os.getgroups, user=str(NOBODY), group="1234", groups=("77", "78", "77")) == [77, 78]
    assert dropped(os.getgroups, groups=("77",)) == [77]


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize("attempt", ["setuid", "setgid", "setgroups", "chown", "chroot"])
def test_nothing_leads_back(attempt: str, tmp_path: Path) -> None:
    deeds: dict[str, Callable[[], object]] = {
        "setuid": lambda: os.setuid(0),
        "setgid": lambda: os.setgid(0),
        "setgroups": lambda: os.setgroups([0]),
        "chown": lambda: os.chown("/tmp", 0, 0),
        "chroot": lambda: os.chroot("/"),
    }
    with pytest.raises(ChildFailed, match="PermissionError"):
        dropped(deeds[attempt], user=str(NOBODY), group="1234")


@pytest.mark.usefixtures("_root")
def test_capabilities_that_the_starter_had_left_to_programs_are_gone_too() -> None:
    """Inheritable and ambient ones outlive setresuid(2), as a service manager may have set them."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_privileges import dropped, status\n"
        "before = status()\n"
        "after = dropped(status, user='65534', group='1234')\n"
        "print(before['CapInh'], before['CapAmb'], *(after[f'Cap{n}'] for n in ('Inh', 'Prm', 'Eff', 'Bnd', 'Amb')))\n"
    )
    command = ["setpriv", "--inh-caps", "+kill", "--ambient-caps", "+kill", sys.executable, "-c", program]
    result = subprocess.run([*command, *sys.path], capture_output=True, text=True, check=True, timeout=60)
    inheritable, ambient, *after = result.stdout.split()
    assert int(inheritable, 16) & int(ambient, 16) & 1 << Capability.KILL
    assert after == ["0" * 16] * 5


@pytest.mark.usefixtures("_root")
def test_who_asks_for_root_gets_root_and_keeps_what_root_has() -> None:
    found = dropped(status, user="root")
    assert found["Uid"].split() == ["0"] * 4
    assert int(found["CapEff"], 16)
    assert found["NoNewPrivs"] == "1"


def test_without_these_settings_a_worker_is_as_it_was_started() -> None:
    before = status()
    after = dropped(status)
    same = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Umask")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_no_new_privs_goes_by_its_own_setting() -> None:
    assert dropped(status, no_new_privs=True)["NoNewPrivs"] == "1"
    needs_root()
    assert dropped(status, user=str(NOBODY), group="1", no_new_privs=False)["NoNewPrivs"] == "0"


def test_the_umask_is_the_workers_own() -> None:
    assert dropped(status, umask=0o137)["Umask"] == "0137"


@pytest.mark.usefixtures("_root")
def test_a_worker_dumps_core_for_other_eyes_only_where_that_is_asked_for() -> None:
    def dumpable() -> int:
        return capabilities.prctl(3)  # PR_GET_DUMPABLE

    assert dropped(dumpable, user=str(NOBODY), group="1") in (0, 2)
    assert dropped(dumpable, user=str(NOBODY), group="1", rlimits=Rlimits(core=1 << 20)) == 1
    assert dropped(dumpable, user=str(NOBODY), group="1", rlimits=Rlimits(core=0)) in (0, 2)


@pytest.mark.usefixtures("_root")
def test_a_chroot_is_the_root_and_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    tmp_path.chmod(0o755)
    found = dropped(
        lambda: [os.listdir("/"), os.getcwd(), Path("/proc").exists()], chroot=tmp_path, user=str(NOBODY), group="1"
    )
    assert found == [["inside"], "/", False]


# What goes wrong


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (os, "chroot", "chroot(/tmp)"),
        (privileges, "drop_bounding_set", "prctl(PR_CAPBSET_DROP)"),
        (privileges, "clear_ambient_set", "prctl(PR_CAP_AMBIENT)"),
        (os, "setgroups", "setgroups([7])"),
        (os, "setresgid", "setresgid(1234)"),
        (os, "setresuid", f"setresuid({NOBODY})"),
        (privileges, "drop_capabilities", "capset"),
        (os, "umask", "umask(0027)"),
        (privileges, "set_limits", "rlimits"),
    ],
)
def test_a_step_that_fails_ends_it_and_is_named(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, said: str
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(ChildFailed) as caught:
        dropped(status, user=str(NOBODY), group="1234", groups=("7",), umask=0o027, chroot=Path("/tmp"))
    assert str(caught.value) == f"PrivilegeError: can't drop privileges: {said}: Operation not permitted"


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (os, "setgroups", "its supplementary groups are ["),
        (os, "setresgid", "its group ids are (0, 0, 0)"),
        (os, "setresuid", "its user ids are (0, 0, 0)"),
        (privileges, "drop_bounding_set", "it has capabilities: CapBnd "),
        (privileges, "_prctl", "programs that it starts may gain privileges"),
        (privileges, "_umask", "its umask is 00"),
    ],
)
def test_a_step_that_says_it_is_done_and_is_not_is_noticed(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, said: str
) -> None:
    monkeypatch.setattr(module, name, lambda *arguments: None)
    with pytest.raises(ChildFailed, match=re.escape(f"all is done, but {said}")):
        dropped(status, user=str(NOBODY), group="1234", groups=("7",), umask=0o137)


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize("kept", ["capset is skipped", "a saved user id is left"])
def test_a_way_back_to_root_is_noticed(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    really = os.setresuid
    if kept == "capset is skipped":
        monkeypatch.setattr(privileges, "drop_capabilities", lambda: None)
        monkeypatch.setattr(os, "setresuid", lambda *ids: (capabilities.prctl(8, 1), really(*ids)))  # PR_SET_KEEPCAPS
        said = "it has capabilities: CapPrm"
    else:
        monkeypatch.setattr(os, "setresuid", lambda real, effective, saved: really(real, effective, 0))
        said = "its user ids are "
    with pytest.raises(ChildFailed, match=f"all is done, but {said}"):
        dropped(status, user=str(NOBODY), group="1234")


# Who is meant


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
