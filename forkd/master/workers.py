"""The pool of children: it forks, reads, signals and reaps them, and queues what the master has to know.

`WorkerPool` keeps the state of each worker, the recent failures of each slot and the records of those that have ended.
What is to become of the workers is decided by `plan`; `master` tells the pool, and takes its events with
`take_events`. What children write on their channels and on standard error is a claim of a process that may be hostile:
it changes nothing but what becomes of that child.

`Questions` are queries to all workers, whose answers come later or never. A question is over when every worker that was
asked has answered, has ended or is read no more, or at its deadline. What a worker answers is a claim, too: it is taken
once, only from a worker that was asked, and up to `LARGEST_ANSWER` bytes of it.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import selectors
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from forkd import signals
from forkd.errors import BootError, system_reason
from forkd.master.plan import Slot, WorkerView, slot_after_exit, slot_after_failed_fork
from forkd.master.spawn import HELPER, ChildMain, Exit, Spawner, Worker
from forkd.messages import (
    AnswerEvent,
    CertificatesCommand,
    CertificatesEvent,
    ChildEvent,
    CloseCommand,
    DrainCommand,
    DrainingEvent,
    FailedEvent,
    InvalidMessage,
    JsonObject,
    ListenerCommand,
    LogCommand,
    Query,
    ReadyEvent,
    WorkerCommand,
    WornEvent,
    decode_event,
    encode,
    shorten,
)
from forkd.states import WorkerEvent, WorkerState, next_worker_state
from forkd.system.cgroups import oom_kills
from forkd.system.channel import ChannelClosed, MalformedInput
from forkd.system.handler_metrics import SeriesTotals
from forkd.system.proc import dies_of
from forkd.system.scoreboard import LISTENER_CELLS, ListenerField, counters_of, listener_counts

log = logging.getLogger("forkd.master")

#: Exit records that `forkd status` shows.
MOST_RECORDS = 20

#: Listeners whose counts are kept when their workers have ended, those that were last served.
MOST_LISTENERS = 200

#: Invalid messages after which a child is read no more.
MOST_INVALID = 10

#: Bytes of an answer at most.
LARGEST_ANSWER = 1 << 16

#: Answers that a worker may owe. So few queries always fit into its channel, whether it reads them or not.
MOST_UNANSWERED = 64

#: Seconds within which a worker whose loop turns answers.
ANSWER_TIMEOUT = 5.0

#: Reads of what a dead child left at most: enough for the longest message, and an end where its own children hold the
#: channel open.
_LAST_READS = 32

_MOST_REASON = 2000  # bytes, as all of these, of a reason that is kept; a worker may write anything
_MOST_DETAILS = 40_000
_RECORD_WIDTH = 300  # of a line that is kept: all records together have to fit into one message
_CHUNK = 16_384  # bytes of one read of standard error
_LONGEST_LINE = 4096  # characters after which a line counts as one, ended or not

_OUT_OF_MEMORY = "by the kernel, which was out of memory"

#: What a worker's end is counted as when it was not told to end, or did not do it in time.
CAUSES = ("boot", "boot_timeout", "stalled", "drain_timeout", "out_of_memory", "signal", "exit")

#: What the end of one that was told to end counts as.
EXPECTED = "expected"

#: Seconds for which workers that were told to drain are waited for until they take no more clients. One that stands
#: still for longer takes none either.
DRAINING_SECONDS = 1.0

_TELL_AGAIN = 60.0  # seconds after which a failed boot is logged in full again

_ORDERS: dict[signal.Signals, WorkerCommand] = {signals.DRAIN: DrainCommand(), signals.CLOSE: CloseCommand()}

_ANSWERING = (WorkerState.SERVING, WorkerState.DRAINING, WorkerState.CLOSING)


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker has ended, and is reaped; with why it failed, unless it had been told to end."""

    worker: Worker
    failure: BootError | None


@dataclass(frozen=True, slots=True)
class HelperSaid:
    """A helper has sent a message. Descriptors that came with it are in its channel."""

    helper: Worker
    said: ChildEvent | InvalidMessage


@dataclass(frozen=True, slots=True)
class HelperExited:
    """A helper has ended, and is reaped. Its channel, with descriptors that are not taken yet, is the receiver's to
    close.
    """

    helper: Worker
    ended: Exit


@dataclass(frozen=True, slots=True)
class CertificatesTold:
    """A worker has told what its certificates say, or why they can't be renewed."""

    worker: Worker
    event: CertificatesEvent


#: What the pool tells the master, in the order in which it happened.
PoolEvent = WorkerExited | HelperSaid | HelperExited | CertificatesTold


class WorkerPool:
    """All children.

    Args:
        spawner: what forks them.
        selector: the master's; each descriptor's data is what to call when it is ready.

    Attributes:
        workers: by pid, helpers too.
        slots: by generation and number.
        exit_records: the latest ones.
        exited_totals: what workers that have ended had counted, by slot and field.
        exited_listeners: the same for each listener, by its address: by `ListenerField`.
        handler_metrics: what handlers count.
        exit_counts: how many have ended, by cause: `EXPECTED`, or one of `CAUSES`.
        questions: what the workers are asked.
    """

    def __init__(self, spawner: Spawner, selector: selectors.BaseSelector) -> None:
        self.workers: dict[int, Worker] = {}
        self.slots: defaultdict[int, dict[int, Slot]] = defaultdict(dict)
        self.exit_records: deque[dict[str, Any]] = deque(maxlen=MOST_RECORDS)
        self.exited_totals: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.exited_listeners: dict[str, list[int]] = {}
        self.handler_metrics = SeriesTotals()
        self.exit_counts: Counter[str] = Counter()
        self.questions = Questions()
        self._spawner = spawner
        self._selector = selector
        self._events: list[PoolEvent] = []
        self._oom_kills = oom_kills()
        self._told: tuple[Worker, float] | None = None  # who could not boot, and has it in the log in full, and when

    def take_events(self) -> list[PoolEvent]:
        """What has happened since the last call."""
        taken, self._events = self._events, []
        return taken

    def views(self, now: float) -> tuple[WorkerView, ...]:
        """The workers as the plan sees them."""
        return tuple(worker.view(now) for worker in self.workers.values())

    def serves(self, generation: int, wanted: int) -> bool:
        """Whether a generation has just the workers that are wanted, and all serve."""
        present = [
            worker
            for worker in self.workers.values()
            if worker.generation == generation
            and worker.slot != HELPER
            and worker.state in (WorkerState.BOOTING, WorkerState.SERVING)
        ]
        serving = {worker.slot for worker in present if worker.state is WorkerState.SERVING}
        return len(present) == wanted and serving == set(range(1, wanted + 1))

    def take_clients(self, before: float = inf) -> bool:
        """Whether a worker of a generation before this one may take one more client."""
        return any(worker.takes_clients and worker.generation < before for worker in self.workers.values())

    def spawn(self, slot: int, generation: int, main: ChildMain, listeners: Sequence[str] = ()) -> None:
        """Forks a child, which serves at these addresses.

        Raises:
            BootError: it can't be forked; then the slot waits.
        """
        now = time.monotonic()
        try:
            worker = self._spawner.spawn(slot, generation, main, now)
        except (OSError, OverflowError) as error:
            failure = BootError(f"can't make {f'worker {slot}' if slot else 'a helper'}: {system_reason(error)}")
            log.error("%s", failure)
            before = self.slots[generation].get(slot, Slot())
            self.slots[generation][slot] = slot_after_failed_fork(before, now, random.random())  # noqa: S311
            raise failure from None
        worker.listeners = list(listeners)
        self.adopt(worker)
        log.debug("%s boots, pid %d", worker.name, worker.pid)

    def adopt(self, worker: Worker) -> None:
        """Takes in a child that this process has forked."""
        self.workers[worker.pid] = worker
        if worker.readable:
            self._selector.register(worker.channel, selectors.EVENT_READ, lambda mask: self._read_channel(worker))
        if worker.stderr >= 0:
            self._selector.register(worker.stderr, selectors.EVENT_READ, lambda mask: self._read_stderr(worker))

    def tell(self, worker: Worker, event: WorkerEvent, signum: signal.Signals, why: str = "") -> None:
        """Signals a worker, whose state changes by that. The order to end goes by its channel, too: a handler's code
        may have set a handler of its own for the signal, or its default.
        """
        if why:
            worker.cause = f"{worker.cause}; {why}" if worker.cause else why
        if event is WorkerEvent.KILL:
            worker.killed_in = worker.killed_in or worker.state
        boots = worker.state is WorkerState.BOOTING
        _change_state(worker, event)
        # The signal comes first: after the order it could be taken for a second one, by a worker that ends already.
        signalled = boots or not dies_of(worker.pid, signum)
        if signalled:
            self._spawner.signal(worker, signum)
        if not boots and not self._order(worker, signum) and not signalled:
            self._spawner.signal(worker, signum)

    def _order(self, worker: Worker, signum: signal.Signals) -> bool:
        """Sends the order that a signal stands for; whether it is on its way."""
        order = _ORDERS.get(signum)
        if order is None or worker.slot == HELPER or not worker.readable:
            return False
        try:
            worker.channel.send(order)
        except ChannelClosed:  # its exit tells, or what it does not read
            return False
        return True

    def dump_stacks(self, worker: Worker, cause: str) -> None:
        """Has a worker that is about to be killed write the stacks of its threads, on its standard error."""
        log.error("%s (pid %d): %s; these are its stacks:", worker.name, worker.pid, cause)
        worker.dumped_at = time.monotonic()
        self._spawner.signal(worker, signals.DUMP)

    def nudge(self) -> None:
        """Has a worker that waits in accept(2) call it again, and so see that the listener is not to block."""
        for worker in self.workers.values():
            if worker.slot != HELPER:
                self._spawner.signal(worker, signals.NUDGE)

    def recycle(self, generation: int, slots: Collection[int], why: str) -> None:
        """Has the workers of a generation in these slots replaced; none named: in all."""
        for worker in self.workers.values():
            if worker.generation == generation and worker.slot != HELPER and (not slots or worker.slot in slots):
                worker.recycle_reason = worker.recycle_reason or why

    def send_all(
        self,
        command: LogCommand | ListenerCommand | CertificatesCommand,
        opened: Callable[[], int],
        generation: int | None = None,
        since: float = -inf,
    ) -> None:
        """Sends every worker, or every one of a generation, or that was forked since then, a command with a descriptor,
        which is opened for each and closed here. One that does not read is left to its stall timeout.
        """
        for worker in self.workers.values():
            if not worker.readable or worker.slot == HELPER or worker.forked_at < since:
                continue
            if generation in (None, worker.generation):
                descriptor = -1
                try:
                    descriptor = opened()
                    worker.channel.send_with_descriptors(command, [descriptor])
                except (ChannelClosed, OSError) as error:
                    log.warning("can't send to %s (pid %d): %s", worker.name, worker.pid, system_reason(error))
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)

    def ask(self, query: Query) -> Question:
        """Asks all workers a question."""
        return self.questions.ask(self.workers.values(), query)

    def reap(self) -> None:
        """Takes out every child that has ended."""
        for ended in self._spawner.reap():
            worker = self.workers.pop(ended.pid, None)
            if worker is not None:
                self._on_exit(worker, ended)

    def close_in_child(self) -> None:
        """In a forked child: closes all that is the master's alone."""
        for worker in self.workers.values():
            worker.channel.close()
            if worker.stderr >= 0:
                os.close(worker.stderr)

    def listener_counts(self) -> dict[str, list[int]]:
        """What was counted for each listener, by its address, of workers that have ended too: by `ListenerField`."""
        found = {name: list(counts) for name, counts in self.exited_listeners.items()}
        for worker in self.workers.values():
            for place, name in enumerate(worker.listeners):
                counts = listener_counts(worker.row, place)
                found[name] = _sum(found[name], counts) if name in found else counts
        return found

    # What children send

    def _read_channel(self, worker: Worker) -> None:
        if not worker.readable:  # closed by an event before this one in the same round
            return
        try:
            messages = worker.channel.receive()
        except MalformedInput as error:
            self._reject_message(worker, str(error), MOST_INVALID)
            return
        except ChannelClosed:
            self._stop_reading(worker)
            return
        for message in messages:
            if worker.invalid_messages >= MOST_INVALID:
                break
            self._on_message(worker, message)

    def _on_message(self, worker: Worker, message: JsonObject) -> None:
        try:
            event: ChildEvent | InvalidMessage = decode_event(message)
        except InvalidMessage as error:
            event = error
        if worker.slot == HELPER:
            self._events.append(HelperSaid(worker, event))
            return
        match event:
            case ReadyEvent():
                _note_ready(worker)
            case FailedEvent():
                reason, details = shorten(event.reason, _MOST_REASON), shorten(event.details, _MOST_DETAILS)
                worker.cause = f"could not boot: {reason}"
                worker.failure = BootError(f"worker {worker.slot} could not boot: {reason}", details)
            case WornEvent(why):
                if not worker.recycle_reason:
                    worker.recycle_reason = shorten(why, 200) or "it says so"
                    log.info("worker %d (pid %d) is to be replaced: %s", worker.slot, worker.pid, worker.recycle_reason)
            case DrainingEvent():
                worker.takes_clients = False
            case CertificatesEvent():
                self._events.append(CertificatesTold(worker, event))
            case AnswerEvent():
                if wrong := self.questions.take_answer(worker, event):
                    self._reject_message(worker, wrong, 1)
            case InvalidMessage():
                self._reject_message(worker, str(event), 1)
            case _:
                self._reject_message(worker, "only helpers send it", 1)

    def _reject_message(self, worker: Worker, why: str, weight: int) -> None:
        """Counts an invalid message. A child that sends many is read no more, and replaced."""
        worker.invalid_messages += weight
        log.warning("%s (pid %d): invalid message: %s", worker.name, worker.pid, why)
        if worker.invalid_messages >= MOST_INVALID:
            worker.recycle_reason = worker.recycle_reason or "it sends invalid messages"
            self._stop_reading(worker)

    def _stop_reading(self, worker: Worker) -> None:
        if worker.readable:
            worker.readable = False
            self._selector.unregister(worker.channel)
            if worker.slot != HELPER:  # a helper's is closed by the receiver of `HelperExited`
                worker.channel.close()

    def _read_stderr(self, worker: Worker) -> bool:
        """Takes what a child has written to standard error into the log, one read of it; whether there may be more."""
        if worker.stderr < 0:  # as in `_read_channel`
            return False
        try:
            data = os.read(worker.stderr, _CHUNK)
        except BlockingIOError:
            return False
        lines = (worker.partial_line + data.decode(errors="backslashreplace")).split("\n")
        worker.partial_line = lines.pop()
        if worker.partial_line and (not data or len(worker.partial_line) > _LONGEST_LINE):
            lines.append(worker.partial_line)
            worker.partial_line = ""
        worker.stderr_lines.extend(line[:_LONGEST_LINE] for line in lines)
        if lines and worker.slot != HELPER:  # a helper's go to the client that waits for the outcome
            text, about = "\n".join(lines), {"worker": worker.slot}
            log.warning("worker %d (pid %d) output: %s", worker.slot, worker.pid, text, extra=about)
        if not data:
            self._close_stderr(worker)
        return bool(data)

    def _close_stderr(self, worker: Worker) -> None:
        if worker.stderr >= 0:
            self._selector.unregister(worker.stderr)
            os.close(worker.stderr)
            worker.stderr = -1

    # How they end

    def _on_exit(self, worker: Worker, ended: Exit) -> None:
        self._read_the_rest(worker)
        self._stop_reading(worker)
        if worker.slot == HELPER:
            _change_state(worker, WorkerEvent.EXIT)
            worker.row.clear()
            self._events.append(HelperExited(worker, ended))
            return
        expected = worker.state in (WorkerState.DRAINING, WorkerState.CLOSING)
        state, now = worker.killed_in or worker.state, time.monotonic()
        _change_state(worker, WorkerEvent.EXIT)
        self.exited_totals[worker.slot].update(counters_of(worker.row))
        for place, name in enumerate(worker.listeners):
            former = self.exited_listeners.pop(name, [0] * LISTENER_CELLS)
            counted = listener_counts(worker.row, place)
            counted[ListenerField.CLOSED] = counted[ListenerField.OPENED]  # what was open is closed with its worker
            self.exited_listeners[name] = _sum(former, counted)
        while len(self.exited_listeners) > MOST_LISTENERS:  # reloads may go from address to address for ever
            del self.exited_listeners[next(iter(self.exited_listeners))]
        self.handler_metrics.keep(worker.row.regions, worker.pid, worker.row.index)
        failure = self._failure_of(worker, ended, expected=expected)
        self.exit_counts[EXPECTED if expected else _counted_cause(worker, ended)] += 1
        self.exit_records.append(exit_record(worker, ended, now, expected=expected))
        # One that drained by a signal from elsewhere (to the whole process group) has done nothing wrong.
        level = logging.INFO if expected or ended.status == 0 else logging.ERROR
        told_by = self._told_by(worker, now)
        if told_by:
            level = logging.INFO
        log.log(level, "%s", exit_message(worker, ended, told_by), extra={"worker": worker.slot})
        worker.row.clear()
        if state in (WorkerState.DRAINING, WorkerState.CLOSING):
            self._events.append(WorkerExited(worker, None))
            return
        served = 0.0 if worker.ready_at is None else now - worker.ready_at
        slots = self.slots[worker.generation]
        before = slots.pop(worker.slot, Slot())
        jitter = random.random()  # noqa: S311
        slots[worker.slot] = slot_after_exit(before, state, now, served, jitter, others=slots.values())
        self._events.append(WorkerExited(worker, failure))

    def _told_by(self, worker: Worker, now: float) -> int:
        """The slot of a worker that could not boot for the same reason, which was logged in full a moment ago; 0 where
        there is none: a mistake in a handler is every worker's, and told once.
        """
        if worker.failure is None:
            return 0
        if self._told is not None and now - self._told[1] < _TELL_AGAIN and _same_failure(self._told[0], worker):
            return self._told[0].slot
        self._told = worker, now
        return 0

    def _read_the_rest(self, worker: Worker) -> None:
        """Reads what a child that has ended left in its channel and on its standard error."""
        for _ in range(_LAST_READS):
            if worker.readable:
                self._read_channel(worker)
        for _ in range(_LAST_READS):
            if worker.stderr < 0 or not self._read_stderr(worker):
                break
        if worker.partial_line:
            worker.stderr_lines.append(worker.partial_line)
        self._close_stderr(worker)

    def _failure_of(self, worker: Worker, ended: Exit, *, expected: bool) -> BootError:
        """Completes the cause of an exit; the same as an error."""
        out_of_memory = self._has_run_out_of_memory()  # at each exit, so that no other's kill is taken for this one's
        if out_of_memory and ended.code == -signal.SIGKILL and worker.killed_in is None:
            worker.cause = _OUT_OF_MEMORY
        if worker.failure is not None:
            return worker.failure
        if worker.ready_at is not None or expected:
            return BootError(f"worker {worker.slot} has ended: {ended}" + (f", {worker.cause}" if worker.cause else ""))
        why = f"could not boot: {worker.cause}" if worker.cause else f"ended before it was ready: {ended}"
        worker.cause = worker.cause or "it ended before it was ready"
        return BootError(f"worker {worker.slot} {why}", shorten("\n".join(worker.stderr_lines), _MOST_DETAILS))

    def _has_run_out_of_memory(self) -> bool:
        before, self._oom_kills = self._oom_kills, oom_kills()
        return before is not None and self._oom_kills is not None and self._oom_kills > before


def _sum(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _same_failure(one: Worker, other: Worker) -> bool:
    details = [worker.failure.details if worker.failure is not None else "" for worker in (one, other)]
    return (one.generation, one.cause) == (other.generation, other.cause) and details[0] == details[1]


def _counted_cause(worker: Worker, ended: Exit) -> str:
    """Which of `CAUSES` the end of a worker counts as that was not told to end, or did not do it in time."""
    if worker.killed_in is not None:
        deadlines = {WorkerState.BOOTING: "boot_timeout", WorkerState.SERVING: "stalled"}
        return deadlines.get(worker.killed_in, "drain_timeout")
    if worker.cause == _OUT_OF_MEMORY:
        return "out_of_memory"
    if worker.ready_at is None:
        return "boot"
    return "signal" if ended.code < 0 else "exit"


def exit_record(worker: Worker, ended: Exit, now: float, *, expected: bool) -> dict[str, Any]:
    """What `forkd status` shows of a worker that has ended: `clients` are the connections that were cut, `words` its
    last lines on standard error.
    """
    return {
        "time": time.time(),
        "slot": worker.slot,
        "pid": worker.pid,
        "generation": worker.generation,
        "expected": expected,
        "exit": str(ended),
        "code": ended.code,
        "cause": shorten(worker.cause, _MOST_REASON),
        "age": round(now - worker.forked_at, 3),
        "clients": max(0, worker.row.active),
        "peak_memory": ended.peak_memory,
        "words": [shorten(line, _RECORD_WIDTH) for line in worker.stderr_lines],
    }


def exit_message(worker: Worker, ended: Exit, told_by: int = 0) -> str:
    """What the log says of a worker that has ended; the traceback that it could not boot for stands below it, unless
    the log has it of another worker, in the slot `told_by`.
    """
    text = f"worker {worker.slot} (pid {worker.pid}) has ended: {ended}"
    if told_by:
        return f"{text}, could not boot, as worker {told_by}"
    text += f", {worker.cause}" if worker.cause else ""
    details = worker.failure.details.rstrip() if worker.failure is not None else ""
    return text + (f"\n{details}" if details else "")


def _note_ready(worker: Worker) -> None:
    if worker.state is WorkerState.BOOTING:
        worker.ready_at, worker.takes_clients = time.monotonic(), True
        log.info("worker %d is ready, pid %d", worker.slot, worker.pid, extra={"worker": worker.slot})
    _change_state(worker, WorkerEvent.READY)


def _change_state(worker: Worker, event: WorkerEvent) -> None:
    state = next_worker_state(worker.state, event)
    if state is not worker.state:
        worker.state, worker.since = state, time.monotonic()


@dataclass(slots=True)
class Question:
    """A query that was sent to workers.

    Attributes:
        number: its number.
        deadline: when it is over at the latest, on the monotonic clock.
        asked: the workers that it was sent to.
        not_asked: those that it was not sent to, because they owe too many answers.
        answers: by pid, as they were claimed.
    """

    number: int
    deadline: float
    asked: list[Worker] = field(default_factory=list)
    not_asked: list[Worker] = field(default_factory=list)
    answers: dict[int, object] = field(default_factory=dict)

    def missing(self) -> list[Worker]:
        """The workers that live, could answer, and have not."""
        return self.not_asked + [
            worker
            for worker in self.asked
            if self.number in worker.unanswered and worker.readable and worker.state is not WorkerState.GONE
        ]

    def is_over(self) -> bool:
        """Whether no further answer is waited for."""
        return len(self.missing()) == len(self.not_asked) or time.monotonic() >= self.deadline


class Questions:
    """All questions that are open. Each has a number that no other one has, also over an upgrade."""

    def __init__(self) -> None:
        self._numbers = itertools.count(time.monotonic_ns())
        self._open: dict[int, Question] = {}

    def ask(self, workers: Iterable[Worker], query: Query, within: float = ANSWER_TIMEOUT) -> Question:
        """Asks those of the workers that can answer.

        Args:
            workers: the workers.
            query: what is asked; it gets its number here.
            within: seconds until it is over at the latest.
        """
        question = Question(next(self._numbers), time.monotonic() + within)
        self._open[question.number] = question
        numbered = query.replace(number=question.number)
        for worker in workers:
            if worker.slot == HELPER or worker.state not in _ANSWERING or not worker.readable:
                continue
            if len(worker.unanswered) >= MOST_UNANSWERED:
                question.not_asked.append(worker)
                continue
            try:
                worker.channel.send(numbered)
            except ChannelClosed:  # it has ended or is about to, which its exit will tell
                continue
            worker.unanswered.add(question.number)
            question.asked.append(worker)
        return question

    def take_answer(self, worker: Worker, answer: AnswerEvent) -> str:
        """Takes an answer; what is wrong with it, empty where it is as it should be."""
        if answer.number not in worker.unanswered:
            return "an answer without a question"
        worker.unanswered.discard(answer.number)
        if len(encode(answer)) > LARGEST_ANSWER:
            return f"an answer of more than {LARGEST_ANSWER} bytes"
        question = self._open.get(answer.number)
        if question is not None:  # else it comes too late
            question.answers[worker.pid] = answer.found
        return ""

    def forget_finished(self) -> float | None:
        """Forgets the questions that are over; when the next one is at the latest, None for never."""
        self._open = {number: question for number, question in self._open.items() if not question.is_over()}
        return min((question.deadline for question in self._open.values()), default=None)
