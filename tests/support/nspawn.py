"""A real systemd in a container of its own, with forkd's units installed: systemd-nspawn on a root that is made here.

Nothing of the machine is there but its programs, read-only, and its network is one of the container's own. The daemon
is this checkout's, run by this interpreter.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.clients import dial
from tests.support.paths import CHECKOUT
from tests.support.processes import DEADLINE, children, eventually, stat_of, wait_end

UNITS = CHECKOUT / "systemd"

_PYTHON = os.path.realpath(sys.executable)
_PROGRAMS = ("sh", "systemctl", "journalctl", "sleep", "true", "kill", "mount", "umount", "systemd-tmpfiles")
_FORKD = f"""\
#!/bin/sh
PYTHONPATH=/opt/forkd:/opt/packages exec {_PYTHON} -m forkd "$@"
"""
# Two containers below one control group would take each other's services for their own.
_JOIN = 'for group in $0; do echo $$ >"$group/cgroup.procs" || exit; done; exec "$@"'
_TARGET = """\
[Unit]
Requires=basic.target
After=basic.target
"""


def units() -> list[Path]:
    """The files of forkd's units."""
    return sorted([*UNITS.glob("*.service"), *UNITS.glob("*.socket")])


class SystemdContainer:
    """A container with a systemd, which `boot` starts and `stop` ends.

    Args:
        directory: where its root is to be.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.console = directory / "console"
        self.pid = 0  # of its systemd, as it is here
        self._process: subprocess.Popen[bytes] | None = None
        self._groups = [group / f"forkd-test-{os.getpid()}" for group in _own_groups()]

    def build(self) -> None:
        """Makes the root."""
        for name in ("etc/forkd", "etc/systemd/system", "usr/bin", "opt", "var", "run", "tmp", "dev", "proc", "sys"):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        etc = self.root / "etc"
        users = ("root:x:0:0::/:/bin/sh", "forkd:x:990:990::/:/bin/false", "nobody:x:65534:65534::/:/bin/false")
        (etc / "passwd").write_text("".join(f"{user}\n" for user in users))
        (etc / "group").write_text("root:x:0:\nforkd:x:990:\nnogroup:x:65534:\n")
        (etc / "os-release").write_text("ID=test\n")
        (etc / "machine-id").write_text(f"{os.urandom(16).hex()}\n")
        (etc / "systemd/system/tests.target").write_text(_TARGET)
        for unit in units():
            shutil.copy(unit, etc / "systemd/system")
        forkd = self.root / "usr/bin/forkd"
        forkd.write_text(_FORKD)
        forkd.chmod(0o755)

    def boot(self) -> None:
        """Starts it, and waits until its systemd is up."""
        binds = {f"/usr/{entry.name}": "" for entry in Path("/usr").iterdir() if entry.name != "bin" and entry.is_dir()}
        binds |= {path: f":/usr/bin/{name}" for name in _PROGRAMS if (path := shutil.which(name))}
        binds |= {_PYTHON: ""} | ({} if sys.base_prefix == "/usr" else {sys.base_prefix: ""})
        binds |= {str(CHECKOUT): ":/opt/forkd", sysconfig.get_path("purelib"): ":/opt/packages"}
        options = [
            "--register=no",
            f"--machine=forkd-test-{os.getpid()}",
            "--keep-unit",
            "--private-network",
            "--console=pipe",
            "--kill-signal=SIGRTMIN+4",
        ]
        options += [f"--bind-ro={path}{there}" for path, there in binds.items()]
        for group in self._groups:
            group.mkdir()
        with self.console.open("wb") as console:
            self._process = subprocess.Popen(
                ["sh", "-c", _JOIN, " ".join(map(str, self._groups)),
                 "systemd-nspawn", "-D", self.root, *options, "--boot", "--", "systemd.unit=tests.target"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        eventually(self._up, what="the container's systemd")
        with self._network():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=DEADLINE)

    def _up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.console.read_text()
        self.pid = next(iter(children(self._process.pid)), 0)
        return bool(self.pid) and self.ask("is-active", "tests.target") == "active"

    def stop(self) -> None:
        """Ends it, and waits until nothing is left. It is told, and never killed: its systemd would outlive that."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(2 * DEADLINE)
            if self.pid and stat_of(self.pid):
                wait_end(self.pid)
        for group in self._groups:
            for directory, _, _ in os.walk(group, topdown=False):
                os.rmdir(directory)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in it to its end."""
        return subprocess.run(self.command_inside(*command), capture_output=True, text=True, timeout=60, check=False)

    def command_inside(self, *command: str) -> list[str]:
        """A command as it is run from outside."""
        return [
            "nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", *command,
        ]  # fmt: skip

    def check_run(self, *command: str) -> str:
        """Runs a command in it that is to succeed; what it prints."""
        result = self.run(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def ask(self, *arguments: str) -> str:
        """What systemctl says, whatever its exit status."""
        return self.run("systemctl", *arguments).stdout.strip()

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.ask("show", "--value", f"--property={key}", unit)

    def journal(self, unit: str) -> str:
        """What a unit has logged."""
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").stdout

    def write(self, path: str, text: str) -> None:
        """Writes a file of its /etc."""
        file = self.root / "etc" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def add_address(self, address: str) -> None:
        """Gives its loopback another address."""
        with self._network():
            subprocess.run(["ip", "address", "add", address, "dev", "lo"], check=True, timeout=DEADLINE)

    def dial(self, address: str) -> socket.socket:
        """A client in it; a socket belongs to the network in which it was made."""
        if address.startswith("unix:/"):
            return dial(f"unix:/proc/{self.pid}/root{address.removeprefix('unix:')}")
        with self._network():
            return dial(address)

    @contextmanager
    def _network(self) -> Iterator[None]:
        """Has this thread be in its network."""
        libc = ctypes.CDLL(None, use_errno=True)
        ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        theirs = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            assert libc.setns(theirs, 0) == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            assert libc.setns(ours, 0) == 0, os.strerror(ctypes.get_errno())
            os.close(ours)
            os.close(theirs)


def _own_groups() -> Iterator[Path]:
    """The control groups of this process that a systemd would work with: version 2's, and version 1's without a
    controller, where there are those (cgroups(7)).
    """
    top = Path("/sys/fs/cgroup")
    second = top / "unified" if (top / "unified").is_dir() else top
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield second / path.lstrip("/")
        elif controllers == "name=systemd":
            yield top / "systemd" / path.lstrip("/")
