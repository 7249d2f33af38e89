"""How many workers a control group's quota leaves: the files of either version as kernels and containers show them, and
a daemon in a real group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from forkd.system import cgroups
from forkd.system.cgroups import cpu_quota, group_directories, parse_quota, processors
from tests.support.daemon import Harness
from tests.support.needs import control_group, lacks

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
"""
V1_GROUPS = "5:cpuset:/\n4:cpu,cpuacct:/system.slice/chat.service\n1:name=systemd:/system.slice/chat.service\n0::/x\n"
V1_CONTAINER = "32 31 0:29 /docker/4f0c /sys/fs/cgroup/cpu ro master:11 - cgroup cgroup rw,cpu,cpuacct\n"
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V2_SPACE = "30 23 0:26 / /my\\040groups rw - cgroup2 none rw\n"


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("max 100000\n", None),
        ("50000 100000\n", Fraction(1, 2)),
        ("150000 100000\n", Fraction(3, 2)),
        ("10000 20000\n", Fraction(1, 2)),
        ("-1\n 100000\n", None),
        ("200000\n 100000\n", 2),
        ("0 100000", None),
        ("100000 0", None),
        ("100000", None),
        ("", None),
        ("many 100000", None),
    ],
)
def test_quota_is_read_from_either_version_of_the_files(text: str, quota: Fraction | None) -> None:
    assert parse_quota(text) == quota


@pytest.mark.parametrize(
    ("groups", "mounts", "directories"),
    [
        (
            V1_GROUPS,
            V1_MOUNTS,
            [
                "/sys/fs/cgroup/cpu,cpuacct/system.slice/chat.service",
                "/sys/fs/cgroup/cpu,cpuacct/system.slice",
                "/sys/fs/cgroup/cpu,cpuacct",
            ],
        ),
        ("4:cpu,cpuacct:/docker/4f0c\n", V1_CONTAINER, ["/sys/fs/cgroup/cpu"]),
        ("4:cpu,cpuacct:/docker/4f0c/a\n", V1_CONTAINER, ["/sys/fs/cgroup/cpu/a", "/sys/fs/cgroup/cpu"]),
        ("4:cpu,cpuacct:/\n", V1_CONTAINER, ["/sys/fs/cgroup/cpu"]),
        ("0::/a.slice/b.service\n", V2_MOUNTS, ["/sys/fs/cgroup/" + at for at in ("a.slice/b.service", "a.slice", "")]),
        ("0::/\n", V2_MOUNTS, ["/sys/fs/cgroup"]),
        ("0::/../other\n", V2_MOUNTS, ["/sys/fs/cgroup"]),
        ("0::/a:b\n", V2_SPACE, ["/my groups/a:b", "/my groups"]),
        ("3:memory:/x\n", V1_MOUNTS, []),
        ("", "", []),
    ],
)
def test_quota_is_looked_for_in_the_group_and_above(groups: str, mounts: str, directories: list[str]) -> None:
    assert [str(where) for _, where in group_directories(groups, mounts)] == [one.rstrip("/") for one in directories]


def test_quota_is_the_least_of_all_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "groups/outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    (tmp_path / "mountinfo").write_text(f"30 23 0:26 / {tmp_path}/groups rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(cgroups, "_PROC", tmp_path)
    assert cpu_quota() is None  # as in the topmost group
    for text, quota, count in (("max 100000", None, 64), ("250000 100000", 2.5, 3), ("6400000 100000", 3.0, 3)):
        (inner / "cpu.max").write_text(text)
        (inner.parent / "cpu.max").write_text("max 100000" if quota != 3 else "300000 100000")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
        assert (cpu_quota(), processors()) == (quota, count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert processors() == 1
    (inner / "cpu.max").write_text("1000 100000")
    assert processors() == 1


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with half a processor."""
    with control_group("cpu") as found:
        (found / "cpu.cfs_quota_us").write_text("50000")
        yield found


def test_auto_workers_of_a_group_with_half_a_processor(harness: Harness, group: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        lacks("two processors")
    inner = group / "inner"
    inner.mkdir()
    daemon = harness.daemon(workers=None)
    daemon.prefix = ["sh", "-c", f'echo $$ >{inner}/cgroup.procs; exec "$@"', "sh"]
    daemon.run()
    assert daemon.status()["wanted"] == 1
    daemon.stop()
    inner.rmdir()
