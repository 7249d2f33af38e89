"""`forkd clients`: the connected clients in a table or as JSON, and the end of some of them.

`system.client_list` finds those that have connections. Datagram sockets have none: only the worker knows which clients
have lately sent it something, and is asked by way of the master. To close connections is a request to the master, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from forkd.cli.locate import connect
from forkd.cli.status import age, or_dash, table
from forkd.cli.target import wanted_daemon
from forkd.config import values
from forkd.config.address import parse_address
from forkd.errors import ForkdError, UsageError, escaped, printable
from forkd.messages import ClientsReply, ClientsRequest, KilledReply, KillRequest, PeersReply, PeersRequest
from forkd.system.client_list import Client, list_clients
from forkd.system.scoreboard import REGION_SIZE

#: The columns of the table, in order.
COLUMNS = ("id", "worker", "listener", "client", "age", "idle", "in", "out", "recvq", "sendq", "rtt", "state")

#: The columns that a peer of a datagram socket lacks, as it has no connection.
_NO_CONNECTION: Client = {**dict.fromkeys(("id", "proxy", "in", "out", "recvq", "sendq", "rtt")), "state": "recent"}

_NUMBERS = re.compile("([0-9]+)")


def clients(command: argparse.Namespace) -> int:
    """`forkd clients`."""
    if command.kill is not None or command.kill_ip is not None:
        return _kill(command)
    column = command.sort.removeprefix("-")
    if column not in COLUMNS:
        raise UsageError(f"--sort {command.sort}: there is no such column; there are {', '.join(COLUMNS)}")
    with connect(wanted_daemon(command)) as master:
        reply = master.ask(ClientsRequest(), ClientsReply)
        descriptors = master.take_descriptors()
        peers_reply = master.ask(PeersRequest(), PeersReply) if reply.datagrams else PeersReply([], [])
    try:
        readable = descriptors and reply.region_size == REGION_SIZE  # else it is of another version
        found = list_clients(master.run.name, reply, descriptors[0] if readable else -1)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    recent = peers_reply.peers
    if command.listener is not None:
        wanted = _checked_listener(command.listener, [one["address"] for one in reply.listeners] + reply.datagrams)
        found = [one for one in found if one["listener"] == wanted]
        recent = [one for one in recent if one["listener"] == wanted]
    descending = command.sort.startswith("-")
    found = _sorted(found, column, descending=descending)
    peers = _sorted([{**_NO_CONNECTION, **peer} for peer in recent], column, descending=descending)
    table = "\n".join(_client_table(found) + _peer_table(peers))
    print(json.dumps(found + peers, indent=2) if command.json else printable(table))
    for one in peers_reply.silent:
        print(printable(f"worker {one['slot']} (pid {one['pid']}) has not listed its peers in time"), file=sys.stderr)
    return 0


def _kill(command: argparse.Namespace) -> int:
    """Closes connections. Where a worker has not answered, there may be some left, which is an error."""
    if command.json or command.listener is not None:
        raise UsageError("--kill and --kill-ip take neither --json nor --listener")
    request = KillRequest(cookie=command.kill)
    if command.kill_ip is not None:
        try:
            request = KillRequest(network=str(values.NETWORK.parse(command.kill_ip)))
        except ValueError as error:
            raise UsageError(f"--kill-ip: {error}") from None
    with connect(wanted_daemon(command)) as master:
        run, done = master.run, master.ask(request, KilledReply)
    closed, silent = done.closed, done.silent
    if closed:
        print(f"{run.name}: closed {closed} client{'s' if closed > 1 else ''}")
    if silent and (command.kill_ip is not None or not closed):
        names = ", ".join(f"worker {one['slot']} (pid {one['pid']})" for one in silent)
        raise ForkdError(f"no answer in time from {names}")
    if not closed:
        sought = f"the ID {command.kill}" if command.kill_ip is None else f"an address in {request.network}"
        raise ForkdError(f"{run.name} has no client with {sought}")
    return 0


def _checked_listener(text: str, known: Sequence[str]) -> str:
    try:
        address = str(parse_address(text))
    except ValueError as error:
        raise UsageError(f"--listener: {error}") from None
    if address not in known:
        raise UsageError(f"--listener {address}: the daemon does not listen there; it does on {', '.join(known)}")
    return address


# The table


def _sorted(found: list[Client], column: str, *, descending: bool) -> list[Client]:
    """Clients in the order of a column; those where it is not known come last, either way."""
    known = [one for one in found if one[column] is not None]
    known.sort(key=lambda one: _sort_key(one[column]), reverse=descending)
    return known + [one for one in found if one[column] is None]


def _sort_key(value: Any) -> Any:
    """A key by which numbers in a text, such as those of an address, are compared as numbers."""
    if not isinstance(value, str):
        return value
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(value)]


def _client_table(found: list[Client]) -> list[str]:
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


def _peer_table(peers: list[Client]) -> list[str]:
    """A table of the clients that have lately sent datagrams."""
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
