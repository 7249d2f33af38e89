"""The commands that look and change nothing: `status` and `check`.

Errors are raised for `cli.main` to print. `table`, `age` and `or_dash` are how the commands that look show what they
have found; `clients` shows its tables by them too, and `restart` checks by `check_all`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forkd.cli.control_client import REPLY_SECONDS, MasterConnection
from forkd.cli.locate import connect, looked_in, places
from forkd.cli.target import WantedDaemon, wanted_daemon
from forkd.errors import ForkdError, NotAllowed, NotRunning, OtherProject, escaped, printable
from forkd.messages import ClientsReply, ClientsRequest, StatusReply, StatusRequest
from forkd.system.proc import memory_of, network_namespace_of
from forkd.system.run_directory import RunDirectory
from forkd.system.socket_stats import connections_at

# The exit statuses of `forkd status`, as init scripts have them (LSB).
_EXIT_STOPPED = 3
_EXIT_DEAD = 1

_DATAGRAM_SCHEMES = ("udp:", "unix-dgram:")
_DATAGRAM_COUNTS = ("received", "sent", "dropped")


def status(command: argparse.Namespace) -> int:
    """`forkd status`."""
    wanted = wanted_daemon(command)
    try:
        found = _ask_status(wanted)
    except NotRunning:
        name, looked = wanted.name, places(wanted)
        pid = next((pid for place in looked if (pid := _left_pid(name, place)) is not None), None)
        state = "stopped" if pid is None else "dead"
        words = f"is stopped{looked_in(wanted)}" if pid is None else f"is dead, but left its pid file (pid {pid})"
        plain: dict[str, object] = {"name": name, "state": state}
        if len(looked) > 1:
            plain["looked_in"] = [str(place) for place in looked]
        print(json.dumps(plain) if command.json else printable(f"{name} {words}"))
        return _EXIT_STOPPED if pid is None else _EXIT_DEAD
    except OtherProject as error:
        print(printable(f"forkd: {error}"), file=sys.stderr)
        return NotAllowed.status
    print(json.dumps(found, indent=2) if command.json else printable(_status_text(found)))
    return 0


def _left_pid(name: str, place: Path) -> int | None:
    """The number in the pid file of a daemon that does not run, if it has left one that can be read."""
    try:
        return RunDirectory(name, place).pid_file.probe()[1]
    except ForkdError:
        return None


def _ask_status(wanted: WantedDaemon) -> dict[str, Any]:
    with connect(wanted) as master:
        return read_status(master)


def read_status(master: MasterConnection, seconds: float = REPLY_SECONDS) -> dict[str, Any]:
    """The master's status, with what may take longer to find out than the master should: the workers' memory, and how
    many connections each listener has. Raises as `MasterConnection.ask`.
    """
    found = master.ask(StatusRequest(), StatusReply, seconds).status
    reply = master.ask(ClientsRequest(), ClientsReply, seconds)
    for descriptor in master.take_descriptors():
        os.close(descriptor)
    for worker in found["workers"]:
        worker["rss"], worker["pss"] = memory_of(worker["pid"])
    sockets = {one["address"]: one["sockets"] for one in reply.listeners}
    for listener in found["listeners"]:
        listener["clients"] = None
        with contextlib.suppress(ForkdError), network_namespace_of(reply.pid):
            if listener["address"] in sockets:
                listener["clients"] = connections_at(sockets[listener["address"]])
    return found


# What `status` shows


def _status_text(found: dict[str, Any]) -> str:
    lines = [*_state_lines(found), "", *_worker_table(found["workers"]), "", *_listener_table(found["listeners"])]
    lines += _certificate_table(found["listeners"])
    lines += _datagram_table(found)
    lines += _death_counts(found)
    if found["deaths"]:
        head = ["DEATH", "WORKER", "PID", "AGE", "CLIENTS", "MEMORY", "CAUSE"]
        lines += ["", *table(head, [_death_row(death) for death in found["deaths"]])]
        lines += _last_output(found["deaths"])
    return "\n".join(lines)


def _state_lines(found: dict[str, Any]) -> Iterator[str]:
    since = _when(found["started"])
    hot_path = f" ({found['hot_path']})" if "hot_path" in found else ""  # of an older master it is not known
    yield f"{found['name']}: {found['state']}, pid {found['pid']}, since {since}, forkd {found['version']}{hot_path}"
    if found["serving"] != found["wanted"]:
        yield f"{found['serving']} of {found['wanted']} workers serve"
    if found.get("drained"):
        yield "drained: balancers are told to send no clients, until forkd resume"
    if found["reason"]:
        yield from found["reason"].split("; ")
    if failure := found["last_failure"]:
        yield f"the last {escaped(failure['text'])} (at {_when(failure['time'])})"
    if lost := found.get("log_lines_lost"):
        yield f"{lost} log lines lost: the log could not be written"
    if found["change"]:
        yield f"{found['change']} is under way"


def _worker_table(workers: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in workers:
        heartbeat = "-" if one["heartbeat_age"] is None else age(one["heartbeat_age"])
        state = [one["slot"], one["pid"], one["state"], one["generation"], age(one["age"])]
        counts = [one["clients"], one["accepted"], sum(one["refused"].values()), sum(one["ended"].values())]
        rows.append([*state, *counts, one["errors"], heartbeat, _memory(one["rss"]), _memory(one["pss"])])
    head = "WORKER PID STATE GENERATION AGE CLIENTS ACCEPTED REFUSED ENDED ERRORS HEARTBEAT RSS PSS"
    return table(head.split(), rows)


def _listener_table(listeners: list[dict[str, Any]]) -> list[str]:
    return table(
        ["LISTENER", "HANDLER", "CLIENTS", "QUEUE", "DROPS", "RESETS"],
        [
            [
                *(one["address"], one["handler"], _clients(one), _queue(one)),
                *(or_dash(one["drops"]), or_dash(one["resets"])),
            ]
            for one in listeners
        ],
    )


def _certificate_table(listeners: list[dict[str, Any]]) -> list[str]:
    """A table of certificates, where there are some: of which listener, when each ends, and for which names it is."""
    rows = []
    for one in listeners:
        for certificate in one.get("certificates", ()):  # a master of an older version tells of none
            names = ", ".join(certificate["names"])
            rows.append([one["address"], escaped(certificate["file"]), _ends(certificate["expires"]), escaped(names)])
    return ["", *table(["LISTENER", "CERTIFICATE", "ENDS", "NAMES"], rows)] if rows else []


def _ends(when: float) -> str:
    """A day, and how far away it is."""
    days = (when - time.time()) / 86_400
    distance = f"in {days:.0f} days" if days >= 0 else f"{-days:.0f} days ago"
    return f"{time.strftime('%Y-%m-%d', time.localtime(when))} ({distance})"


def _queue(listener: dict[str, Any]) -> str:
    """How many clients wait to be accepted, and how many may."""
    return "-" if listener["queue"] is None else f"{listener['queue']}/{listener['queue_limit']}"


def _clients(listener: dict[str, Any]) -> str:
    """How many connections it has, and how many it may have where that is limited."""
    count = or_dash(listener["clients"])
    return f"{count}/{listener['limit']}" if listener["limit"] else f"{count}"


def _memory(count: int | None) -> str:
    return "-" if count is None else f"{count / (1 << 20):.0f} MiB"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _death_counts(found: dict[str, Any]) -> list[str]:
    """How many workers have ended unexpectedly since the start, by cause; nothing where none has."""
    counts = [f"{cause} {count}" for cause, count in found["death_counts"]["unexpected"].items() if count]
    return ["", f"Deaths in all: {', '.join(counts)}; expected {found['death_counts']['expected']}"] if counts else []


def _datagram_table(found: dict[str, Any]) -> list[str]:
    """A table of datagrams received and sent, where there are listeners for them."""
    if not any(item["address"].startswith(_DATAGRAM_SCHEMES) for item in found["listeners"]):
        return []
    counts = [[w["slot"], w["pid"], *(w["datagrams"][key] for key in _DATAGRAM_COUNTS)] for w in found["workers"]]
    return ["", *table(["WORKER", "PID", "RECEIVED", "SENT", "SENDS DROPPED"], counts)]


def _death_row(death: dict[str, Any]) -> list[Any]:
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(death["time"]))
    cause = death["exit"] + (f", {death['cause']}" if death["cause"] else "")
    memory = f"{death['peak_memory'] / (1 << 20):.0f} MiB"
    return [when, death["slot"], death["pid"], age(death["age"]), death["clients"], memory, escaped(cause)]


def _last_output(deaths: list[dict[str, Any]]) -> list[str]:
    """What the last worker that died unexpectedly wrote to standard error in the end."""
    last = next((death for death in reversed(deaths) if not death["expected"] and death["words"]), None)
    if last is None:
        return []
    return ["", f"The last words of worker {last['slot']}, pid {last['pid']}:", *map(escaped, last["words"])]


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table, each column as wide as its widest cell."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def age(seconds: float) -> str:
    """A duration as text, in the largest unit that it reaches."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.1f}s"


def or_dash(value: object) -> str:
    """A value as text; a dash where it is not known."""
    return "-" if value is None else str(value)
