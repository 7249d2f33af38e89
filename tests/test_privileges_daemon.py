"""A daemon of root's whose workers are nobody, seen from outside; and daemons that can't have such workers."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from clients import echoes
from harness import Harness, forkd
from needs import lacks, needs_program
from nobody import GROUP, NOBODY, daemon_of, harnesses, limit_of, lives, places, status_of, tell
from processes import alive, eventually

__all__ = ["harnesses", "places"]  # the fixtures


def test_workers_are_nobody_and_the_master_stays_root(open_harness: Harness) -> None:
    daemon = daemon_of(open_harness, "umask=0037").start()
    for pid in daemon.workers().values():
        found = status_of(pid)
        assert found["Uid"].split() == [str(NOBODY)] * 4
        assert found["Gid"].split() == [str(GROUP)] * 4
        assert found["Groups"] == ""
        assert {found[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (found["NoNewPrivs"], found["Umask"]) == ("1", "0037")
    master = status_of(daemon.pid)
    assert master["Uid"].split() == ["0"] * 4
    assert int(master["CapEff"], 16)
    assert tell(open_harness, daemon, "become_root")["error"] == "PermissionError"


def test_a_worker_has_no_descriptor_but_what_it_needs(open_harness: Harness, place: Path) -> None:
    surplus = (place / "secret").open("w")
    os.set_inheritable(surplus.fileno(), True)
    command = [sys.executable, "-m", "forkd", "start", *map(str, [*daemon_of(open_harness).target])]
    daemon = open_harness.daemons[-1]
    options = list(map(str, [*daemon.identity, *daemon.options]))
    subprocess.run(
        [*command, *options], cwd=place, pass_fds=[surplus.fileno()], check=True, capture_output=True, timeout=60
    )
    surplus.close()
    for pid in daemon.workers().values():
        links = sorted(os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
        kinds = [re.sub(r":\[\d+\]$", "", link) for link in links]
        # Standard output and error, and where stacks are written; listener, channel, and asyncio's own pair to wake
        # itself; a client of ours there is none; the regions, to read those of others.
        wanted = ["/dev/null", str(daemon.log), "anon_inode:[eventpoll]", *["pipe"] * 3, *["socket"] * 4]
        wanted.append("/memfd:forkd-regions (deleted)")
        assert kinds == sorted(wanted)


def test_a_worker_that_is_nobody_still_hears_of_its_masters_death(open_harness: Harness) -> None:
    """The kernel forgets that it should tell, when a process becomes another user's."""
    daemon = daemon_of(open_harness).start()
    assert tell(open_harness, daemon, "parent_death_signal")["value"] == signal.SIGTERM


@pytest.mark.parametrize("preload", ["false", "true"])
def test_workers_of_a_restarted_daemon_have_nothing_of_its_listeners_that_went(
    open_harness: Harness, preload: str
) -> None:
    kept, gone = f"unix:{open_harness.directory}/kept", f"unix:{open_harness.directory}/gone"
    daemon = daemon_of(open_harness, f"preload={preload}", workers=1, listen=(kept, gone)).start()
    (before,) = daemon.workers().values()
    many = len(list(Path(f"/proc/{before}/fd").iterdir()))
    daemon.options = [one for one in daemon.options if one != f"--listen={gone}"]
    result = daemon.command("restart")
    assert result.returncode == 0, result.stderr
    (after,) = daemon.workers().values()
    assert len(list(Path(f"/proc/{after}/fd").iterdir())) == many - 1


def test_what_forkd_run_inherits_is_not_the_workers(open_harness: Harness, place: Path) -> None:
    daemon = daemon_of(open_harness, workers=1)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    daemon.run(pass_fds=[writer])
    pipe = os.readlink(f"/proc/self/fd/{writer}")
    os.close(writer)
    os.close(reader)
    assert pipe in {os.readlink(entry) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()}
    (pid,) = daemon.workers().values()
    assert pipe not in {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def test_nobody_who_is_not_root_may_ask_the_control_socket_whatever_its_mode(open_harness: Harness) -> None:
    daemon = daemon_of(open_harness).start()
    control = daemon.run_directory / "control.sock"
    master, workers = daemon.pid, daemon.workers()
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    assert tell(open_harness, daemon, "ask", str(control))["error"] == "PermissionError"
    control.chmod(0o666)
    assert tell(open_harness, daemon, "ask", str(control))["value"] in ("", "BrokenPipeError", "ConnectionResetError")
    daemon.wait_log(f"refused user {NOBODY} on the control socket")
    lives(daemon, master, workers)


def test_limits_are_those_of_the_settings_and_a_reload_changes_them(open_harness: Harness, place: Path) -> None:
    path = place / "d.yaml"
    text = "listen: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\nworkers: 1\n"
    path.write_text(f"{text}user: {NOBODY}\ngroup: {GROUP}\nrlimits: {{nofile: 500, core: 0}}\numask: 0077\n")
    daemon = open_harness.daemon(target=path, listen=(), workers=None).start()
    (first,) = daemon.workers().values()
    assert limit_of(first, "Max open files") == ["500", "500"]
    assert limit_of(first, "Max core file size") == ["0", "0"]
    path.write_text(f"{text}user: 1234\ngroup: {GROUP}\ngroups: [77]\nrlimits: {{nofile: 600}}\nno_new_privs: false\n")
    result = daemon.command("reload")
    assert result.returncode == 0, result.stderr
    (second,) = daemon.workers().values()
    found = status_of(second)
    assert limit_of(second, "Max open files") == ["600", "600"]
    assert (found["Uid"].split()[0], found["Groups"], found["NoNewPrivs"]) == ("1234", "77", "0")
    eventually(lambda: not alive(first), what="the end of the first generation")
    path.write_text(f"{text}user: nobdy\n")
    result = daemon.command("reload")
    assert result.returncode == 1
    assert f"{path}:3:7: user: there is no user 'nobdy' on this machine" in result.stderr
    assert daemon.workers() == {1: second}
    daemon.expect("reload: failed, and nothing has changed")


def test_a_low_hard_limit_of_descriptors_is_told_once(open_harness: Harness, place: Path) -> None:
    daemon = daemon_of(open_harness, "rlimits.nofile=unlimited", workers=3)
    options = list(map(str, [*daemon.target, *daemon.identity, *daemon.options]))
    limited = ["prlimit", "--nofile=200:400", "setpriv", "--bounding-set", "-sys_resource"]
    command = [*limited, sys.executable, "-m", "forkd", "start", *options]
    subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=60)
    told = [record for record in daemon.records() if "rlimits.nofile: wanted " in record]
    assert len(told) == 1
    assert ", there is 400" in told[0]
    for pid in daemon.workers().values():
        assert limit_of(pid, "Max open files") == ["400", "400"]


def free_low_port() -> int:
    for port in range(901, 1000):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    return lacks("a free port below 1024")


def test_a_reload_binds_low_ports_and_the_log_is_opened_anew(open_harness: Harness, place: Path) -> None:
    path, port = place / "d.yaml", free_low_port()
    listener = "  - {address: 'tcp://127.0.0.1:%d', handler: 'forkd.builtin:Echo'}\n"
    rest = f"user: {NOBODY}\ngroup: {GROUP}\nworkers: 2\n"
    path.write_text(f"{rest}listen:\n{listener % 0}")
    daemon = open_harness.daemon(target=path, listen=(), workers=None).start()
    path.write_text(f"{rest}listen:\n{listener % 0}{listener % port}")
    result = daemon.command("reload")
    assert result.returncode == 0, result.stderr
    daemon.status()
    assert echoes(open_harness.connect(f"tcp://127.0.0.1:{port}"))
    daemon.log.rename(place / "old.log")
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log("opened .* anew")
    os.kill(daemon.workers()[1], signal.SIGKILL)  # the master may, and a new worker is nobody too
    daemon.expect("worker 1 .* killed by SIGKILL")
    eventually(lambda: len(daemon.workers()) == 2, what="another worker")
    assert {status_of(pid)["Uid"].split()[0] for pid in daemon.workers().values()} == {str(NOBODY)}


def test_an_upgrade_keeps_the_workers_nobody(open_harness: Harness) -> None:
    daemon = daemon_of(open_harness).start()
    before = daemon.workers()
    result = daemon.command("upgrade")
    assert result.returncode == 0, result.stderr
    after = daemon.workers()
    assert not set(before.values()) & set(after.values())
    assert {status_of(pid)["Uid"].split()[0] for pid in after.values()} == {str(NOBODY)}


# What can't be


@pytest.mark.parametrize("call", ["setresuid", "setresgid", "setgroups"])
@pytest.mark.parametrize("fault", ["error=EPERM", "retval=0"])
def test_a_worker_that_cannot_drop_never_serves(open_harness: Harness, place: Path, call: str, fault: str) -> None:
    """`retval=0` has the call claim that it was done."""
    needs_program("strace")
    daemon = daemon_of(open_harness, "groups=[77]", workers=1)
    options = list(map(str, [*daemon.target, *daemon.identity, *daemon.options]))
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "forkd", "start", *options],
        cwd=place, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert "can't drop privileges: " in result.stderr
    assert (f"{call}(" in result.stderr) == ("error" in fault)
    daemon.expect("could not boot: can't drop privileges")


@pytest.mark.parametrize("lost", ["setuid", "setgid", "kill"])
def test_a_root_without_the_capability_is_refused_at_the_start(place: Path, lost: str) -> None:
    command = ["setpriv", "--bounding-set", f"-{lost}", sys.executable, "-m", "forkd", "start", "--set", "user=nobody"]
    result = subprocess.run(
        [*command, "--run-directory", place / "run"], cwd=place, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 78
    assert "user: the daemon can't " in result.stderr
    assert f"it is root, but without CAP_{lost.upper()}" in result.stderr
    assert not (place / "run").exists()


def test_check_imports_handlers_as_the_workers_user(place: Path) -> None:
    (place / "mine.py").write_text("import os\nassert os.getuid() == 65534\nfrom forkd.builtin import Echo\n")
    options = ["--listen", "tcp://127.0.0.1:0", "--set", f"python_path=[{place}]", "--set", f"group={GROUP}"]
    assert forkd("check", "mine:Echo", *options, "--set", f"user={NOBODY}", cwd=place).returncode == 0
    result = forkd("check", "mine:Echo", *options, cwd=place)
    assert result.returncode == 78
    assert "AssertionError" in result.stderr
    (place / "mine.py").chmod(0o600)
    shut = place / "shut"
    shut.mkdir(0o700)
    options[3] = f"python_path=[{shut}]"
    result = forkd("check", "mine:Echo", *options, "--set", f"user={NOBODY}", cwd=place)
    assert f"the workers' user {NOBODY} can't read {shut}" in result.stderr


@pytest.mark.parametrize("what", ["pid file", "log", "socket", "control socket"])
def test_a_link_in_the_place_of_a_file_of_ours_is_refused(place: Path, what: str) -> None:
    precious = place / "precious"
    precious.write_text("precious")
    run = place / "run"
    run.mkdir()
    paths = {
        "pid file": run / "pid",
        "log": place / "x.log",
        "socket": place / "s",
        "control socket": run / "control.sock",
    }
    paths[what].symlink_to(precious)
    options = ["--run-directory", run, "--set", f"log.to={paths['log']}", "--listen", f"unix:{paths['socket']}"]
    result = forkd("start", *options, cwd=place)
    assert result.returncode == 1
    assert str(paths[what]) in result.stderr
    assert "it is a symbolic link; " in result.stderr
    assert precious.read_text() == "precious"
    assert paths[what].is_symlink()


def test_a_chroot_holds_workers_whose_handlers_were_loaded_before(open_harness: Harness, place: Path) -> None:
    jail = place / "jail"
    jail.mkdir()
    daemon = daemon_of(open_harness, "preload=true", f"chroot={jail}").start()
    for pid in daemon.workers().values():
        assert os.readlink(f"/proc/{pid}/root") == str(jail)
    assert tell(open_harness, daemon, "load", "json") == {"value": "json"}
    assert tell(open_harness, daemon, "load", "wave")["error"] == "ModuleNotFoundError"
    result = forkd("check", "forkd.builtin:Echo", "--listen=tcp://127.0.0.1:0", "--set", f"chroot={jail}", cwd=place)
    assert "(Python's own modules) is not there in chroot" in result.stderr
