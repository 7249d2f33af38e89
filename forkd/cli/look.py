"""The commands that look and change nothing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

from forkd.app.check import check_addresses, check_handlers
from forkd.app.whereabouts import run_directory
from forkd.cli.ask import Conversation
from forkd.cli.parser import make_parser
from forkd.cli.target import read_target, run_directory_of
from forkd.cli.text import age, or_dash, table
from forkd.config.load import Loaded
from forkd.config.schema import json_schema, reference_page
from forkd.errors import ConfigError, ForkdError, NotRunning
from forkd.system.identity import Identity, look_up
from forkd.system.limits import lacking_files
from forkd.system.logs import escaped

_STOPPED = 3
_DEAD = 1


def status(command: argparse.Namespace) -> int:
    """`forkd status`."""
    run = run_directory_of(command)
    try:
        with Conversation(run) as master:
            found = master.ask({"verb": "status"})["status"]
    except NotRunning:
        _, pid = run.pid_file.holder()
        state = "stopped" if pid is None else "dead"
        words = f"{run.name} is stopped" if pid is None else f"{run.name} is dead, but left its pid file (pid {pid})"
        print(json.dumps({"name": run.name, "state": state}) if command.json else words)
        return _STOPPED if pid is None else _DEAD
    print(json.dumps(found, indent=2) if command.json else _status_text(found))
    return 0


def _status_text(found: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["started"]))
    lines = [f"{found['name']}: {found['state']}, pid {found['pid']}, since {since}, forkd {found['version']}"]
    if found["serving"] != found["wanted"]:
        lines.append(f"{found['serving']} of {found['wanted']} workers serve")
    if found["reason"]:
        lines += found["reason"].split("; ")
    if found["refusal"]:
        lines.append(f"the last {escaped(found['refusal'])}")
    if found["change"]:
        lines.append(f"{found['change']} is under way")
    lines.append("")
    lines += table(
        ["WORKER", "PID", "STATE", "GENERATION", "AGE", "CLIENTS", "ACCEPTED", "REFUSED", "ENDED", "ERRORS"],
        [
            [
                *(w["slot"], w["pid"], w["state"], w["generation"], age(w["age"]), w["clients"], w["accepted"]),
                *(sum(w["refused"].values()), sum(w["ended"].values()), w["errors"]),
            ]
            for w in found["workers"]
        ],
    )
    lines.append("")
    lines += table(
        ["LISTENER", "HANDLER", "QUEUE", "DROPS"],
        [[item["address"], item["handler"], _queue(item), or_dash(item["drops"])] for item in found["listeners"]],
    )
    lines += _datagrams(found)
    if found["deaths"]:
        head = ["DEATH", "WORKER", "PID", "AGE", "CLIENTS", "MEMORY", "CAUSE"]
        lines += ["", *table(head, [_death(death) for death in found["deaths"]])]
        lines += _last_words(found["deaths"])
    return "\n".join(lines)


def _queue(listener: dict[str, Any]) -> str:
    """How many clients wait to be accepted, of how many that may."""
    return "-" if listener["queue"] is None else f"{listener['queue']}/{listener['queue_limit']}"


def _datagrams(found: dict[str, Any]) -> list[str]:
    """What came and went as datagrams, where there are listeners for them."""
    if not any(item["address"].startswith(_DATAGRAMS) for item in found["listeners"]):
        return []
    counts = [[w["slot"], w["pid"], *(w["datagrams"][key] for key in _COUNTS)] for w in found["workers"]]
    return ["", *table(["WORKER", "PID", "RECEIVED", "SENT", "SENDS DROPPED"], counts)]


_DATAGRAMS = ("udp:", "unix-dgram:")
_COUNTS = ("received", "sent", "dropped")


def _death(death: dict[str, Any]) -> list[Any]:
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(death["time"]))
    cause = death["exit"] + (f", {death['cause']}" if death["cause"] else "")
    memory = f"{death['peak_memory'] / (1 << 20):.0f} MiB"
    return [when, death["slot"], death["pid"], age(death["age"]), death["clients"], memory, escaped(cause)]


def _last_words(deaths: list[dict[str, Any]]) -> list[str]:
    """What the last of those that nobody had asked to end wrote to standard error in the end."""
    last = next((death for death in reversed(deaths) if not death["expected"] and death["words"]), None)
    if last is None:
        return []
    return ["", f"The last words of worker {last['slot']}, pid {last['pid']}:", *map(escaped, last["words"])]


def check(command: argparse.Namespace) -> int:
    """`forkd check`."""
    loaded = read_target(command)
    check_all(loaded)
    if loaded.problems:
        raise ConfigError(loaded.problems)
    for warning in lacking_files(loaded.settings):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{loaded.settings.name}: the settings, the addresses and the handlers are in order")
    return 0


def check_all(loaded: Loaded) -> None:
    """Adds what is wrong with the addresses and the handlers to what is wrong with the settings themselves."""
    run = run_directory(loaded.settings)
    try:
        with Conversation(run) as master:
            ours = {item["address"] for item in master.ask({"verb": "status"})["status"]["listeners"]}
    except ForkdError:
        ours = set()
    for index, error in check_addresses(loaded.settings, ours):
        loaded.add(str(error), "listen", loaded.listeners[index], "address")
    settings, (identity, flaws) = loaded.settings, look_up(loaded.settings)
    if flaws and os.geteuid() == 0:
        return  # as root, which the workers are not to be, nobody's code is run
    if flaws:
        settings, identity = replace(settings, user=None, chroot=None), Identity()
    for index, reason, details in check_handlers(settings, identity):
        if index < 0:
            loaded.add(reason, "chroot" if settings.user is None else "user")
        else:
            loaded.add(reason, "listen", loaded.listeners[index], "handler")
        if details:
            print(details, end="", file=sys.stderr)


def schema(command: argparse.Namespace) -> int:
    """`forkd schema`."""
    print(reference_page() if command.markdown else json.dumps(json_schema(), indent=2))
    return 0


def completion(command: argparse.Namespace) -> int:
    """`forkd completion`."""
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError:
        raise ForkdError("completions need the package shtab: pip install 'forkd-server[completion]'") from None
    print(shtab.complete(make_parser(), shell=command.shell))
    return 0
