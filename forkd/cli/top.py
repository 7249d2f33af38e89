"""`forkd top`: a daemon's status, live on a terminal, or as one picture.

`take_snapshot` asks the daemon and the kernel; `picture` makes lines of that, and `press` does what a key says. Both
know nothing of the terminal, which `_Screen` has, by curses. A thread asks (`_Sampler`), so that keys are obeyed while
the master stands still. The daemon may end meanwhile: that is shown, and it is tried again every second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from forkd import MOST_WORKERS
from forkd.cli.control_client import REPLY_SECONDS, MasterConnection
from forkd.cli.locate import connect, every_daemon
from forkd.cli.status import age, read_status, table
from forkd.cli.target import WantedDaemon, wanted_daemon
from forkd.errors import ForkdError, NotRunning, escaped, printable
from forkd.messages import ClientsReply, ClientsRequest, KilledReply, KillRequest, ScaledReply, ScaleRequest
from forkd.system.client_list import list_clients
from forkd.system.run_directory import RunDirectory
from forkd.system.scoreboard import REGION_SIZE

WORKERS, CLIENTS = "workers", "clients"

_SECONDS = 1.0  # between two samples
_BAR = 10  # characters
_MOST_LISTENERS = 5  # that are shown where there is little room

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of a table: its head, the key of a row that it sorts by, and how that is shown."""

    head: str
    key: str
    text: Callable[[Any], str] = str


class Line(NamedTuple):
    """A line of the picture, and how it looks: `plain`, `head`, `good`, `bad`, `chosen` or `keys`."""

    text: str
    look: str = "plain"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was found out at one time.

    Attributes:
        now: seconds since the epoch.
        status: the daemon's; empty where it can't be asked.
        rates: connections a second, by the pids of workers; 0: of all.
        clients: its clients, where they were asked for.
        error: why something can't be told.
    """

    now: float
    status: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[int, float] = field(default_factory=dict)
    clients: Sequence[Row] = ()
    error: str = ""


@dataclass(slots=True)
class View:
    """What the user has chosen to see.

    Attributes:
        page: `WORKERS` or `CLIENTS`.
        sort: the number of the column that rows are sorted by.
        descending: whether the largest come first.
        chosen: the row that keys are about, by its pid or ID.
        order: what a `y` will do, as of `press`.
        message: what has become of the last order.
    """

    page: str = WORKERS
    sort: int = 0
    descending: bool = False
    chosen: int | None = None
    order: tuple[str, int] | None = None
    message: str = ""


def _size(count: int | None) -> str:
    """Bytes in a few characters."""
    if count is None:
        return "-"
    number, units = float(count), "BKMGT"
    while number >= 1000 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.0f}{units[0]}" if number >= 10 or units[0] == "B" else f"{number:.1f}{units[0]}"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else age(seconds)


def _text(value: object) -> str:
    return "-" if value is None else escaped(str(value))


_COLUMNS = {
    WORKERS: (
        Column("SLOT", "slot"), Column("PID", "pid"), Column("STATE", "state"), Column("AGE", "age", _time),
        Column("CLIENTS", "clients"), Column("CONN/S", "rate", lambda value: f"{value:.1f}"),
        Column("REFUSED", "all_refused"), Column("ENDED", "all_ended"), Column("ERRORS", "errors"),
        Column("MEM", "pss", _size),
    ),
    CLIENTS: (
        Column("ID", "id", _text), Column("SLOT", "worker"), Column("CLIENT", "client", _text),
        Column("AGE", "age", _time), Column("IDLE", "idle", _time), Column("IN", "in", _size),
        Column("OUT", "out", _size), Column("SENDQ", "sendq", _size), Column("STATE", "state"),
        Column("LISTENER", "listener", _text),
    ),
}  # fmt: skip

_KEY_OF_ROW = {WORKERS: "pid", CLIENTS: "id"}
_HELP = {
    WORKERS: "q quit  s sort  r reverse  c clients  + - scale",
    CLIENTS: "q quit  s sort  r reverse  c workers  up down choose  k kill",
}


def top(command: argparse.Namespace) -> int:
    """`forkd top`."""
    run = _find(wanted_daemon(command), only=command.target is None and command.name is None)
    if command.once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        sample = take_snapshot(run, View(), None)
        if not sample.status:
            raise ForkdError(sample.error)
        width = shutil.get_terminal_size((200, 24)).columns
        print(printable("\n".join(line.text for line in picture(sample, View(), width, None))))
        return 0
    import curses  # noqa: PLC0415 (for the live picture alone)

    signal.signal(signal.SIGTERM, _end)  # so that the terminal is as before
    try:
        curses.wrapper(lambda window: _Screen(window, run).run())
    except curses.error as error:
        raise ForkdError(f"this terminal can't show it ({error}); try --once, or another TERM") from None
    return 0


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def _find(wanted: WantedDaemon, *, only: bool) -> RunDirectory:
    """The run directory of the daemon that is meant; where none is named, that of the only one that runs."""
    try:
        with connect(wanted) as master:
            return master.run
    except NotRunning:
        running = [one.run for one in every_daemon() if one.run is not None and one.status] if only else []
        if len(running) > 1:
            names = ", ".join(one.name for one in running)
            raise ForkdError(f"several daemons run: {names}; say which one") from None
        if not running:
            raise
        return running[0]


def take_snapshot(run: RunDirectory, view: View, before: Snapshot | None) -> Snapshot:
    """What a daemon tells now.

    Args:
        run: its run directory.
        view: what is to be seen.
        before: the last sample, for the rates. Of a daemon that runs and does not answer it is told again, with the
            time since then.
    """
    now = time.time()
    try:
        with MasterConnection(run) as master:
            status = read_status(master, _SECONDS)
            rates = _rates(status, now, before)
            if view.page == WORKERS:
                return Snapshot(now, status, rates)
            try:
                return Snapshot(now, status, rates, _clients(master))
            except ForkdError as error:
                return Snapshot(now, status, rates, error=str(error))
    except (ForkdError, OSError) as error:
        if isinstance(error, NotRunning) or before is None or not before.status:
            return Snapshot(now, error=str(error))
        since = age(max(0.0, time.time() - before.now))
        return replace(before, error=f"no answer for {since}, and what is shown is older: {error}")


def _clients(master: MasterConnection) -> list[dict[str, Any]]:
    reply = master.ask(ClientsRequest(), ClientsReply, _SECONDS)
    descriptors = master.take_descriptors()
    try:
        readable = descriptors and reply.region_size == REGION_SIZE
        return list_clients(master.run.name, reply, descriptors[0] if readable else -1)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _rates(status: Mapping[str, Any], now: float, before: Snapshot | None) -> dict[int, float]:
    """Connections a second since the sample before; where there is none, since the start."""
    last: Mapping[str, Any] = {} if before is None else before.status
    accepted = {one["pid"]: one["accepted"] for one in last.get("workers", ())}
    since = last.get("totals", {}).get("accepted", 0)
    seconds = max(0.001, now - (before.now if before is not None and last else status["started"]))
    found = {
        one["pid"]: (one["accepted"] - accepted.get(one["pid"], 0)) / (seconds if last else max(0.001, one["age"]))
        for one in status["workers"]
    }
    return found | {0: max(0, status["totals"]["accepted"] - since) / seconds}


# The picture


def picture(sample: Snapshot, view: View, width: int, height: int | None) -> list[Line]:
    """The lines to be shown, none longer than the width.

    Args:
        sample: what there is to tell.
        view: what of it.
        width: of the terminal.
        height: of the terminal; None: as many lines as it takes.
    """
    status = sample.status
    if not status:
        lines = [Line(sample.error or "no answer", "bad"), Line("It is tried again every second.")]
    else:
        lines = [*_head(sample), Line(""), *_listeners(status, height)]
    room = None if height is None else max(1, height - len(lines) - 3)
    body = _rows(sample, view, room) if status else []
    deaths = [_last_death(status)] if status and status["deaths"] and view.page == WORKERS else []
    lines += [*([Line("")] if body else []), *body]
    if height is None:
        lines += deaths
    else:
        lines = lines[: height - 1]
        spare = height - 1 - len(lines)
        lines += (deaths if spare else []) + [Line("")] * (spare - len(deaths))
        lines.append(Line(_question(view) or view.message or _HELP[view.page], "keys"))
    return [Line(line.text[:width], line.look) for line in lines]


def _head(sample: Snapshot) -> list[Line]:
    """The daemon in two lines, and what is wrong with it."""
    status = sample.status
    clients, totals = sum(one["clients"] for one in status["workers"]), status["totals"]
    refused, ended = (sum(totals[key].values()) for key in ("refused", "ended"))
    up = age(max(0.0, sample.now - status["started"]))
    lines = [
        Line(
            f"{status['name']}: {status['state']}, pid {status['pid']}, up {up}, generation {status['generation']}, "
            f"forkd {status['version']}",
            "good" if status["state"] == "running" else "bad",
        ),
        Line(
            f"{status['serving']} of {status['wanted']} workers, {clients} clients, {sample.rates.get(0, 0.0):.1f} "
            f"connections/s; accepted {totals['accepted']}, refused {refused}, ended {ended}"
        ),
    ]
    failure = status["last_failure"]
    troubles = [status["reason"], f"the last {failure['text']}" if failure else "", sample.error]
    lines += [Line(escaped(trouble), "bad") for trouble in troubles if trouble]
    return lines + ([Line(f"{status['change']} is under way")] if status["change"] else [])


def _listeners(status: Mapping[str, Any], height: int | None) -> list[Line]:
    """A table of the listeners, with bars that show how full they are."""
    found = status["listeners"]
    shown = found if height is None else found[:_MOST_LISTENERS]
    rows = []
    for one in shown:
        queue = "-" if one["queue"] is None else f"{one['queue']}/{one['queue_limit']}"
        full = f"{_text(one['clients'])}/{one['limit']}" if one["limit"] else _text(one["clients"])
        rows.append([escaped(one["address"]), full, _bar(one["clients"], one["limit"]), queue, _text(one["drops"])])
    head, *body = table(["LISTENER", "CLIENTS", "FULL", "QUEUE", "DROPS"], rows)
    looks = ["bad" if one["drops"] or (one["limit"] or 1 << 62) <= (one["clients"] or 0) else "plain" for one in shown]
    lines = [Line(head, "head"), *map(Line, body, looks)]
    return lines + ([Line(f"and {len(found) - len(shown)} more")] if len(found) > len(shown) else [])


def _bar(count: int | None, limit: int | None) -> str:
    if not limit or count is None:
        return "-"
    filled = min(_BAR, round(_BAR * count / limit))
    return f"[{'#' * filled}{'.' * (_BAR - filled)}]"


def rows_of(sample: Snapshot, view: View) -> list[Row]:
    """The rows of the page in the order that is wanted; those where it is not known come last."""
    found: list[Row] = list(sample.clients)
    if view.page == WORKERS:
        found = [
            {
                **one,
                "rate": max(0.0, sample.rates.get(one["pid"], 0.0)),
                "all_refused": sum(one["refused"].values()),
                "all_ended": sum(one["ended"].values()),
            }
            for one in sample.status.get("workers", ())
        ]
    key = _COLUMNS[view.page][view.sort].key
    known = sorted((one for one in found if one[key] is not None), key=lambda one: one[key], reverse=view.descending)
    return known + [one for one in found if one[key] is None]


def _place(rows: Sequence[Row], view: View) -> int:
    """Where the chosen row is; the first where it has gone."""
    name = _KEY_OF_ROW[view.page]
    return next((place for place, one in enumerate(rows) if one[name] == view.chosen), 0)


def _rows(sample: Snapshot, view: View, room: int | None) -> list[Line]:
    """The page's table, as many rows as there is room for, with the chosen one among them."""
    rows, columns = rows_of(sample, view), _COLUMNS[view.page]
    place = _place(rows, view)
    first = 0 if room is None else max(0, min(place - room // 2, len(rows) - room))
    shown = rows[first:] if room is None else rows[first : first + room]
    mark = "v" if view.descending else "^"
    heads = [one.head + (mark if number == view.sort else "") for number, one in enumerate(columns)]
    head, *body = table(heads, [[one.text(row[one.key]) for one in columns] for row in shown])
    lines = [Line(head, "head")]
    for number, (row, text) in enumerate(zip(shown, body, strict=True), first):
        bad = row["state"] in ("stuck", "killed")
        lines.append(Line(text, "chosen" if room is not None and number == place else "bad" if bad else "plain"))
    return lines


def _last_death(status: Mapping[str, Any]) -> Line:
    death = status["deaths"][-1]
    when = time.strftime("%H:%M:%S", time.localtime(death["time"]))
    cause = f", {death['cause']}" if death["cause"] else ""
    look = "plain" if death["expected"] else "bad"
    return Line(escaped(f"last end: worker {death['slot']} (pid {death['pid']}), {when}, {death['exit']}{cause}"), look)


def _question(view: View) -> str:
    return "" if view.order is None else f"close the client {view.order[1]}? y or n"


# The keys


def press(key: str, sample: Snapshot, view: View) -> tuple[str, int] | None:
    """Does what a key says to the view.

    Returns:
        An order that is to be carried out: ("quit", 0), ("kill", ID) or ("scale", N); else None.
    """
    view.message = ""
    if view.order is not None:
        order, view.order = view.order, None
        return order if key == "y" else None
    rows = rows_of(sample, view)
    match key:
        case "q":
            return "quit", 0
        case "s" | ">" | "<":
            view.sort = (view.sort + (-1 if key == "<" else 1)) % len(_COLUMNS[view.page])
        case "r":
            view.descending = not view.descending
        case "c" | "\t":
            view.page = WORKERS if view.page == CLIENTS else CLIENTS
            view.sort, view.descending, view.chosen = 0, False, None
        case "up" | "down" if rows:
            place = _place(rows, view) + (1 if key == "down" else -1)
            view.chosen = rows[min(max(0, place), len(rows) - 1)][_KEY_OF_ROW[view.page]]
        case "k" if view.page == CLIENTS and rows:
            view.chosen = rows[_place(rows, view)]["id"]
            view.order = ("kill", rows[_place(rows, view)]["id"])
        case "+" | "-" if sample.status:
            wanted = sample.status["wanted"] + (1 if key == "+" else -1)
            return ("scale", wanted) if 1 <= wanted <= MOST_WORKERS else None
    return None


def carry_out(run: RunDirectory, order: tuple[str, int], seconds: float) -> str:
    """Carries an order out, and says what has become of it."""
    what, number = order
    try:
        with MasterConnection(run) as master:
            if what == "scale":
                count = master.ask(ScaleRequest(number), ScaledReply, seconds).workers
                return f"{count} workers"
            closed = master.ask(KillRequest(cookie=number), KilledReply, seconds).closed
            return f"closed the client {number}" if closed else f"the client {number} is gone"
    except (ForkdError, OSError) as error:
        return str(error)


# The terminal


class _Sampler:
    """Takes samples in a thread of its own, one after the other.

    Args:
        run: the daemon's run directory.
        view: what is to be seen; its page alone is read here.
        wake: called when there is a new sample, by that thread.
    """

    def __init__(self, run: RunDirectory, view: View, wake: Callable[[], None]) -> None:
        self._run, self._view, self._wake = run, view, wake
        self._wanted = threading.Event()
        self.sample = Snapshot(time.time(), error=f"{run.name} is asked")

    def start(self) -> None:
        """Begins; it ends with the process."""
        threading.Thread(target=self._go_on, daemon=True).start()

    def hurry(self) -> None:
        """Has the next sample taken at once."""
        self._wanted.set()

    def _go_on(self) -> None:
        while True:
            began = time.monotonic()
            self.sample = take_snapshot(self._run, self._view, self.sample)
            self._wake()
            took = time.monotonic() - began  # with many clients it takes long
            self._wanted.wait(_SECONDS if self.sample.error else max(_SECONDS, 3 * took))
            self._wanted.clear()


class _Screen:
    """The terminal.

    Args:
        window: the whole of it, of curses.
        run: the daemon's run directory.
    """

    def __init__(self, window: Any, run: RunDirectory) -> None:
        import curses  # noqa: PLC0415 (as `top` does)

        self._curses = curses
        self._window = window
        self._run = run
        self._view = View()
        # A new sample, the outcome of an order and a signal write to it; what is in it does not matter.
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._sampler = _Sampler(run, self._view, self._wake)
        self._keys = {
            curses.KEY_UP: "up", curses.KEY_DOWN: "down", curses.KEY_LEFT: "<", curses.KEY_RIGHT: ">", 27: "escape",
        }  # fmt: skip
        self._looks = dict.fromkeys(("plain", "good"), 0)
        self._looks |= {"head": curses.A_BOLD, "bad": curses.A_BOLD, "chosen": curses.A_REVERSE, "keys": curses.A_DIM}
        with contextlib.suppress(curses.error):  # a terminal without it
            curses.curs_set(0)
        if curses.has_colors() and not os.environ.get("NO_COLOR"):
            curses.use_default_colors()
            for number, (look, colour) in enumerate((("good", curses.COLOR_GREEN), ("bad", curses.COLOR_RED)), 1):
                curses.init_pair(number, colour, -1)
                self._looks[look] |= curses.color_pair(number)
        self._error: type[Exception] = curses.error

    def run(self) -> None:
        """Shows and obeys until the user has seen enough."""
        signal.signal(signal.SIGWINCH, lambda *_: None)  # it is looked for by `_size`
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._window.nodelay(True)
        self._sampler.start()
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            self._show(picture(self._sampler.sample, self._view, *self._size()))
            if any(event & select.POLLHUP for _, event in poll.poll()):  # the terminal is gone
                return
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            while (key := self._window.getch()) >= 0:
                if not self._obey(self._keys.get(key, chr(key) if key < 256 else "")):
                    return

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # enough is in it
            self._waker.send(b"\0")

    def _obey(self, key: str) -> bool:
        """Does what a key says; whether to go on."""
        page, sample = self._view.page, self._sampler.sample
        order = press(key, sample, self._view)
        if order == ("quit", 0):
            return False
        if order is not None:
            self._begin(order, sample)
        elif self._view.page != page:
            self._sampler.hurry()
        return True

    def _begin(self, order: tuple[str, int], sample: Snapshot) -> None:
        """Has an order carried out by a thread: a scale may take as long as a worker takes to boot."""
        seconds = sample.status.get("boot_timeout", 0.0) + REPLY_SECONDS
        self._view.message = f"scale to {order[1]} ..." if order[0] == "scale" else ""

        def carry() -> None:
            self._view.message = carry_out(self._run, order, seconds)
            self._wake()
            self._sampler.hurry()

        threading.Thread(target=carry, daemon=True).start()

    def _size(self) -> tuple[int, int]:
        """How many columns and lines there are now."""
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            if self._curses.is_term_resized(lines, columns):
                self._curses.resizeterm(lines, columns)
        height, width = self._window.getmaxyx()
        return max(1, width - 1), max(1, height)  # the last cell of the last line can't be written

    def _show(self, lines: Sequence[Line]) -> None:
        self._window.erase()
        for number, line in enumerate(lines):
            with contextlib.suppress(self._error):  # it was made smaller since
                self._window.addstr(number, 0, line.text, self._looks[line.look])
        self._window.refresh()
