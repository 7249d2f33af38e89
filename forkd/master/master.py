"""The master: one thread and one loop that waits for signals, control clients, children and the next deadline.

What is to be done is decided by `plan`, what a state allows stands in `states`, children are forked and read by
`workers`, requests answered by `commands`, and how one generation gives way to the next is in `reload`. `Master` drives
them, and never blocks: starting, changing and stopping are states that the one loop advances.

`Wakeup` makes signals something that this loop can wait for. The Python handlers do nothing: the interpreter's C
handler writes each signal's number to a socket, and the loop reads it there, at a point where the master's state is
whole (signal.set_wakeup_fd).
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from forkd import LONGEST_WAIT, MOST_WORKERS, signals
from forkd.errors import BootError, ForkdError, system_reason
from forkd.master import plan, status
from forkd.master.certificates import Refused, due_warnings
from forkd.master.commands import Requests
from forkd.master.control_socket import ControlClient, ControlSocket
from forkd.master.generation import Generation, wanted_workers
from forkd.master.reload import RELOAD, UPGRADE, Changes, LogFiles
from forkd.master.service_manager import ServiceManager
from forkd.master.spawn import Orphans, Spawner, Worker
from forkd.master.state import DaemonState, EntryPoints
from forkd.master.upgrade import LaunchContext, MasterSnapshot
from forkd.master.workers import CertificatesTold, HelperExited, HelperSaid, WorkerExited, WorkerPool
from forkd.messages import CertificatesCommand, CertificatesEvent, ErrorReply, HandOverReply, ListenerCommand
from forkd.signals import Command
from forkd.states import MasterEvent, MasterState, WorkerEvent, WorkerState, next_master_state
from forkd.system.channel import MOST_DESCRIPTORS, Channel
from forkd.system.logs import attach_log, detach_log
from forkd.system.notify import Notifier, forget_manager
from forkd.system.process import set_title
from forkd.system.scoreboard import Row, Scoreboard
from forkd.system.tls_files import Contents, pack

if TYPE_CHECKING:
    from forkd.master.admin.server import AdminServer

log = logging.getLogger("forkd.master")

#: Seconds by which a turn of the loop may be late before the gap is held against no worker.
LATE = 0.5

#: Seconds after which the master looks again whether its files are there, and its listeners as they should be.
LOOK = 1.0

_MINUTE = 60
_SET_RIGHT = " by another process, and is set right"


class Wakeup:
    """The socket that signals are read from. `fileno` makes it fit for a selector."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def install(self) -> None:
        """Has this process's signals of `signals.MASTER` arrive here from now on."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for row in signals.MASTER:
            signal.signal(row.signal, lambda *_: None)
        # The former image of this process has blocked all until now; so may have the process that started it.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def fileno(self) -> int:
        """What is readable when a signal has come."""
        return self._reader.fileno()

    def arrived(self) -> Iterator[signals.SignalEntry]:
        """The signals that have come, each once, in the table's order."""
        try:
            numbers = set(self._reader.recv(4096))
        except BlockingIOError:
            return
        yield from (row for row in signals.MASTER if row.signal in numbers)

    def close(self) -> None:
        """Closes it; for a forked child."""
        self._reader.close()
        self._writer.close()


class Master:
    """A master.

    Args:
        generation: the first one.
        board: the scoreboard.
        control: the control socket, on `selector`.
        selector: what the loop waits with.
        entry_points: what its children run.
        launch: what stays the same for every image of this daemon.
    """

    def __init__(
        self,
        generation: Generation,
        board: Scoreboard,
        *,
        control: ControlSocket,
        selector: selectors.BaseSelector,
        entry_points: EntryPoints,
        launch: LaunchContext,
    ) -> None:
        self._pool = WorkerPool(Spawner(board, self._close_in_child), selector)
        wanted = wanted_workers(generation.settings)
        notifier = Notifier(os.environ)
        self.state = DaemonState(generation, wanted, board, control, entry_points, launch, self._pool, notifier)
        self._selector = selector
        self._log_files = LogFiles(entry_points.log_target)
        self._changes = Changes(self.state, self._log_files)
        self._requests = Requests(self)
        self._orphans = Orphans()
        self._wakeup = Wakeup()
        self._look_at = 0.0  # when to look next whether the files are there
        self._not_restored = ""  # why they can't be made again
        self._repairs: dict[str, tuple[str, float]] = {}  # by address: what was set right, and when it was logged
        self._expected = inf  # when the next turn should begin
        self._gave_up: BootError | None = None
        self._admin: AdminServer | None = None
        self._may_have_garbage = False  # a child has ended since the last collection

    def run(self, snapshot: MasterSnapshot | None = None) -> None:
        """Runs the daemon to its end.

        Args:
            snapshot: the state of the image before this one, which goes on.

        Raises:
            BootError: it gave up, because workers can't be started.
        """
        state = self.state
        set_title(state.generation.settings.name, "master")
        self._wakeup.install()
        self._selector.register(self._wakeup, selectors.EVENT_READ, lambda mask: self._read_signals())
        state.share_control_socket()
        state.control.serve()
        attach_log(self, patience=0.0)  # nobody who reads the log may hold up the daemon
        self._manager = ServiceManager(state, resumed=snapshot is not None)
        if snapshot is None:
            addresses = ", ".join(str(bound.address) for bound in state.generation.bound)
            log.info("master listens on %s; workers: %d", addresses, state.wanted)
        else:
            state.restore(snapshot)
            log.info("new image of the master runs; workers: %d", len(state.workers))
            state.generation.certificates.ask_again()
            self._pool.reap()  # those that have ended in between
            self._take_events()
            for descriptor in snapshot.idle_clients:
                state.control.adopt(descriptor)
            self._changes.resume([state.control.adopt(descriptor, due=1) for descriptor in snapshot.clients])
        while state.master_state is not MasterState.OVER:
            self._turn()
        self._requests.answer_waiting()
        if self._admin is not None:
            self._admin.finish()
        detach_log()
        if self._gave_up:
            raise self._gave_up

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        """For the log: as of `log_writer.Loop`."""
        self._selector.register(fd, selectors.EVENT_WRITE, lambda mask: callback())

    def remove_writer(self, fd: int) -> None:
        """Likewise."""
        self._selector.unregister(fd)

    def _turn(self) -> None:
        """One turn of the loop: do what is due, then wait for what comes next."""
        now = time.monotonic()
        if now > self._expected + LATE:
            log.warning("event loop was delayed %.1f s (machine suspended?)", now - self._expected)
            self.state.awake_since = now
        change_at = self._look_for_events(now)
        asked_until = self._pool.questions.forget_finished()  # first: what is over by now is answered now
        answer_at = self._requests.answer_waiting()
        candidate = self._changes.candidate_view(self.state.generation.settings.boot_timeout)
        due = plan.make_plan(now, self.state.view(now, candidate))
        notify_at = self._manager.notify(now, self._changes.under_way)
        look_at = self._look_around(now)
        admin_at = self._advance_admin(now)
        for action in due.actions:
            self._perform(action)
        # Reckoned from the beginning of this turn: it may be in the middle of one that the master is stopped.
        if due.actions or self.state.master_state is MasterState.OVER:
            self._expected = now
            return
        again = now if self.state.control.has_requests() else None
        orphans_at = self._orphans.advance(now)
        wanted = (again, due.deadline, notify_at, asked_until, answer_at, orphans_at, look_at, admin_at, change_at)
        deadline = min((when for when in wanted if when is not None), default=None)
        timeout = None if deadline is None else min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT)
        self._expected = inf if deadline is None else deadline
        self._collect_garbage()
        for key, mask in self._selector.select(timeout):
            key.data(mask)
            self._take_events()
        for request, client in self.state.control.take_requests():
            self._requests.answer(request, client)

    def _advance_admin(self, now: float) -> float | None:
        """Has the master's own addresses served, where there are some; when to look at them again."""
        if self._admin is None:
            if not self.state.generation.services and self.state.generation.settings.statsd is None:
                return None
            from forkd.master.admin.server import AdminServer  # noqa: PLC0415 (few daemons need it)

            self._admin = AdminServer(self, self._selector)
        return self._admin.advance(now)

    def _look_around(self, now: float) -> float | None:
        """Once in a while sets right what others may have spoilt: the listeners, and the daemon's own files.

        Returns:
            When to look again; None where the daemon ends.
        """
        if not self.state.master_state.serves:
            return None
        if now >= self._look_at:
            self._look_at = now + LOOK
            if not self.state.superseded:
                self._look_at_listeners()
            self._look_at_files()
            self._look_at_certificates(now)
        return self._look_at

    def _look_at_files(self) -> None:
        """Makes again what something has removed: the run directory, the pid file, the control socket; not before the
        daemon runs, nor when another master has its name.
        """
        state = self.state
        if state.master_state is not MasterState.RUNNING or state.superseded or self._requests.succession:
            return
        try:
            if state.entry_points.restore_files(state.generation.identity) | state.control.restore():
                log.warning("run directory: files were removed, and are made again")
        except (ForkdError, OSError) as error:
            if (why := system_reason(error)) != self._not_restored:
                log.error("run directory: files were removed, and can't be made again: %s", why)
            self._not_restored = why
        else:
            self._not_restored = ""

    def _look_at_certificates(self, now: float) -> None:
        """Has the workers renew certificates whose files have changed, and warns of those that end soon."""
        generation = self.state.generation
        if self.state.master_state is not MasterState.RUNNING:
            return
        for found in generation.certificates.look(now):
            where = generation.bound[found.place].address
            if isinstance(found, Refused):
                log.error(
                    "listener %s: changed certificates are refused, and the former ones kept: %s", where, found.reason
                )
            elif generation.settings.chroot is None:
                self._send_certificates(found.place, found.number, found.contents)
            else:
                generation.certificates.forgo(found)
                log.warning("listener %s: certificates have changed; workers in a chroot need a forkd reload", where)
        for place, warning in due_warnings(generation.certificates, self.state.expiry_warned, time.time()):
            log.warning("listener %s: %s", generation.bound[place].address, warning)

    def _send_certificates(self, place: int, number: int, contents: Contents, since: float = -inf) -> None:
        """Sends them to the workers that serve, or to those that were forked since then."""
        try:
            descriptor = pack(contents)
        except OSError as error:
            log.error("certificates can't be sent to the workers: %s", system_reason(error))
            return
        try:
            command, opened = CertificatesCommand(place, number), partial(os.dup, descriptor)
            self._pool.send_all(command, opened, self.state.generation.number, since)
        finally:
            os.close(descriptor)

    def _take_certificates(self, worker: Worker, event: CertificatesEvent) -> None:
        """Notes what a worker tells of its certificates. Those that were renewed go to the workers that have begun
        meanwhile with the former ones.
        """
        generations = (self.state.generation, self._changes.candidate)
        for generation in generations:
            if generation is None or generation.number != worker.generation:
                continue
            certificates, now = generation.certificates, time.monotonic()
            were_known = certificates.told_of(event.place)  # not so by the next image of a master
            if (since := certificates.take_event(event, now)) is not None:
                files = ", ".join(one["file"] for one in certificates.told_of(event.place))
                if were_known:
                    log.info("listener %s: certificates are renewed: %s", generation.bound[event.place].address, files)
                self._send_certificates(event.place, event.number, certificates.contents, since)

    def _look_at_listeners(self) -> None:
        """Sets right what a worker can do to a listener that all share, and makes a path again that was removed. A
        socket is replaced while nothing else replaces workers.
        """
        state, faults = self.state, self.state.listener_faults
        if state.master_state is MasterState.STARTING:
            return  # after a restart's start that fails another master goes on, with settings of its own
        replace = not self._requests.succession
        before, number = dict(faults), state.generation.number
        faults.clear()
        self._look_at_services(replace=replace)
        for place, bound in enumerate(state.generation.bound):
            where = str(bound.address)
            try:
                repair = bound.repair(replace=replace and not self._changes.under_way)
            except ForkdError as error:
                faults[where] = str(error)
                if before.get(where) != str(error):
                    log.error("listener %s", error)
                continue
            if repair.found:
                self._tell_repair(where, f"{', '.join(repair.found)}{_SET_RIGHT}")
            if repair.blocked:
                self._pool.nudge()
            if repair.replaced:
                self._manager.listener_changed(bound)
                if bound.address.takes_datagrams:
                    self._pool.recycle(number, repair.slots, f"{where} was made again")
                else:
                    self._pool.send_all(ListenerCommand(place), partial(os.dup, bound.sockets[0].fileno()), number)

    def _look_at_services(self, *, replace: bool) -> None:
        """The same for the master's own addresses, which no worker has."""
        for bound in self.state.generation.services:
            try:
                if found := bound.repair(replace=replace).found:
                    self._tell_repair(str(bound.address), f"{', '.join(found)}{_SET_RIGHT}")
            except ForkdError as error:
                where = str(bound.address)
                self._tell_repair(where, str(error).removeprefix(f"{where}: "))

    def _tell_repair(self, where: str, found: str) -> None:
        """Logs what was set right about a listener, once a minute where it goes on and on."""
        now = time.monotonic()
        text, since = self._repairs.get(where, ("", -inf))
        if text != found or now - since > _MINUTE:
            self._repairs[where] = found, now
            log.warning("listener %s: %s", where, found)

    def _collect_garbage(self) -> None:
        """Collects garbage when a child has ended and nothing is to be done about it any more.

        A full collection also frees the interpreter's lists of free tuples, which grow with each change and each exit.
        In a process that makes so few objects there is none by itself. All objects of the start are frozen, so it takes
        a fraction of a millisecond.
        """
        if self._may_have_garbage:
            self._may_have_garbage = False
            gc.collect()

    def _take_events(self) -> None:
        """Handles what the children have sent. It is done after each descriptor that was ready, so that nothing is
        decided by a state that is no more.
        """
        for event in self._pool.take_events():
            match event:
                case WorkerExited(worker, failure):
                    end = self.state.generation.settings.orphans == "end"
                    self._orphans.look(worker, end=end, now=time.monotonic())
                    if failure is not None:
                        self._generation_failed(worker.generation, failure, had_served=worker.ready_at is not None)
                case CertificatesTold(worker, told):
                    self._take_certificates(worker, told)
                case HelperSaid(helper, said):
                    self._changes.helper_said(helper, said)
                case HelperExited(helper, ended):
                    self._changes.helper_exited(helper, ended)
                    helper.channel.close()

    def _perform(self, action: plan.Action) -> None:
        pool, workers = self._pool, self._pool.workers
        match action:
            case plan.Spawn(slot, of_candidate):
                generation = self._changes.candidate if of_candidate else self.state.generation
                if generation is not None:  # a candidate may have failed by an action before this one
                    self._spawn(slot, generation)
            case plan.Retire(pid, why):
                pool.tell(workers[pid], WorkerEvent.RETIRE, signals.DRAIN, why)
            case plan.Close(pid):
                # One that boots has no client and no handler for CLOSE, whose default is to dump core.
                booting = workers[pid].state is WorkerState.BOOTING
                pool.tell(workers[pid], WorkerEvent.CLOSE, signals.DRAIN if booting else signals.CLOSE)
            case plan.Dump(pid, cause):
                pool.dump_stacks(workers[pid], cause)
            case plan.Kill(pid, cause):
                log.error("killing %s (pid %d): %s", workers[pid].name, pid, cause)
                pool.tell(workers[pid], WorkerEvent.KILL, signals.KILL, cause)
            case plan.Drain():
                self._on_event(MasterEvent.DELAY_OVER)
            case plan.GiveUp():
                self._gave_up = self._why_given_up()
                self._on_event(MasterEvent.GAVE_UP)

    def _why_given_up(self) -> BootError:
        state = self.state
        if state.master_state is MasterState.STARTING:
            return state.last_failure or BootError("no worker could be started")
        bound = state.generation.settings.give_up_after
        return BootError(f"gave up: no worker serves, and each has failed {bound} times in a row (give_up_after)")

    def _spawn(self, slot: int, generation: Generation) -> None:
        def main(row: Row, channel: Channel) -> int:
            present = self.state.generation
            present.close_services()
            if generation is not present:
                present.close_all_but(generation)
            self._changes.close_in_child(generation)
            return self.state.entry_points.serve(generation, slot, row, channel)

        for bound in generation.bound:
            try:
                bound.reset_slot(slot)
            except (OSError, ForkdError) as error:
                log.warning("listener %s: what a worker has changed can't be set back: %s", bound.address, error)
        try:
            self._pool.spawn(slot, generation.number, main, [str(bound.address) for bound in generation.bound])
        except BootError as error:
            self._generation_failed(generation.number, error, had_served=False)

    def _look_for_events(self, now: float) -> float | None:
        """The events that are states of the pool; when to look again at the latest, None for no need."""
        if self.state.master_state is MasterState.STARTING and self.state.all_serve():
            self._on_event(MasterEvent.ALL_READY)
            self._changes.fit_sockets(self.state.wanted, shrink=True)
            self.state.entry_points.on_ready()
        again = self._changes.advance(now)
        if not self.state.workers and not self._orphans:
            self._on_event(MasterEvent.EMPTY)
        return again

    def _on_event(self, event: MasterEvent) -> None:
        state = self.state
        before, state.master_state = state.master_state, next_master_state(state.master_state, event)
        if state.master_state is before:
            return
        log.info("daemon state: %s (%s)", state.master_state.value, event.value)
        if state.master_state.ends:
            self._changes.cancel("the daemon stops")
        if state.master_state in (MasterState.DRAINING, MasterState.CLOSING):
            state.superseded = state.superseded or state.control.displaced
            state.remember_closed_listeners(state.generation.bound)
            if state.superseded:
                for bound in state.generation.services:  # the successor may end, and another want them, before this
                    bound.disown()
                    bound.remove()
            for bound in state.generation.bound:  # a client that comes now is refused rather than left waiting
                if state.superseded:
                    bound.disown()  # the path is the successor's
                if not (
                    state.superseded or state.notifier.has_manager
                ):  # else another master goes on with these sockets
                    bound.stop_receiving()
                bound.remove()

    def _generation_failed(self, number: int, error: BootError, *, had_served: bool) -> None:
        if number != self.state.generation.number:
            self._changes.generation_failed(number, error)
        elif not had_served:
            self.state.last_failure = error

    def _close_in_child(self) -> None:
        """In a forked child: closes all that is the master's alone."""
        self._selector.close()
        self._wakeup.close()
        if self._admin is not None:
            self._admin.close()
        self.state.control.close()
        self.state.notifier.close()
        forget_manager()
        self._pool.close_in_child()
        self.state.entry_points.close_in_child()

    # What signals and requests ask for

    def _read_signals(self) -> None:
        for row in self._wakeup.arrived():
            self.obey(row.command, row.signal.name)

    def obey(self, command: Command, source: str) -> None:
        """Does what a signal, or a request, asks for."""
        match command:
            case Command.REAP:
                self._pool.reap()
                self._may_have_garbage = True
                self._take_events()
            case Command.STOP:
                log.info("stop requested by %s", source)
                self._stop()
            case Command.QUIT:
                log.info("immediate stop requested by %s", source)
                self._on_event(MasterEvent.QUIT)
            case Command.MORE | Command.FEWER:
                self.scale(self.state.wanted + (1 if command is Command.MORE else -1), source)
            case Command.REOPEN:
                self._log_files.reopen(self.state.generation, self._pool)
            case Command.RELOAD:
                self.change(RELOAD)
            case Command.UPGRADE:
                self.change(UPGRADE)

    def _stop(self) -> None:
        """Drains; where the settings have it so, only when balancers have had time to learn of it. Where another master
        goes on in its place they have nothing to learn.
        """
        state, delay = self.state, self.state.generation.settings.stop_delay
        if delay and state.master_state is MasterState.RUNNING and not (state.superseded or state.control.displaced):
            state.drain_at = time.monotonic() + delay
            self._on_event(MasterEvent.LEAVE)
        else:
            self._on_event(MasterEvent.STOP)

    def drain(self, *, drained: bool, source: str) -> None:
        """Has balancers told that they should send no clients from now on, or that they should again."""
        self.state.drained = drained
        log.info("daemon is %s (by %s)", "drained: balancers are told so" if drained else "resumed", source)

    def scale(self, wanted: int, source: str) -> str:
        """Wants another number of workers from now on; or why that can't be."""
        wanted = min(MOST_WORKERS, max(1, wanted))
        try:
            self._changes.fit_sockets(wanted)
        except ForkdError as error:
            # Of several listeners the first may have got its sockets.
            self._changes.fit_sockets(self.state.wanted, shrink=True)
            log.error("scale to %d workers refused, %d stay (by %s): %s", wanted, self.state.wanted, source, error)
            return str(error)
        self.state.wanted = wanted
        log.info("scale to %d workers requested by %s", wanted, source)
        self._changes.fit_sockets(wanted, shrink=True)
        return ""

    def change(self, verb: str, client: ControlClient | None = None) -> None:
        """Reloads or upgrades, or tells what a reload would change."""
        if self._requests.succession:  # the other master has taken its listeners from those of today
            log.warning("%s: refused, a restart is under way", verb)
            if client is not None:
                client.reply(ErrorReply("a restart is under way"))
            return
        self._changes.ask(verb, client)

    def hand_over(self, client: ControlClient) -> None:
        """Lends the lock and the listeners to another master, which is to succeed this one."""
        bound = [*self.state.generation.bound, *self.state.generation.services]
        sockets = [sock.fileno() for one in bound for sock in one.sockets]
        if len(sockets) >= MOST_DESCRIPTORS:
            client.reply(ErrorReply(f"{len(sockets)} sockets are too many to hand over; stop and start it"))
            return
        client.reply(HandOverReply([one.describe() for one in bound]), [self.state.launch.lock, *sockets])

    def status(self) -> dict[str, Any]:
        """The state of the daemon, fit for JSON."""
        return status.status(self.state, self._changes.under_way)
