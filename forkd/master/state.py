"""The state of a running master: what its parts share. It decides nothing and waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from forkd.errors import BootError
from forkd.master.control import ControlSocket
from forkd.master.crew import Crew
from forkd.master.errands import Errands
from forkd.master.generation import Generation
from forkd.master.heritage import Heritage, Place
from forkd.master.plan import Candidate, Pool
from forkd.master.spawn import HELPER, Worker
from forkd.states import Mode
from forkd.system.bound import BoundListener
from forkd.system.notify import Notifier
from forkd.system.scoreboard import Scoreboard


@dataclass(slots=True)
class State:
    """One master's.

    Attributes:
        generation: the one that serves.
        wanted: how many workers it should have.
        board: the scoreboard.
        control: the control socket.
        errands: what its children do.
        place: what outlasts this image.
        crew: its children.
        notifier: tells the service manager, where there is one.
        mode: what it is about.
        started: since the epoch, whichever image it was that started.
        last_failure: why the last worker that never served did not.
        refusal: why the last change has failed; empty when it has not.
        succeeded: whether another master has the name and the addresses now.
        awake: since when it has been there without a gap, on the monotonic clock.
    """

    generation: Generation
    wanted: int
    board: Scoreboard
    control: ControlSocket
    errands: Errands
    place: Place
    crew: Crew
    notifier: Notifier
    mode: Mode = Mode.STARTING
    started: float = field(default_factory=time.time)
    last_failure: BootError | None = None
    refusal: str = ""
    succeeded: bool = False
    awake: float = -inf

    @property
    def workers(self) -> Mapping[int, Worker]:
        """By pid, helpers too."""
        return self.crew.workers

    @property
    def drain_timeout(self) -> float:
        """Seconds after which, once told to drain, no worker has a client: the longest of all generations here."""
        own = (worker.drain_timeout or 0.0 for worker in self.workers.values())
        return max(self.generation.settings.drain_timeout, *own, 0.0)

    def settled(self) -> bool:
        """Whether there are just the workers that are wanted, and all serve."""
        return self.crew.serves(self.generation.number, self.wanted)

    def turn_over(self, candidate: Generation) -> None:
        """Another generation is the one that serves. The workers of the one before go on by its settings."""
        before, self.generation = self.generation, candidate
        self.forsake(before.lacking(candidate), candidate.number)
        for worker in self.workers.values():
            if worker.generation == before.number:
                worker.drain_timeout = before.settings.drain_timeout
                worker.stall_timeout = before.settings.stall_timeout

    def forsake(self, listeners: Iterable[BoundListener], heir: int = 0) -> None:
        """Notes where listeners are that are about to be closed, for those workers that may have clients of them: all
        but those of the generation that takes over.
        """
        places = [place for bound in listeners if (place := bound.places())["sockets"]]
        for worker in self.workers.values():
            if worker.generation != heir:
                worker.forsaken += places

    def pool(self, now: float, candidate: Candidate | None) -> Pool:
        """All this as the plan sees it."""
        number, settings = self.generation.number, self.generation.settings
        return Pool(
            self.mode,
            self.wanted,
            self.crew.views(now),
            self.crew.slots[number],
            settings.boot_timeout,
            settings.drain_timeout,
            settings.stall_timeout,
            number,
            candidate,
            self.awake,
        )

    def heritage(self, clients: Sequence[int]) -> Heritage:
        """All this as another image goes on with it.

        Args:
            clients: descriptors of those who wait for the outcome.
        """
        return Heritage(
            place=self.place,
            generation=self.generation,
            wanted=self.wanted,
            started=self.started,
            control=self.control.fileno(),
            board=self.board,
            workers=[worker for worker in self.workers.values() if worker.slot != HELPER],
            slots=self.crew.slots[self.generation.number],
            deaths=list(self.crew.deaths),
            buried=self.crew.buried,
            clients=clients,
        )

    def inherit(self, heritage: Heritage) -> None:
        """Goes on where another image left off."""
        self.mode, self.wanted, self.started = Mode.RUNNING, heritage.wanted, heritage.started
        for worker in heritage.workers:
            self.crew.adopt(worker)
        self.crew.slots[self.generation.number].update(heritage.slots)
        self.crew.deaths.extend(dict(death) for death in heritage.deaths)
        self.crew.buried.update(heritage.buried)
