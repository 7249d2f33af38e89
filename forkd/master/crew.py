"""The children of the master, as it lives with them: it forks, hears, signals and buries them.

What they say, on their channels and on standard error, is a claim by a process that may be hostile: it changes nothing
but the fate of the one that says it. What is to become of them is decided by `plan`; `master` tells this module.
"""

from __future__ import annotations

import logging
import os
import random
import selectors
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from forkd import signals
from forkd.errors import BootError
from forkd.master.backoff import Slot, after_death, after_fork_failed
from forkd.master.certificate import certificate, obituary, words_of
from forkd.master.plan import WorkerView
from forkd.master.spawn import HELPER, ChildMain, Exit, Spawner, Worker
from forkd.states import Life, Turn, next_life
from forkd.system.channel import ChannelClosed, GarbledChannel
from forkd.system.oom import oom_kills
from forkd.system.scoreboard import counts_of
from forkd.wire import Message

log = logging.getLogger("forkd.master")

#: Deaths that `forkd status` tells of.
REMEMBERED = 20

#: Reads of what a dead worker left at most: enough for the longest message, and an end where its own children hold the
#: channel open.
_LAST_READS = 32

#: Characters of a worker's words that are kept; what it says may be anything.
_WORDS = 20_000

#: Messages that nobody understands after which a worker is heard no more.
MOST_STRANGE = 10

_CHUNK = 16_384  # bytes of one read of standard error
_LINE = 4096  # characters after which a line counts as one, ended or not


class Crew:
    """All children.

    Args:
        spawner: what forks them.
        selector: the master's; each descriptor's data is what to call when it is ready.
        failed: told of the generation of each that failed, why, and whether it had served; not of those that were told
            to end.

    Attributes:
        workers: by pid, helpers too.
        slots: the luck of each slot, by generation.
        deaths: the latest certificates.
        answered: told of a worker's answer to a question; returns what is wrong with it, if anything.
        buried: what the dead had counted, by field.
        helper_said: told what a helper says.
        helper_ended: told of a helper and of its end.
    """

    def __init__(
        self,
        spawner: Spawner,
        selector: selectors.BaseSelector,
        failed: Callable[[int, BootError, bool], None],
    ) -> None:
        self.workers: dict[int, Worker] = {}
        self.slots: defaultdict[int, dict[int, Slot]] = defaultdict(dict)
        self.deaths: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.buried: Counter[str] = Counter()
        self._spawner = spawner
        self._selector = selector
        self._failed = failed
        self.answered: Callable[[Worker, Message], str] = lambda worker, message: "an answer to what it was not asked"
        self.helper_said: Callable[[Worker, Message], None] = lambda worker, message: None
        self.helper_ended: Callable[[Worker, Exit], None] = lambda worker, ended: None
        self._oom_kills = oom_kills()

    def views(self, now: float) -> tuple[WorkerView, ...]:
        """The workers as the plan sees them."""
        return tuple(worker.view(now) for worker in self.workers.values())

    def serves(self, generation: int, wanted: int) -> bool:
        """Whether a generation has just the workers that are wanted, and all serve."""
        here = [w for w in self.workers.values() if w.life in (Life.BOOTING, Life.SERVING) and w.slot != HELPER]
        staying = [worker for worker in here if worker.generation == generation]
        serving = {worker.slot for worker in staying if worker.life is Life.SERVING}
        return len(staying) == wanted and serving == set(range(1, wanted + 1))

    def spawn(self, slot: int, generation: int, main: ChildMain) -> None:
        """Forks a child; where that can't be done the slot waits."""
        now = time.monotonic()
        try:
            worker = self._spawner.spawn(slot, generation, main, now)
        except (OSError, OverflowError) as error:
            failure = BootError(f"can't make {f'worker {slot}' if slot else 'a helper'}: {error}")
            log.error("%s", failure)
            before = self.slots[generation].get(slot, Slot())
            self.slots[generation][slot] = after_fork_failed(before, now, random.random())  # noqa: S311
            self._failed(generation, failure, False)
            return
        self.adopt(worker)
        log.debug("%s boots, pid %d", worker.name, worker.pid)

    def adopt(self, worker: Worker) -> None:
        """Takes in a child that this process has forked."""
        self.workers[worker.pid] = worker
        if worker.heard:
            self._selector.register(worker.channel, selectors.EVENT_READ, lambda mask: self._hear(worker))
        if worker.stderr >= 0:
            self._selector.register(worker.stderr, selectors.EVENT_READ, lambda mask: self._overhear(worker))

    def tell(self, worker: Worker, turn: Turn, signum: signal.Signals, why: str = "") -> None:
        """Signals a worker, which begins another life by that."""
        if why:
            worker.cause = f"{worker.cause}; {why}" if worker.cause else why
        if turn is Turn.KILL:
            worker.killed_as = worker.killed_as or worker.life
        self._live(worker, turn)
        self._spawner.signal(worker, signum)

    def dump(self, worker: Worker, cause: str) -> None:
        """Has a worker that is about to be killed write the stacks of its threads, on its standard error."""
        log.error("%s (pid %d): %s; these are its stacks:", worker.name, worker.pid, cause)
        worker.dumped = time.monotonic()
        self._spawner.signal(worker, signals.DUMP)

    def send_all(self, message: Message, descriptors: Sequence[int]) -> None:
        """Sends every worker a message with descriptors; who does not read has other troubles."""
        for worker in self.workers.values():
            if worker.heard and worker.slot != HELPER:
                try:
                    worker.channel.send_with(message, descriptors)
                except ChannelClosed as error:
                    log.warning("can't tell %s (pid %d): %s", worker.name, worker.pid, error)

    def abandon(self) -> None:
        """In a forked child: closes all that is the master's alone."""
        for worker in self.workers.values():
            worker.channel.close()
            if worker.stderr >= 0:
                os.close(worker.stderr)

    def _live(self, worker: Worker, turn: Turn) -> None:
        life = next_life(worker.life, turn)
        if life is not worker.life:
            worker.life, worker.since = life, time.monotonic()

    # What they say

    def _hear(self, worker: Worker) -> None:
        if not worker.heard:  # buried by an event before this one in the same round
            return
        try:
            messages = worker.channel.receive()
        except GarbledChannel as error:
            self._doubt(worker, str(error), MOST_STRANGE)
            return
        except ChannelClosed:
            self._stop_hearing(worker)
            return
        for message in messages:
            if worker.slot == HELPER:
                self.helper_said(worker, message)
            elif worker.strange < MOST_STRANGE:
                self._heard(worker, message)

    def _heard(self, worker: Worker, message: Message) -> None:
        event = message.get("event")
        if event == "ready":
            if worker.life is Life.BOOTING:
                worker.ready_at = time.monotonic()
                log.info("worker %d is ready, pid %d", worker.slot, worker.pid, extra={"worker": worker.slot})
            self._live(worker, Turn.READY)
        elif event == "failed":
            reason, details = (words_of(message.get(key), _WORDS) for key in ("reason", "details"))
            worker.cause = f"could not boot: {reason}"
            worker.failure = BootError(f"worker {worker.slot} could not boot: {reason}", details)
        elif event == "worn" and worker.worn:
            pass
        elif event == "worn":
            worker.worn = words_of(message.get("why"), 200) or "it says so"
            log.info("worker %d (pid %d) is to be replaced: %s", worker.slot, worker.pid, worker.worn)
        elif event == "answer":
            if wrong := self.answered(worker, message):
                self._doubt(worker, wrong, 1)
        else:
            self._doubt(worker, f"an event {words_of(event, 40)!r}", 1)

    def _doubt(self, worker: Worker, what: str, weight: int) -> None:
        """A worker says what is no word of a worker. One that does not leave off is heard no more, and replaced."""
        worker.strange += weight
        log.warning("%s (pid %d) says what nobody understands: %s", worker.name, worker.pid, what)
        if worker.strange >= MOST_STRANGE:
            worker.worn = worker.worn or "it says what nobody understands"
            self._stop_hearing(worker)

    def _stop_hearing(self, worker: Worker) -> None:
        if worker.heard:
            worker.heard = False
            self._selector.unregister(worker.channel)
            worker.channel.close()

    def _overhear(self, worker: Worker) -> bool:
        """Takes what a child has written to standard error into the log, one read of it; whether there may be more."""
        if worker.stderr < 0:  # as in `_hear`
            return False
        try:
            data = os.read(worker.stderr, _CHUNK)
        except BlockingIOError:
            return False
        lines = (worker.unfinished + data.decode(errors="backslashreplace")).split("\n")
        worker.unfinished = lines.pop()
        if worker.unfinished and (not data or len(worker.unfinished) > _LINE):
            lines.append(worker.unfinished)
            worker.unfinished = ""
        worker.words.extend(line[:_LINE] for line in lines)
        if lines and worker.slot != HELPER:  # a helper's are for who waits for it
            said, about = "\n".join(lines), {"worker": worker.slot}
            log.warning("worker %d (pid %d) on stderr: %s", worker.slot, worker.pid, said, extra=about)
        if not data:
            self._stop_overhearing(worker)
        return bool(data)

    def _stop_overhearing(self, worker: Worker) -> None:
        if worker.stderr >= 0:
            self._selector.unregister(worker.stderr)
            os.close(worker.stderr)
            worker.stderr = -1

    # Their ends

    def reap(self) -> None:
        """Buries every child that has ended."""
        for ended in self._spawner.reap():
            worker = self.workers.pop(ended.pid, None)
            if worker is not None:
                self._bury(worker, ended)

    def _take_lastwords_of(self, worker: Worker) -> None:
        for _ in range(_LAST_READS):  # they may still lie in the channel
            if worker.heard:
                self._hear(worker)
        self._stop_hearing(worker)
        for _ in range(_LAST_READS):
            if worker.stderr < 0 or not self._overhear(worker):
                break
        if worker.unfinished:
            worker.words.append(worker.unfinished)
        self._stop_overhearing(worker)

    def _bury(self, worker: Worker, ended: Exit) -> None:
        self._take_lastwords_of(worker)
        life, now = worker.killed_as or worker.life, time.monotonic()
        expected = worker.life in (Life.DRAINING, Life.CLOSING)
        self._live(worker, Turn.EXIT)
        try:
            if worker.slot == HELPER:
                self.helper_ended(worker, ended)
                return
            self.buried += Counter(counts_of(worker.row))  # less than nothing, which only a liar counts, is left out
            failure = self._find_cause(worker, ended, expected=expected)
            self.deaths.append(certificate(worker, ended, now, expected=expected))
            # One that drained on somebody else's word (a signal to the whole process group) has done nothing wrong.
            level = logging.INFO if expected or ended.status == 0 else logging.ERROR
            log.log(level, "%s", obituary(worker, ended), extra={"worker": worker.slot})
        finally:
            worker.row.clear()
        if life not in (Life.DRAINING, Life.CLOSING):
            served = 0.0 if worker.ready_at is None else now - worker.ready_at
            slots = self.slots[worker.generation]
            before = slots.get(worker.slot, Slot())
            slots[worker.slot] = after_death(before, life, now, served, random.random())  # noqa: S311
            self._failed(worker.generation, failure, worker.ready_at is not None)

    def _find_cause(self, worker: Worker, ended: Exit, *, expected: bool) -> BootError:
        """Completes the cause of a death; the same as an error."""
        struck = self._was_out_of_memory()  # looked at with each death, so that no other one's is taken for this one's
        if struck and ended.code == -signal.SIGKILL and worker.killed_as is None:
            worker.cause = "by the kernel, which was out of memory"
        if worker.failure is not None:
            return worker.failure
        if worker.ready_at is not None or expected:
            return BootError(f"worker {worker.slot} has ended: {ended}" + (f", {worker.cause}" if worker.cause else ""))
        why = f"could not boot: {worker.cause}" if worker.cause else f"ended before it was ready: {ended}"
        worker.cause = worker.cause or "it ended before it was ready"
        return BootError(f"worker {worker.slot} {why}", "\n".join(worker.words))

    def _was_out_of_memory(self) -> bool:
        before, self._oom_kills = self._oom_kills, oom_kills()
        return before is not None and self._oom_kills is not None and self._oom_kills > before
