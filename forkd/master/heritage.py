"""What one master hands over to the next image of itself: the state that an upgrade carries through execve(2).

It is JSON in a memfd whose number the environment names; descriptors keep their numbers. Its form has a version, and
whoever reads it checks all of it before anything of the old image is given up: the same reading is done by the dry run.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forkd import __version__
from forkd.config.options import Settings
from forkd.config.plain import from_plain, to_plain
from forkd.errors import BootError, ForkdError
from forkd.master.backoff import Slot
from forkd.master.generation import Generation
from forkd.master.spawn import LAST_WORDS, Worker
from forkd.states import Life
from forkd.system.bound import BoundListener
from forkd.system.channel import Channel
from forkd.system.identity import Identity
from forkd.system.scoreboard import Field, Scoreboard

#: Of what is handed over. Another number is another form, which this code does not read.
FORMAT = 3

#: What reading comes to where something is missing, or is not what it should be.
_WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Place:
    """What stays the same for as long as a daemon lives, whichever image runs it.

    Attributes:
        directory: where it was started; what the command line says is relative to it.
        detached: whether it has no terminal.
        lock: the descriptor that holds the pid file's lock.
    """

    directory: str
    detached: bool
    lock: int


@dataclass(frozen=True, slots=True)
class Heritage:
    """The state of a running master. Times are in seconds: `started` since the epoch, others on the monotonic clock.

    Attributes:
        control: the control socket's descriptor.
        board: the scoreboard.
        buried: what dead workers had counted, by field.
        clients: descriptors of the control socket's clients who wait for the upgrade.
    """

    place: Place
    generation: Generation
    wanted: int
    started: float
    control: int
    board: Scoreboard
    workers: Sequence[Worker]
    slots: Mapping[int, Slot]
    deaths: Sequence[Mapping[str, Any]]
    clients: Sequence[int]
    buried: Mapping[str, int] = field(default_factory=dict)

    def descriptors(self) -> list[int]:
        """All that have to stay open."""
        sockets = [sock.fileno() for bound in self.generation.bound for sock in bound.sockets]
        children = [worker.channel.fileno() for worker in self.workers] + [worker.stderr for worker in self.workers]
        board = [self.board.descriptor, self.board.regions.descriptor]
        others = [self.place.lock, self.generation.log, self.control, *board]
        return [one for one in (*others, *sockets, *children, *self.clients) if one >= 0]

    def write(self) -> int:
        """A descriptor of a new file in memory with all of it. Raises OSError."""
        descriptor = os.memfd_create("forkd-state", os.MFD_CLOEXEC)
        data = memoryview(json.dumps(self._plain()).encode())
        while data:
            data = data[os.write(descriptor, data) :]
        return descriptor

    def _plain(self) -> dict[str, Any]:
        place, generation = self.place, self.generation
        return {
            "format": FORMAT,
            "version": __version__,
            "place": {"directory": place.directory, "detached": place.detached, "lock": place.lock},
            "generation": generation.number,
            "settings": to_plain(generation.settings),
            "identity": generation.identity.plain(),
            "listeners": [
                bound.described() | {"descriptors": [sock.fileno() for sock in bound.sockets]}
                for bound in generation.bound
            ],
            "log": generation.log,
            "wanted": self.wanted,
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
            "deaths": list(self.deaths),
            "buried": dict(self.buried),
            "clients": list(self.clients),
        }

    @classmethod
    def read(cls, descriptor: int) -> Heritage:
        """What another image wrote there, its descriptors opened. Raises ForkdError as `handed_settings`."""
        try:
            return cls._of(_load(descriptor))
        except _WRONG as error:
            raise _broken(error) from None

    @classmethod
    def _of(cls, plain: dict[str, Any]) -> Heritage:
        settings = from_plain(plain["settings"])
        bound = [
            BoundListener.taken(described, listener, list(described["descriptors"]))
            for described, listener in zip(plain["listeners"], settings.listen, strict=True)
        ]
        board = Scoreboard(*(plain["board"][key] for key in ("capacity", "descriptor", "regions")))
        return cls(
            place=Place(**plain["place"]),
            generation=Generation(plain["generation"], settings, bound, plain["log"], Identity.of(plain["identity"])),
            wanted=plain["wanted"],
            started=plain["started"],
            control=plain["control"],
            board=board,
            workers=[_worker_of(one, board) for one in plain["workers"]],
            slots={int(number): Slot(*slot) for number, slot in plain["slots"].items()},
            deaths=plain["deaths"],
            buried=plain["buried"],
            clients=plain["clients"],
        )


def handed_settings(descriptor: int) -> Settings:
    """The settings of the daemon whose state another image wrote there.

    Raises:
        ForkdError: the state is of another form, or not whole, or the settings are none of this version's.
    """
    try:
        return from_plain(_load(descriptor)["settings"])
    except _WRONG as error:
        raise _broken(error) from None


def _load(descriptor: int) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    if plain["format"] != FORMAT or plain["board"]["fields"] != [one.name for one in Field]:
        raise ForkdError(
            f"forkd {__version__} can't take over from forkd {plain['version']}, whose state is of another form; use "
            "`forkd restart`"
        )
    return plain


def _broken(error: Exception) -> ForkdError:
    return ForkdError(f"what was handed over is not whole: {type(error).__name__}: {error}")


_SAME = (
    "pid", "slot", "generation", "stderr", "since", "born", "ready_at", "heard", "worn", "cause", "unfinished",
    "drain_timeout", "stall_timeout", "forsaken",
)  # fmt: skip


def _worker_plain(worker: Worker) -> dict[str, Any]:
    return {
        **{key: getattr(worker, key) for key in _SAME},
        "row": worker.row.index,
        "channel": worker.channel.fileno(),
        "life": worker.life.value,
        "killed_as": worker.killed_as and worker.killed_as.value,
        "failure": worker.failure and [str(worker.failure), worker.failure.details],
        "words": list(worker.words),
        "owes": sorted(worker.owes),
    }


def _worker_of(plain: dict[str, Any], board: Scoreboard) -> Worker:
    return Worker(
        **{key: plain[key] for key in _SAME},
        row=board.adopt(plain["row"]),
        channel=Channel.of(plain["channel"]),
        life=Life(plain["life"]),
        killed_as=None if plain["killed_as"] is None else Life(plain["killed_as"]),
        failure=None if plain["failure"] is None else BootError(*plain["failure"]),
        words=deque(plain["words"], maxlen=LAST_WORDS),
        owes=set(plain["owes"]),
    )
