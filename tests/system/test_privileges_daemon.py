"""A daemon of root's whose workers have another user, seen from outside; and daemons that can't have such workers."""

from __future__ import annotations

import os
import pwd
import random
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clients import echoes, read
from tests.support.daemon import Harness, forkd
from tests.support.needs import lacks, needs_program
from tests.support.paths import HANDLERS
from tests.support.processes import alive, eventually, links_of
from tests.support.unprivileged import (
    AS_NOBODY,
    GROUP,
    NOBODY,
    check_unchanged,
    limit_of,
    order_worker,
    status_of,
    unprivileged_daemon,
)


def test_workers_run_as_the_set_user_and_the_master_as_root(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness, "umask=0037").start()
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
    assert order_worker(open_harness, daemon, "become_root")["error"] == "PermissionError"


@pytest.mark.parametrize("directory", ["", ", directory: /"])
def test_program_is_its_workers_user_and_no_more(open_harness: Harness, open_directory: Path, directory: str) -> None:
    file = open_directory / "tested.yaml"
    items = (
        f"{{address: 'tcp://127.0.0.1:0', command: [cat, /proc/self/{one}]{directory}}}" for one in ("status", "limits")
    )
    file.write_text(f"name: tested\nlisten: [{', '.join(items)}]\n")
    settings = (*AS_NOBODY, "rlimits.nofile=333", "umask=0037")
    daemon = open_harness.daemon(target=file, listen=(), workers=1, settings=settings)
    status, limits = (str(one["address"]) for one in daemon.start().status()["listeners"])
    with open_harness.connect(status) as client:
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    found = {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in text.splitlines())}
    assert (found["Uid"].split(), found["Gid"].split()) == ([str(NOBODY)] * 4, [str(GROUP)] * 4)
    assert (found["Groups"], found["NoNewPrivs"], found["Umask"]) == ("", "1", "0037")
    assert {found[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    with open_harness.connect(limits) as client:
        assert b"Max open files            333 " in b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize("user", ["nobody", "54321"])
def test_worker_has_the_environment_of_its_user(open_harness: Harness, open_directory: Path, user: str) -> None:
    (open_directory / "environment.py").write_text((HANDLERS / "environment.py").read_text())
    daemon = open_harness.daemon(
        target="environment:tell",
        workers=1,
        settings=(f"user={user}", f"group={NOBODY}", f"python_path=[{open_directory}]"),
        environment={"HOME": "/root", "USER": "root", "LOGNAME": "root", "XDG_RUNTIME_DIR": "/run/user/0"},
    ).run()
    home, name = (pwd.getpwnam(user).pw_dir, user) if user == "nobody" else ("/", user)
    for variable, value in (("HOME", home), ("USER", name), ("LOGNAME", name), ("XDG_RUNTIME_DIR", "-")):
        with open_harness.connect(daemon) as client:
            client.sendall(f"{variable}\n".encode())
            assert read(client, 100).decode() == f"{value}\n"


def test_a_worker_has_no_descriptor_but_what_it_needs(open_harness: Harness, open_directory: Path) -> None:
    surplus = (open_directory / "secret").open("w")
    os.set_inheritable(surplus.fileno(), True)
    command = [sys.executable, "-m", "forkd", "start", *map(str, [*unprivileged_daemon(open_harness).target])]
    daemon = open_harness.daemons[-1]
    options = list(map(str, [*daemon.identity, *daemon.options]))
    subprocess.run(
        [*command, *options],
        cwd=open_directory,
        pass_fds=[surplus.fileno()],
        check=True,
        capture_output=True,
        timeout=60,
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


def test_worker_has_no_way_to_the_terminal(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness, workers=1)
    daemon.prefix = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
    daemon.run()
    (worker,) = daemon.workers().values()

    def terminal_of(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4])

    assert terminal_of(daemon.pid) != 0
    assert terminal_of(worker) == 0
    assert os.getsid(worker) == os.getsid(daemon.pid)
    assert order_worker(open_harness, daemon, "reach_terminal")["error"] == "OSError"


def test_worker_has_no_descriptor_of_the_terminal(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness, workers=1)
    code = "import pty, sys; pty.spawn(['sh', '-c', 'exec \"$@\" 2>/dev/null', 'sh', *sys.argv[1:]])"
    daemon.prefix = [sys.executable, "-c", code]
    daemon.run()
    assert any(link.startswith("/dev/pts/") for link in links_of(daemon.pid))
    found = order_worker(open_harness, daemon, "descriptors")["value"]
    assert [link for link in found.values() if link.startswith(("/dev/pts/", "/dev/tty"))] == []


def test_worker_of_another_user_ends_with_its_master(open_harness: Harness) -> None:
    """The kernel forgets that it should tell, when a process becomes another user's."""
    daemon = unprivileged_daemon(open_harness).start()
    assert order_worker(open_harness, daemon, "parent_death_signal")["value"] == signal.SIGTERM


@pytest.mark.parametrize("preload", ["false", "true"])
def test_restart_leaves_workers_no_removed_listener(open_harness: Harness, preload: str) -> None:
    kept, gone = f"unix:{open_harness.directory}/kept", f"unix:{open_harness.directory}/gone"
    daemon = unprivileged_daemon(open_harness, f"preload={preload}", workers=1, listen=(kept, gone)).start()
    (before,) = daemon.workers().values()
    many = len(list(Path(f"/proc/{before}/fd").iterdir()))
    daemon.options = [one for one in daemon.options if one != f"--listen={gone}"]
    result = daemon.command("restart")
    assert result.returncode == 0, result.stderr
    (after,) = daemon.workers().values()
    assert len(list(Path(f"/proc/{after}/fd").iterdir())) == many - 1


def test_descriptors_that_forkd_run_inherits_are_closed(open_harness: Harness, open_directory: Path) -> None:
    daemon = unprivileged_daemon(open_harness, workers=1)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    daemon.run(pass_fds=[writer])
    pipe = os.readlink(f"/proc/self/fd/{writer}")
    os.close(writer)
    os.close(reader)
    assert pipe in links_of(daemon.pid)
    (pid,) = daemon.workers().values()
    assert pipe not in links_of(pid)


def test_control_socket_refuses_other_users_with_any_mode(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    control = daemon.run_directory / "control.sock"
    master, workers = daemon.pid, daemon.workers()
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    assert order_worker(open_harness, daemon, "ask", str(control))["error"] == "PermissionError"
    control.chmod(0o666)
    assert order_worker(open_harness, daemon, "ask", str(control))["value"] in (
        "",
        "BrokenPipeError",
        "ConnectionResetError",
    )
    daemon.wait_log(f"control socket: user {NOBODY} refused")
    check_unchanged(daemon, master, workers)


def test_limits_are_those_of_the_settings_also_after_reload(open_harness: Harness, open_directory: Path) -> None:
    path = open_directory / "d.yaml"
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


def test_a_low_hard_limit_of_descriptors_is_told_once(open_harness: Harness, open_directory: Path) -> None:
    daemon = unprivileged_daemon(open_harness, "rlimits.nofile=unlimited", workers=3)
    options = list(map(str, [*daemon.target, *daemon.identity, *daemon.options]))
    limited = ["prlimit", "--nofile=200:400", "setpriv", "--bounding-set", "-sys_resource"]
    command = [*limited, sys.executable, "-m", "forkd", "start", *options]
    subprocess.run(command, cwd=open_directory, check=True, capture_output=True, timeout=60)
    told = [record for record in daemon.records() if "rlimits.nofile: wanted " in record]
    assert len(told) == 1
    assert ", there is 400" in told[0]
    for pid in daemon.workers().values():
        assert limit_of(pid, "Max open files") == ["400", "400"]


def free_low_port() -> int:
    for port in random.sample(range(901, 1000), 99):  # other tests look for one at the same time
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    return lacks("a free port below 1024")


def test_reload_binds_low_ports_and_reopens_the_log(open_harness: Harness, open_directory: Path) -> None:
    path, port = open_directory / "d.yaml", free_low_port()
    listener = "  - {address: 'tcp://127.0.0.1:%d', handler: 'forkd.builtin:Echo'}\n"
    rest = f"user: {NOBODY}\ngroup: {GROUP}\nworkers: 2\n"
    path.write_text(f"{rest}listen:\n{listener % 0}")
    daemon = open_harness.daemon(target=path, listen=(), workers=None).start()
    path.write_text(f"{rest}listen:\n{listener % 0}{listener % port}")
    result = daemon.command("reload")
    assert result.returncode == 0, result.stderr
    daemon.status()
    assert echoes(open_harness.connect(f"tcp://127.0.0.1:{port}"))
    daemon.log.rename(open_directory / "old.log")
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log("log file .* reopened")
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)  # the master may, and a new worker has that user too
    daemon.expect("worker 1 .* killed by SIGKILL")
    workers = daemon.wait_workers(2, without={victim})
    assert {status_of(pid)["Uid"].split()[0] for pid in workers.values()} == {str(NOBODY)}


def test_upgrade_keeps_the_workers_user(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    before = daemon.workers()
    result = daemon.command("upgrade")
    assert result.returncode == 0, result.stderr
    after = daemon.workers()
    assert not set(before.values()) & set(after.values())
    assert {status_of(pid)["Uid"].split()[0] for pid in after.values()} == {str(NOBODY)}


# What can't be


@pytest.mark.parametrize("call", ["setresuid", "setresgid", "setgroups"])
@pytest.mark.parametrize("fault", ["error=EPERM", "retval=0"])
def test_a_worker_that_cannot_drop_never_serves(
    open_harness: Harness, open_directory: Path, call: str, fault: str
) -> None:
    """`retval=0` has the call claim that it was done."""
    needs_program("strace")
    daemon = unprivileged_daemon(open_harness, "groups=[77]", workers=1)
    options = list(map(str, [*daemon.target, *daemon.identity, *daemon.options]))
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "forkd", "start", *options],
        cwd=open_directory, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert "can't drop privileges: " in result.stderr
    assert (f"{call}(" in result.stderr) == ("error" in fault)
    daemon.expect("could not boot: can't drop privileges")


@pytest.mark.parametrize("lost", ["setuid", "setgid", "kill"])
def test_a_root_without_the_capability_is_refused_at_the_start(open_directory: Path, lost: str) -> None:
    command = ["setpriv", "--bounding-set", f"-{lost}", sys.executable, "-m", "forkd", "start", "--set", "user=nobody"]
    result = subprocess.run(
        [*command, "--run-directory", open_directory / "run"],
        cwd=open_directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 78
    assert "user: the daemon can't " in result.stderr
    assert f"it is root, but without CAP_{lost.upper()}" in result.stderr
    assert not (open_directory / "run").exists()


def test_check_imports_handlers_as_the_workers_user(open_directory: Path) -> None:
    (open_directory / "mine.py").write_text("import os\nassert os.getuid() == 65534\nfrom forkd.builtin import Echo\n")
    options = ["--listen", "tcp://127.0.0.1:0", "--set", f"python_path=[{open_directory}]", "--set", f"group={GROUP}"]
    assert forkd("check", "mine:Echo", *options, "--set", f"user={NOBODY}", cwd=open_directory).returncode == 0
    result = forkd("check", "mine:Echo", *options, cwd=open_directory)
    assert result.returncode == 78
    assert "AssertionError" in result.stderr
    (open_directory / "mine.py").chmod(0o600)
    shut = open_directory / "shut"
    shut.mkdir(0o700)
    options[3] = f"python_path=[{shut}]"
    result = forkd("check", "mine:Echo", *options, "--set", f"user={NOBODY}", cwd=open_directory)
    assert f"the workers' user {NOBODY} can't read {shut}" in result.stderr


@pytest.mark.parametrize("what", ["pid file", "log", "socket", "control socket"])
def test_a_link_in_the_place_of_a_file_of_ours_is_refused(open_directory: Path, what: str) -> None:
    precious = open_directory / "precious"
    precious.write_text("precious")
    run = open_directory / "run"
    run.mkdir()
    paths = {
        "pid file": run / "pid",
        "log": open_directory / "x.log",
        "socket": open_directory / "s",
        "control socket": run / "control.sock",
    }
    paths[what].symlink_to(precious)
    options = ["--run-directory", run, "--set", f"log.to={paths['log']}", "--listen", f"unix:{paths['socket']}"]
    result = forkd("start", *options, cwd=open_directory)
    assert result.returncode == 1
    assert str(paths[what]) in result.stderr
    assert "it is a symbolic link; " in result.stderr
    assert precious.read_text() == "precious"
    assert paths[what].is_symlink()


def test_chroot_holds_workers_with_preloaded_handlers(open_harness: Harness, open_directory: Path) -> None:
    jail = open_directory / "jail"
    jail.mkdir()
    daemon = unprivileged_daemon(open_harness, "preload=true", f"chroot={jail}").start()
    for pid in daemon.workers().values():
        assert os.readlink(f"/proc/{pid}/root") == str(jail)
    assert order_worker(open_harness, daemon, "load", "json") == {"value": "json"}
    assert order_worker(open_harness, daemon, "load", "wave")["error"] == "ModuleNotFoundError"
    result = forkd(
        "check", "forkd.builtin:Echo", "--listen=tcp://127.0.0.1:0", "--set", f"chroot={jail}", cwd=open_directory
    )
    assert "(Python's own modules) is not there in chroot" in result.stderr
