"""Privileges dropped, in children that become another user: each step, its verification, and what a failure says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Rlimits, Settings
from forkd.system import libc, privileges
from forkd.system.capabilities import Capability
from forkd.system.identity import find_identity
from forkd.system.privileges import drop_privileges
from tests.support.forked import ChildFailed, run_in_child
from tests.support.needs import needs_root

NOBODY = 65534


def wanting(**more: Any) -> Settings:
    listener = Listener(address=parse_address("tcp://127.0.0.1:0"), handler="forkd.builtin:Echo")
    return Settings(listen=(listener,), **more)


def dropped(look: Callable[[], Any], **more: Any) -> Any:
    """What a process sees once it is a worker's by these settings."""
    settings = wanting(**more)

    def become() -> Any:
        drop_privileges(settings, find_identity(settings))
        return look()

    return run_in_child(become)


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


@pytest.fixture
def _root() -> None:
    needs_root()


# User and groups


@pytest.mark.usefixtures("_root")
def test_worker_is_its_user_without_groups_or_capabilities() -> None:
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
def test_ambient_and_inheritable_capabilities_are_gone() -> None:
    """Inheritable and ambient ones outlive setresuid(2), as a service manager may have set them."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tests.system.test_privileges import dropped, status\n"
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
def test_root_as_the_user_keeps_what_root_has() -> None:
    found = dropped(status, user="root")
    assert found["Uid"].split() == ["0"] * 4
    assert int(found["CapEff"], 16)
    assert found["NoNewPrivs"] == "1"


def test_worker_without_these_settings_is_as_it_was_started() -> None:
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
def test_worker_dumps_core_only_where_that_is_set() -> None:
    def dumpable() -> int:
        return libc.prctl(3)  # PR_GET_DUMPABLE

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
        monkeypatch.setattr(os, "setresuid", lambda *ids: (libc.prctl(8, 1), really(*ids)))  # PR_SET_KEEPCAPS
        said = "it has capabilities: CapPrm"
    else:
        monkeypatch.setattr(os, "setresuid", lambda real, effective, saved: really(real, effective, 0))
        said = "its user ids are "
    with pytest.raises(ChildFailed, match=f"all is done, but {said}"):
        dropped(status, user=str(NOBODY), group="1234")
