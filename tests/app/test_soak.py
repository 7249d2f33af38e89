"""A daemon to which anything happens, in a random order, while clients that check every byte come and go.

Reloads, upgrades, restarts, more and fewer workers, killed workers, rotated logs, good and bad settings files. Each is
an act with a name and a time. No client gets a wrong byte or is refused; each connection that is lost is accounted for
by an act or by what the daemon's log says of its worker: a worker that was killed has cut just its own clients, and one
whose `drain_timeout` was over has closed so many as it says. In the end nothing is left: the master has as many
descriptors and as much memory as at the beginning, and there is no process, zombie or file more.

`make soak` has it go on for ten minutes, and prints the seed; FORKD_SOAK_SECONDS and FORKD_SOAK_SEED choose others.
When it fails, it says which acts were near the connections that it can't account for.
"""

from __future__ import annotations

import os
import random
import re
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from time import monotonic, time
from typing import Any

import pytest
import yaml

from tests.support.clients import unshared_port
from tests.support.daemon import Daemon, Harness, log_records
from tests.support.many_clients import REFUSED, ChurnClients, Loss, Outcomes
from tests.support.paths import HANDLERS
from tests.support.processes import children, eventually, resident

MIB = 1 << 20
SECONDS = float(os.environ.get("FORKD_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("FORKD_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)

#: Seconds by which a client may see the end of its connection later than the act, on a busy machine.
LATER = 3.0
#: And by which the clocks of two processes' records may seem to differ: what is written is rounded.
SOONER = 0.01

#: Why a change that was asked for may fail: because of an act, and in these words.
EXCUSES = (
    r"killed by SIGKILL",
    r"(a restart|another change) is under way",
    r"the daemon (is|stops)",
    r"is not running",
    r"the daemon is busy",
    r"an upgrade has begun; ask again",
    r"more.sock is in use by forkd: soak",  # by a reload that was begun meanwhile
)
#: What the log may call an error, since acts have caused it.
ERRORS = (
    r"has ended: killed by SIGKILL",
    r"(reload|upgrade|candidate): failed",
    r"(reload|upgrade) failed",
    r"forkd: soak.yaml:",  # of an upgrade that was under way when the file was broken
)
BAD_FILES = ("workers: [", "wokers: 3\n", "listen: 5\n", "workers: 2\nlisten: [{address: 'tcp://127.0.0.1:0'}]\n")

_RECORD = re.compile(r"(\S+Z) (\S+) \S+ ([^\[]+)\[(\d+)\] \S+: (.*)")
_CLOSES = re.compile(r"closing open connections: (\d+)")


@dataclass(frozen=True, slots=True)
class Act:
    """Something that was done to the daemon: when, what, and to which of its processes."""

    at: float
    what: str
    pids: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.at:.3f} {self.what}" + (f" {self.pids}" if self.pids else "")


@dataclass
class Account:
    """What has happened, and which connections that explains.

    Attributes:
        acts: in their order.
        closes: how many connections a worker says to have closed, by its pid and when.
        address_of_more: of the listener that comes and goes.
    """

    address_of_more: str
    acts: list[Act] = field(default_factory=list)
    closes: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def note(self, what: str, *pids: int) -> None:
        self.acts.append(Act(time(), what, pids))

    def read(self, records: list[str]) -> None:
        """Takes in what the workers say in the log."""
        for record in records:
            match = _RECORD.match(record)
            if match and (closes := _CLOSES.match(match[5])):
                at = datetime.fromisoformat(match[1]).timestamp()
                self.closes.setdefault(int(match[4]), []).append((at, int(closes[1])))

    def reason(self, loss: Loss) -> str:
        """What explains that this connection was lost, empty where nothing does."""
        for act in self._before(loss, "kill"):
            if loss.server in act.pids:
                return "worker killed"
        for at, _ in self.closes.get(loss.server, ()):
            if -SOONER <= loss.ended - at < LATER:
                return "drain_timeout over"
        if loss.server:
            return ""
        # From here on no worker has greeted it, and what was near in time has to do. A worker that is killed may have
        # accepted one client that it has not greeted; a listener that is closed has clients in its backlog.
        if self._before(loss, "stop begins", "start ends"):
            return "stopped"
        if loss.address == self.address_of_more and (loss.how == REFUSED or self._before(loss, "change begins")):
            return "its listener is gone"
        return "worker killed before its greeting" if loss.how != REFUSED and self._before(loss, "kill") else ""

    def _before(self, loss: Loss, begin: str, end: str = "") -> list[Act]:
        """The acts of a name that may have been the reason; with `end`, those that had not ended by then."""
        found = []
        for number, act in enumerate(self.acts):
            if act.what == begin:
                ends = [later.at for later in self.acts[number:] if later.what == end] if end else [act.at]
                if act.at - SOONER <= loss.ended < min(ends, default=inf) + LATER:
                    found.append(act)
        return found

    def check(self, losses: list[Loss]) -> None:
        """Fails where a connection was lost that no act explains, or more of them than it can explain."""
        reasons = Counter(self.reason(loss) for loss in losses)
        print(f"lost: {dict(Counter((self.reason(loss), loss.how) for loss in losses))}")
        unexplained = [self._describe(loss) for loss in losses if not self.reason(loss)]
        assert not unexplained, "\n\n".join(
            [f"{len(unexplained)} connections were lost without a reason", *unexplained]
        )
        kills = [pid for act in self.acts if act.what == "kill" for pid in act.pids]
        assert reasons["worker killed before its greeting"] <= len(kills)
        for pid, closes in self.closes.items():
            lost = sum(loss.server == pid and self.reason(loss) == "drain_timeout over" for loss in losses)
            assert lost <= sum(count for _, count in closes), f"worker {pid} has closed more than it says"

    def _describe(self, loss: Loss) -> str:
        near = [str(act) for act in self.acts if loss.began - LATER < act.at < loss.ended + 0.5]
        return f"{loss}\nits worker's closes: {self.closes.get(loss.server)}\nacts near it:\n  " + "\n  ".join(near)


class Site:
    """The daemon, its settings file, and all that can be done to it.

    Args:
        harness: whose daemon it is.
        seed: of chance.
    """

    def __init__(self, harness: Harness, seed: int) -> None:
        self.chance = random.Random(seed)
        self.directory = harness.directory
        self.file = self.directory / "soak.yaml"
        self.daemon: Daemon = harness.daemon("soak", target=self.file.name, listen=(), workers=None)
        self.daemon.options = []
        # A port of its own, which is the same after a stop and a start.
        port = unshared_port()
        self.account = Account(f"unix:{self.directory}/more.sock")
        self.base: dict[str, Any] = {
            "workers": 2,
            "drain_timeout": "1s",
            "listen": [
                {"address": f"tcp://127.0.0.1:{port}", "handler": "teller:Teller"},
                {"address": f"unix:{self.directory}/soak.sock", "handler": "teller:Teller"},
            ],
            "python_path": [str(HANDLERS)],
            "log": {"to": str(self.daemon.log)},
        }
        self.rotated = 0
        self.commands: list[tuple[str, subprocess.Popen[str]]] = []
        self.write(self.base)

    def write(self, settings: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(settings))

    # Acts

    def kill_one(self) -> None:
        pids = [one["pid"] for one in self.status()["workers"]]
        if pids:
            self._kill([self.chance.choice(pids)])

    def kill_all(self) -> None:
        self._kill([one["pid"] for one in self.status()["workers"]])

    def _kill(self, pids: list[int]) -> None:
        self.account.note("kill", *pids)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.account.note("had ended", pid)

    def reload_by_signal(self) -> None:
        self._signal(signal.SIGHUP)

    def upgrade_by_signal(self) -> None:
        self._signal(signal.SIGUSR2)

    def more(self) -> None:
        if self.status()["wanted"] < 6:
            self._signal(signal.SIGTTIN)

    def fewer(self) -> None:
        self._signal(signal.SIGTTOU)

    def _signal(self, signum: signal.Signals) -> None:
        self.account.note(signum.name)
        os.kill(self.status()["pid"], signum)

    def rotate(self) -> None:
        self.rotated += 1
        self.account.note("rotation")
        self.daemon.log.rename(f"{self.daemon.log}.{self.rotated}")
        os.kill(self.status()["pid"], signal.SIGUSR1)
        eventually(self.daemon.log.exists, what="a new log")

    def scale(self) -> None:
        self._command("scale", self.chance.randint(1, 5))

    def reload(self) -> None:
        self._command("reload")

    def upgrade(self) -> None:
        self._command("upgrade")

    def restart(self) -> None:
        self._command("restart")

    def change_settings(self) -> None:
        chance = self.chance
        self.account.note("change begins")
        settings = {**self.base, "workers": chance.randint(1, 4), "drain_timeout": chance.choice(["1s", "2s", "4s"])}
        if chance.random() < 0.5:
            more = {"address": self.account.address_of_more, "handler": "teller:Teller"}
            settings["listen"] = [*self.base["listen"], more]
        if chance.random() < 0.3:
            settings["recycle"] = {"connections": 100}
        self.write(settings)
        self._command("reload")

    def stop_and_start(self) -> None:
        """The one act by which clients may be refused."""
        self.finish_commands()
        self.account.note("stop begins")
        for command in (["stop", "--now"] if self.chance.random() < 0.5 else ["stop"]), ["start"]:
            found = self.daemon.command(*command)
            assert found.returncode == 0, found
        self.account.note("start ends")

    def break_settings(self) -> None:
        """A file that can't be used: whatever is asked of the daemon fails, and changes nothing."""
        self.finish_commands()
        good, verb = self.file.read_text(), self.chance.choice(["reload", "upgrade", "restart"])
        self.file.write_text(self.chance.choice(BAD_FILES))
        self.account.note(f"{verb} with bad settings")
        found = self.daemon.command(verb)
        self.account.note(f"{verb} with bad settings: {found.returncode}")
        assert found.returncode in (1, 78), found
        self.file.write_text(good)

    def _command(self, verb: str, *more: object) -> None:
        """Begins a command, beside which other acts go on."""
        self.account.note(f"{verb} begins")
        command = [sys.executable, "-m", "forkd", verb, *self.daemon.target, *self.daemon.identity, *more]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*map(str, command)], cwd=self.directory, **pipes)
        self.commands.append((verb, process))
        if self.chance.random() < 0.7:
            self.finish_commands()

    def finish_commands(self) -> None:
        """Waits for all that were begun; one that fails must have a reason that an act has given it."""
        for verb, process in self.commands:
            out, err = process.communicate(timeout=60)
            self.account.note(f"{verb}: {process.returncode} {(out + err).strip()[:200]}")
            excused = any(re.search(excuse, err) for excuse in EXCUSES)
            assert process.returncode == 0 or excused, f"{verb}: {process.returncode} {out}{err}"
        self.commands.clear()

    # What there is

    def status(self) -> dict[str, Any]:
        """The daemon's status; an upgrade or restart cuts off a client that asks just then."""

        def ask() -> dict[str, Any] | None:
            try:
                return self.daemon.status()
            except (ConnectionError, FileNotFoundError):
                return None

        found = eventually(ask, what="an answer")
        assert found is not None
        return found

    def settle(self) -> None:
        """Has the daemon be what it was at the beginning, and waits until it is."""
        self.finish_commands()
        self.write(self.base)
        self.account.note("settles")
        eventually(lambda: not self.status()["change"], 60, what="the end of all changes")
        for command in (["reload"], ["scale", 2]):
            found = self.daemon.command(*map(str, command))
            assert found.returncode == 0, found
        eventually(self._is_quiet, 60, what="two workers that serve, and no others")

    def _is_quiet(self) -> bool:
        status = self.status()
        return not status["change"] and [one["state"] for one in status["workers"]] == ["serving"] * 2

    def figures(self) -> tuple[int, int, int]:
        """Descriptors and memory of the master, and how many children it has, when it is quiet."""
        self.settle()
        master = self.daemon.pid
        eventually(lambda: "Z" not in children(master).values(), what="no zombies")
        return self.daemon.descriptors(), resident(master), len(children(master))

    def records(self) -> list[str]:
        """All logs' records, the oldest first."""
        logs = [self.daemon.log.with_name(f"{self.daemon.log.name}.{number}") for number in range(1, self.rotated + 1)]
        return [record for log in (*logs, self.daemon.log) for record in log_records(log)]

    @contextmanager
    def clients(self, seed: int) -> Iterator[Outcomes]:
        """Eighteen clients while this lasts; what became of them is complete after it."""
        outcomes = Outcomes()
        tcp, unix = (one["address"] for one in self.status()["listeners"][:2])
        kinds = [
            ChurnClients(tcp, 6, pause=0.02, seed=seed),
            ChurnClients(unix, 3, pause=0.02, seed=seed + 1),
            ChurnClients(tcp, 3, pieces=60, pause=0.2, seed=seed + 2),
            ChurnClients(unix, 2, pieces=60, pause=0.2, seed=seed + 3),
            ChurnClients(tcp, 2, size=4 * MIB, pause=0.02, seed=seed + 4),
            ChurnClients(self.account.address_of_more, 2, pause=0.02, seed=seed + 5),
        ]
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(kind)
            yield outcomes
        for kind in kinds:
            outcomes.add(kind.outcomes)


ACTS: dict[Callable[[Site], None], int] = {
    Site.reload_by_signal: 4,
    Site.reload: 4,
    Site.change_settings: 4,
    Site.break_settings: 3,
    Site.upgrade_by_signal: 2,
    Site.upgrade: 2,
    Site.restart: 3,
    Site.stop_and_start: 1,
    Site.scale: 3,
    Site.more: 2,
    Site.fewer: 2,
    Site.kill_one: 6,
    Site.kill_all: 1,
    Site.rotate: 3,
}


@pytest.mark.parametrize(
    ("seconds", "seed"),
    [(4.0, 1), pytest.param(SECONDS, SEED, marks=[pytest.mark.soak, pytest.mark.timeout(SECONDS + 300)])],
)
def test_lost_connections_are_accounted_for_whatever_happens(harness: Harness, seconds: float, seed: int) -> None:
    print(f"FORKD_SOAK_SEED={seed}")
    site = Site(harness, seed)
    site.daemon.start()
    before, files = site.figures(), sorted(os.listdir(site.directory))
    with site.clients(seed) as outcomes:
        end = monotonic() + seconds
        while monotonic() < end:
            (act,) = site.chance.choices([*ACTS], [*ACTS.values()])
            act(site)
            select.select([], [], [], site.chance.choice([0, 0, 0.05, 0.2, 1.0]))
        site.finish_commands()
    after, records = site.figures(), site.records()
    site.rotate()  # what the harness looks at has nothing but the end in it
    counts = Counter(act.what for act in site.account.acts)
    print(f"{outcomes.whole.total()} whole, {outcomes.losses}; acts: {dict(counts.most_common(12))}")
    print(f"master: descriptors, memory, children: {before} before, {after} after")
    site.account.read(records)
    site.account.check(outcomes.lost)
    assert (outcomes.wrong, outcomes.stuck) == (0, 0)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] < before[1] + 4 * MIB
    logs = {f"{site.daemon.log.name}.{number}" for number in range(1, site.rotated + 1)}
    assert sorted({*os.listdir(site.directory)} - logs) == files
    bad = [one for one in records if re.search(r"\A\S+ (ERROR|CRITICAL) |Traceback", one)]
    unexpected = [one for one in bad if not any(re.search(error, one) for error in ERRORS)]
    assert not unexpected, "\n".join(unexpected[:20])
