"""Whether the kernel's out-of-memory killer has struck: where the count stands, by each version of control groups and
inside a container, and that a machine which does not count is no trouble.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from forkd.system import cgroups
from forkd.system.cgroups import oom_kills

V2 = "low 0\nhigh 3\nmax 40\noom 5\noom_kill {}\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
V1_GROUPS = "12:cpu,cpuacct:/docker/ab\n7:cpuset,memory:/docker/ab\n1:name=systemd:/docker/ab\n"


class Machine:
    """A made-up /sys/fs/cgroup, and the groups of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def groups(self, text: str) -> None:
        (self.path / "groups").write_text(text)

    def file(self, name: str, text: str) -> None:
        path = self.path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(cgroups, "CGROUP_ROOT", tmp_path / "sys")
    monkeypatch.setattr(cgroups, "PROC_CGROUP", tmp_path / "groups")
    return Machine(tmp_path)


def test_the_count_of_version_2_is_that_of_this_processs_group(machine: Machine) -> None:
    machine.groups("0::/system.slice/chat.service\n")
    machine.file("memory.events", V2.format(99))
    machine.file("system.slice/chat.service/memory.events", V2.format(2))
    assert oom_kills() == 2
    machine.file("system.slice/chat.service/memory.events", V2.format(3))
    assert oom_kills() == 3


def test_container_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.groups("0::/\n")
    machine.file("memory.events", V2.format(4))
    assert oom_kills() == 4


def test_group_name_from_outside_the_container_is_the_root(machine: Machine) -> None:
    machine.groups("0::/../../docker/ab\n")
    machine.file("memory.events", V2.format(5))
    assert oom_kills() == 5


@pytest.mark.parametrize("place", ["memory/docker/ab", "memory"])
def test_the_count_of_version_1_is_that_of_the_memory_controller(machine: Machine, place: str) -> None:
    machine.groups(V1_GROUPS)
    machine.file("cpu,cpuacct/docker/ab/memory.oom_control", V1.format(99))
    machine.file(f"{place}/memory.oom_control", V1.format(6))
    assert oom_kills() == 6


def test_version_that_has_the_memory_controller_counts(machine: Machine) -> None:
    machine.groups(V1_GROUPS + "0::/docker/ab\n")
    machine.file("memory/docker/ab/memory.oom_control", V1.format(7))
    assert oom_kills() == 7


@pytest.mark.parametrize(
    "text",
    ["", "oom_kill_disable 0\nunder_oom 0\n", "oom_kill many\n", "oom_kill\n", "oom_kill 1 2\n", "\n\n"],
    ids=["nothing", "an old kernel", "no number", "no value", "two values", "empty lines"],
)
def test_a_file_without_the_count_is_passed_over(machine: Machine, text: str) -> None:
    machine.groups(V1_GROUPS)
    machine.file("memory/docker/ab/memory.oom_control", text)
    assert oom_kills() is None
    machine.file("memory/memory.oom_control", V1.format(8))
    assert oom_kills() == 8


@pytest.mark.parametrize("groups", [None, "", "0::/gone\n", "4:memory:/gone\n", "3:cpu:/\n", "1:name=memory:/\n"])
def test_count_is_none_where_nothing_is_counted(machine: Machine, groups: str | None) -> None:
    if groups is not None:
        machine.groups(groups)
    assert oom_kills() is None


@pytest.mark.parametrize("groups", ["3:cpu:/a\n", "1:name=memory:/a\n", "2:cpu,hugememory:/a\n"])
def test_another_controllers_group_says_nothing_of_memory(machine: Machine, groups: str) -> None:
    machine.groups(groups)
    machine.file("memory/a/memory.oom_control", V1.format(9))
    assert oom_kills() is None


def test_this_machine_says_a_number_or_nothing() -> None:
    found = oom_kills()
    assert found is None or found >= 0
