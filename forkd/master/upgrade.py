"""Replaces the master's image in place: the same process, so its PID, its children and its addresses stay.

The command line is run again as it was first given (execve(2)), with the state of the master handed over. First a child
tries that, changing nothing; only where it ends well does the master itself become the new image.

`MasterSnapshot` is the state that is handed over: JSON in a memfd, whose number the environment names (`RESUME`);
descriptors keep their numbers. Its format has a version, and the reader checks all of it before anything of the old
image is given up: the dry run reads it in the same way.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from forkd import RESUME, __version__
from forkd.config.listener import Listener
from forkd.config.serialize import from_plain, to_plain
from forkd.config.settings import Settings
from forkd.errors import BootError, ForkdError, system_reason
from forkd.master.generation import Generation
from forkd.master.plan import Slot
from forkd.master.spawn import STDERR_LINES, Worker
from forkd.messages import FailedEvent
from forkd.states import WorkerState
from forkd.system.channel import Channel
from forkd.system.handler_metrics import SeriesTotals
from forkd.system.identity import Identity
from forkd.system.listeners import BoundListener
from forkd.system.log_writer import UnwrittenLog
from forkd.system.scoreboard import Field, Scoreboard

#: The version of the snapshot's format; this code reads no other.
FORMAT = 10

#: What reading raises where something is missing, or is not what it should be.
_WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What stays the same for as long as a daemon lives, whichever image runs it.

    Attributes:
        directory: where it was started, as the user calls it; what the command line says is relative to it.
        detached: whether it has no terminal.
        lock: the descriptor that holds the pid file's lock.
        source: what its settings come from: the path of a file, a handler, or nothing for the echo.
        run_directory: where its pid file and its control socket are.
    """

    directory: str
    detached: bool
    lock: int
    source: str = ""
    run_directory: str = ""


@dataclass(frozen=True, slots=True)
class MasterSnapshot:
    """The state of a running master. Times are in seconds: `started` since the epoch, others on the monotonic clock.

    Attributes:
        control: the control socket's descriptor.
        drained: as of the state.
        board: the scoreboard.
        exited_totals: what workers that have ended had counted, by slot and field.
        exit_counts: how many have ended, by cause.
        exited_listeners: the same for each listener, by its address.
        handler_metrics: what handlers had counted in workers that have ended.
        changed_at, change_counts, kept_counts, pushed, expiry_warned, moments: as of the state.
        clients: descriptors of the control socket's clients that wait for the upgrade.
        idle_clients: of its other clients.
        unwritten: of the log, which its reader has not taken yet.
    """

    launch: LaunchContext
    generation: Generation
    wanted: int
    started: float
    control: int
    board: Scoreboard
    workers: Sequence[Worker]
    slots: Mapping[int, Slot]
    exit_records: Sequence[Mapping[str, Any]]
    clients: Sequence[int]
    exited_totals: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    exit_counts: Mapping[str, int] = field(default_factory=dict)
    exited_listeners: Mapping[str, Sequence[int]] = field(default_factory=dict)
    handler_metrics: SeriesTotals = field(default_factory=SeriesTotals)
    changed_at: float = 0.0
    change_counts: Mapping[str, int] = field(default_factory=dict)
    kept_counts: Mapping[str, int] = field(default_factory=dict)
    pushed: Mapping[str, float] = field(default_factory=dict)
    expiry_warned: Mapping[str, float] = field(default_factory=dict)
    moments: Sequence[Mapping[str, Any]] = ()
    idle_clients: Sequence[int] = ()
    drained: bool = False
    unwritten: UnwrittenLog = field(default_factory=UnwrittenLog)

    def descriptors(self) -> list[int]:
        """All that have to stay open."""
        generation = self.generation
        sockets = [sock.fileno() for bound in (*generation.bound, *generation.services) for sock in bound.sockets]
        children = [worker.channel.fileno() for worker in self.workers] + [worker.stderr for worker in self.workers]
        board = [self.board.descriptor, self.board.regions.descriptor]
        others = [self.launch.lock, generation.log, self.control, *board]
        return [one for one in (*others, *sockets, *children, *self.clients, *self.idle_clients) if one >= 0]

    def write(self, descriptor: int = -1) -> int:
        """A descriptor of a new file in memory with all of it, or this one. Raises OSError."""
        if descriptor < 0:
            descriptor = os.memfd_create("forkd-state", os.MFD_CLOEXEC)
        data = memoryview(json.dumps(self._plain()).encode())
        while data:
            data = data[os.write(descriptor, data) :]
        return descriptor

    def _plain(self) -> dict[str, Any]:
        generation = self.generation
        return {
            "format": FORMAT,
            "version": __version__,
            "launch": asdict(self.launch),
            "generation": generation.number,
            "settings": to_plain(generation.settings),
            "identity": generation.identity.to_plain(),
            "listeners": _listeners_plain(generation.bound),
            "services": _listeners_plain(generation.services),
            "log": generation.log,
            "wanted": self.wanted,
            "drained": self.drained,
            "started": self.started,
            "control": self.control,
            "board": {
                "descriptor": self.board.descriptor,
                "regions": self.board.regions.descriptor,
                "capacity": self.board.capacity,
                "fields": [one.name for one in Field],
            },
            "workers": [_worker_plain(worker) for worker in self.workers],
            "slots": {number: [slot.failures, slot.retry_at] for number, slot in self.slots.items()},
            "exit_records": list(self.exit_records),
            "exited_totals": {slot: dict(counts) for slot, counts in self.exited_totals.items()},
            "exit_counts": dict(self.exit_counts),
            "exited_listeners": dict(self.exited_listeners),
            "handler_metrics": self.handler_metrics.plain(),
            "changed_at": self.changed_at,
            "change_counts": dict(self.change_counts),
            "kept_counts": dict(self.kept_counts),
            "pushed": dict(self.pushed),
            "expiry_warned": dict(self.expiry_warned),
            "moments": list(self.moments),
            "clients": list(self.clients),
            "idle_clients": list(self.idle_clients),
            "unwritten": [[one.decode("latin-1") for one in self.unwritten.records], *self.unwritten[1:]],
        }

    @classmethod
    def read(cls, descriptor: int) -> MasterSnapshot:
        """What another image wrote there, its descriptors opened. Raises ForkdError as `handed_settings`."""
        try:
            return cls._of(_load(descriptor))
        except _WRONG as error:
            raise _broken(error) from None

    @classmethod
    def _of(cls, plain: dict[str, Any]) -> MasterSnapshot:
        settings = from_plain(plain["settings"])
        bound = _listeners_of(plain["listeners"], settings.listen)
        services = _listeners_of(plain["services"], settings.service_listeners)
        identity = Identity.from_plain(plain["identity"])
        records, lost, lost_total = plain["unwritten"]
        board = Scoreboard(*(plain["board"][key] for key in ("capacity", "descriptor", "regions")))
        return cls(
            launch=LaunchContext(**plain["launch"]),
            generation=Generation(plain["generation"], settings, bound, plain["log"], identity, services),
            wanted=plain["wanted"],
            drained=plain["drained"],
            started=plain["started"],
            control=plain["control"],
            board=board,
            workers=[_worker_of(one, board) for one in plain["workers"]],
            slots={int(number): Slot(*slot) for number, slot in plain["slots"].items()},
            exit_records=plain["exit_records"],
            exited_totals={int(slot): dict(counts) for slot, counts in plain["exited_totals"].items()},
            exit_counts=plain["exit_counts"],
            exited_listeners=plain["exited_listeners"],
            handler_metrics=SeriesTotals.from_plain(plain["handler_metrics"]),
            changed_at=plain["changed_at"],
            change_counts=plain["change_counts"],
            kept_counts=plain["kept_counts"],
            pushed=plain["pushed"],
            expiry_warned=plain["expiry_warned"],
            moments=plain["moments"],
            clients=plain["clients"],
            idle_clients=plain["idle_clients"],
            unwritten=UnwrittenLog(tuple(one.encode("latin-1") for one in records), lost, lost_total),
        )


def handed_settings(descriptor: int) -> Settings:
    """The settings of the daemon whose state another image wrote there.

    Raises:
        ForkdError: the state is of another format, or not whole, or the settings are none of this version's.
    """
    try:
        return from_plain(_load(descriptor)["settings"])
    except _WRONG as error:
        raise _broken(error) from None


def _load(descriptor: int) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    if plain["format"] != FORMAT or plain["board"]["fields"] != [one.name for one in Field]:
        raise ForkdError(
            f"forkd {__version__} can't take over from forkd {plain['version']}, whose state is of another format; use "
            "`forkd restart`"
        )
    return plain


def _broken(error: Exception) -> ForkdError:
    return ForkdError(f"what was handed over is not whole: {type(error).__name__}: {system_reason(error)}")


def _listeners_plain(listeners: Sequence[BoundListener]) -> list[dict[str, Any]]:
    return [bound.describe() | {"descriptors": [sock.fileno() for sock in bound.sockets]} for bound in listeners]


def _listeners_of(plain: list[dict[str, Any]], listeners: Sequence[Listener]) -> list[BoundListener]:
    return [
        BoundListener.from_description(described, listener, list(described["descriptors"]))
        for described, listener in zip(plain, listeners, strict=True)
    ]


#: Fields of a worker that are handed over as they are.
_SAME = (
    "pid", "slot", "generation", "stderr", "since", "forked_at", "ready_at", "readable", "takes_clients",
    "recycle_reason", "cause", "partial_line", "drain_timeout", "stall_timeout", "closed_listeners", "listeners",
)  # fmt: skip


def _worker_plain(worker: Worker) -> dict[str, Any]:
    return {
        **{key: getattr(worker, key) for key in _SAME},
        "row": worker.row.index,
        "channel": worker.channel.fileno(),
        "state": worker.state.value,
        "killed_in": worker.killed_in and worker.killed_in.value,
        "failure": worker.failure and [str(worker.failure), worker.failure.details],
        "stderr_lines": list(worker.stderr_lines),
        "unanswered": sorted(worker.unanswered),
    }


def _worker_of(plain: dict[str, Any], board: Scoreboard) -> Worker:
    return Worker(
        **{key: plain[key] for key in _SAME},
        row=board.adopt(plain["row"]),
        channel=Channel.from_descriptor(plain["channel"]),
        state=WorkerState(plain["state"]),
        killed_in=None if plain["killed_in"] is None else WorkerState(plain["killed_in"]),
        failure=None if plain["failure"] is None else BootError(*plain["failure"]),
        stderr_lines=deque(plain["stderr_lines"], maxlen=STDERR_LINES),
        unanswered=set(plain["unanswered"]),
    )


def try_image(snapshot: MasterSnapshot, file: int = -1) -> int:
    """In a child: becomes an image of today's code that checks whether it could go on with this state.

    Args:
        snapshot: the state.
        file: where it is written, and where that image says which files it is made of (`note_files`); -1: a new one.

    Raises:
        ForkdError: there is no such image.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what is ignored stays so through execve(2), as DUMP is to
    descriptor = _written(snapshot, file)
    os.set_inheritable(descriptor, True)
    _run(f"check:{descriptor}", snapshot.launch.directory)


def note_files(descriptor: int) -> None:
    """In the image that is tried: writes behind the state which files it is made of, and how they are now."""
    loaded = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    files = {path: _look_of(path) for path in (sys.executable, *loaded) if isinstance(path, str)}
    os.lseek(descriptor, 0, os.SEEK_END)
    data = memoryview(f"\n{json.dumps(files)}".encode())
    while data:
        data = data[os.write(descriptor, data) :]


def changed_file(descriptor: int) -> str:
    """The first file of those that are not what they were when the image was tried; empty for none."""
    noted = os.pread(descriptor, os.fstat(descriptor).st_size, 0).partition(b"\n")[2]
    files: dict[str, list[int]] = json.loads(noted or b"{}")  # an older image has noted none
    return next((path for path, look in files.items() if _look_of(path) != look), "")


def _look_of(path: str) -> list[int]:
    """What changes when a file is written or replaced; empty where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def try_or_tell(snapshot: MasterSnapshot, channel: Channel, file: int = -1) -> int:
    """As `try_image`; where that can't be tried it tells on the channel why."""
    try:
        return try_image(snapshot, file)
    except ForkdError as error:
        channel.send(FailedEvent(str(error)))
        return 1


def replace_image(snapshot: MasterSnapshot) -> NoReturn:
    """Becomes an image of today's code that goes on with this state.

    Raises:
        ForkdError: that can't be done; then nothing has changed.
    """
    directory = os.open(".", os.O_PATH)  # it may have been removed since
    descriptor = _written(snapshot)
    handed = [descriptor, *snapshot.descriptors()]
    # What arrives from now on waits until the next image listens for it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for number in handed:
            os.set_inheritable(number, True)
        _run(str(descriptor), snapshot.launch.directory)
    finally:
        for number in handed:
            os.set_inheritable(number, False)
        os.close(descriptor)
        os.chdir(directory)
        os.close(directory)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _written(snapshot: MasterSnapshot, file: int = -1) -> int:
    try:
        return snapshot.write(file)
    except OSError as error:
        raise ForkdError(f"can't hand over the state: {error.strerror}") from None


def _run(state: str, directory: str) -> NoReturn:
    try:
        os.chdir(directory)
    except OSError as error:
        raise ForkdError(f"can't change to {directory}, where the daemon was started: {error.strerror}") from None
    arguments, environment = [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PWD": directory, RESUME: state}
    try:
        os.execve(sys.executable, arguments, environment)  # noqa: S606 (there is nothing for a shell)
    except OSError as error:
        raise ForkdError(f"can't run {sys.executable}: {error.strerror}") from None
