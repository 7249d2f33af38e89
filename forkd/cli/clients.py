"""`forkd clients`: the online clients in a table or as JSON, and the end of some of them by an operator's word.

Who is online is found out by `roster`, without the workers; to close a connection is the master's to ask of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from forkd.cli.ask import Conversation
from forkd.cli.roster import Client, list_clients
from forkd.cli.target import run_directory_of
from forkd.cli.text import age, or_dash, table
from forkd.config import units
from forkd.config.address import parse_address
from forkd.errors import ForkdError, UsageError
from forkd.system.logs import escaped
from forkd.system.pidfile import RunDirectory
from forkd.wire import Message

#: Those of the table, in order.
COLUMNS = ("id", "worker", "listener", "client", "age", "idle", "in", "out", "recvq", "sendq", "rtt", "state")

#: Of a peer that sends datagrams there is none of what a connection has.
_NO_CONNECTION: Client = {**dict.fromkeys(("id", "in", "out", "recvq", "sendq", "rtt")), "state": "recent"}

_NUMBERS = re.compile("([0-9]+)")


def clients(command: argparse.Namespace) -> int:
    """`forkd clients`."""
    run = run_directory_of(command)
    if command.kill is not None or command.kill_ip is not None:
        return _kill(run, command)
    column = command.sort.removeprefix("-")
    if column not in COLUMNS:
        raise UsageError(f"--sort {command.sort}: there is no such column; there are {', '.join(COLUMNS)}")
    with Conversation(run) as master:
        told = master.ask({"verb": "clients"})
        descriptors = master.take_descriptors()
        asked = master.ask({"verb": "peers"}) if told["datagrams"] else {"peers": [], "silent": []}
    try:
        found = list_clients(run.name, told, descriptors[0] if descriptors else -1)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if command.listener is not None:
        wanted = _listener(command.listener, [one["address"] for one in told["listeners"]] + told["datagrams"])
        found = [one for one in found if one["listener"] == wanted]
        asked["peers"] = [one for one in asked["peers"] if one["listener"] == wanted]
    descending = command.sort.startswith("-")
    found = _sorted(found, column, descending=descending)
    peers = _sorted([{**_NO_CONNECTION, **peer} for peer in asked["peers"]], column, descending=descending)
    print(json.dumps(found + peers, indent=2) if command.json else "\n".join(_text(found) + _peers(peers)))
    for one in asked["silent"]:
        print(f"worker {one['slot']} (pid {one['pid']}) has not told its peers in time", file=sys.stderr)
    return 0


def _listener(text: str, known: Sequence[str]) -> str:
    try:
        address = str(parse_address(text))
    except ValueError as error:
        raise UsageError(f"--listener: {error}") from None
    if address not in known:
        raise UsageError(f"--listener {address}: the daemon does not listen there; it does on {', '.join(known)}")
    return address


def _sorted(found: list[Client], column: str, *, descending: bool) -> list[Client]:
    """In the order of a column; what is not known comes last, either way."""
    known = [one for one in found if one[column] is not None]
    known.sort(key=lambda one: _key(one[column]), reverse=descending)
    return known + [one for one in found if one[column] is None]


def _key(value: Any) -> Any:
    """Numbers that stand in a text, as those of an address do, count as numbers."""
    if not isinstance(value, str):
        return value
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(value)]


def _text(found: list[Client]) -> list[str]:
    return table(
        [column.upper() for column in COLUMNS],
        [
            [
                one["id"], one["worker"], one["listener"], or_dash(one["client"]), _seconds(one["age"]),
                _seconds(one["idle"]), or_dash(one["in"]), or_dash(one["out"]), one["recvq"], one["sendq"],
                "-" if one["rtt"] is None else f"{one['rtt'] * 1e3:.2f}ms", one["state"],
            ]
            for one in found
        ],
    )  # fmt: skip


def _peers(peers: list[Client]) -> list[str]:
    """Who has sent datagrams of late."""
    if not peers:
        return []
    head = ["WORKER", "LISTENER", "RECENT PEER", "AGE", "IDLE", "DATAGRAMS IN", "OUT"]
    rows = [
        [
            one["worker"], escaped(one["listener"]), escaped(one["client"]), age(one["age"]), age(one["idle"]),
            one["datagrams_in"], one["datagrams_out"],
        ]
        for one in peers
    ]  # fmt: skip
    return ["", *table(head, rows)]


def _seconds(value: float | None) -> str:
    return "-" if value is None else age(value)


def _kill(run: RunDirectory, command: argparse.Namespace) -> int:
    """Closes connections. Where a worker has not answered it is not known that none is left."""
    if command.json or command.listener is not None:
        raise UsageError("--kill and --kill-ip take neither --json nor --listener")
    request: Message = {"verb": "kill", "cookie": command.kill}
    if command.kill_ip is not None:
        try:
            request["network"] = str(units.NETWORK.parse(command.kill_ip))
        except ValueError as error:
            raise UsageError(f"--kill-ip: {error}") from None
    with Conversation(run) as master:
        done = master.ask(request)
    closed, silent = done["closed"], done["silent"]
    if closed:
        print(f"{run.name}: closed {closed} client{'s' if closed > 1 else ''}")
    if silent and (command.kill_ip is not None or not closed):
        names = ", ".join(f"worker {one['slot']} (pid {one['pid']})" for one in silent)
        raise ForkdError(f"no answer in time from {names}")
    if not closed:
        whose = f"the ID {command.kill}" if command.kill_ip is None else f"an address in {request['network']}"
        raise ForkdError(f"{run.name} has no client with {whose}")
    return 0
