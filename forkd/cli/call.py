"""`forkd call`: one request to a server of any kind, and its answer; never without an end."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from math import inf
from time import monotonic
from typing import NoReturn

from forkd.cli.exchange import LARGEST, Failed, Tries, ask, exchange
from forkd.config.address import Address, parse_address
from forkd.config.escapes import octets, parse_escaped
from forkd.config.scales import parse_duration
from forkd.errors import ForkdError, UsageError

TIMEOUT = 1.0  # seconds of a try, where the command line says nothing else
TOTAL = 60.0  # seconds of a whole exchange over a stream
DATAGRAM_RETRIES = 5

_FORMS = "tcp://HOST:PORT, unix:/path, unix:@name, udp://HOST:PORT, unix-dgram:/path or unix-dgram:@name"


def call(command: argparse.Namespace) -> int:
    """`forkd call`."""
    place = _parse_place(command.address)
    timeout, total = (_duration(command, name) for name in ("timeout", "deadline"))
    if command.until is not None and (place.takes_datagrams or command.rdp):
        raise UsageError("--until is for streams; a datagram's answer is one datagram")
    until = None if command.until is None else _delimiter(command.until)
    if command.rdp and place.scheme != "udp":
        raise UsageError(f"--rdp goes over udp://HOST:PORT, not to {place}")
    request = _request(command)
    if command.rdp:
        answer = _call_reliably(place, request, timeout, total, command.retries)
    else:
        retries, patience = (DATAGRAM_RETRIES, inf) if place.takes_datagrams else (0, TOTAL)
        tries = Tries(
            retries=retries if command.retries is None else command.retries,
            timeout=timeout or TIMEOUT,
            end=monotonic() + (total or patience),
        )
        try:
            answer = _ask(place, request, tries) if place.takes_datagrams else exchange(place, request, tries, until)
        except Failed as error:
            _give_up(place, tries.made, monotonic() - tries.began, str(error))
    _show(answer, as_hex=command.hex)
    return 0


def _ask(address: Address, request: bytes, tries: Tries) -> bytes:
    if address.is_unix:
        path = "\0" + address.path[1:] if address.abstract else address.path
        return ask([(socket.AF_UNIX, path)], request, tries)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise Failed(error.strerror or str(error)) from None
    return ask([(family, where) for family, _, _, _, where in found], request, tries)


def _call_reliably(
    place: Address, request: bytes, timeout: float | None, total: float | None, retries: int | None
) -> bytes:
    from forkd.rdp import GaveUp, RdpClient, Timers  # noqa: PLC0415 (who calls otherwise does not pay for it)

    host, port = place.host, place.port
    try:
        with RdpClient(host, port, timeout=timeout, retries=retries, timers=Timers(patience=total)) as client:
            return client.request(request)
    except GaveUp as error:
        why = "nobody listens there" if error.unreachable else "no answer"
        _give_up(place, error.tries, error.seconds, why)
    except ValueError as error:
        raise UsageError(f"--rdp: {error}") from None
    except OSError as error:
        raise ForkdError(f"{place} can't be asked: {error.strerror or error}") from None


def _give_up(place: Address, tries: int, seconds: float, why: str) -> NoReturn:
    times = f"{tries} {'try' if tries == 1 else 'tries'}"
    raise ForkdError(f"gave up on {place} after {times} in {seconds:.1f} s: {why}")


# What is asked


def _parse_place(text: str) -> Address:
    """Where `text` says. Raises UsageError."""
    try:
        place = parse_address(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if place.scheme == "fd":
        raise UsageError(f"{text!r} can't be called; write {_FORMS}")
    if not place.is_unix and not place.port:
        raise UsageError(f"{text!r} can't be called: port 0 is nobody's")
    return place


def _duration(command: argparse.Namespace, name: str) -> float | None:
    """An option's seconds, more than none; None where it is not given. Raises UsageError."""
    text = getattr(command, name)
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--{name}: {error}") from None
    if not seconds:
        raise UsageError(f"--{name}: no answer comes in no time")
    return seconds


def _request(command: argparse.Namespace) -> bytes:
    """The bytes to send, from the command line or from standard input. Raises UsageError."""
    if command.data in (None, "-"):
        if sys.stdin is None:
            raise UsageError("no DATA, and no standard input to read it from")
        data = sys.stdin.buffer.read(LARGEST + 1)
    else:
        data = os.fsencode(command.data)
    if len(data) > LARGEST:
        raise UsageError(f"a request of more than {LARGEST} bytes")
    if not command.hex:
        return data
    try:
        return bytes.fromhex(data.decode("ascii"))
    except ValueError:
        raise UsageError(f"{data[:40]!r} is not hexadecimal; write two digits a byte, as in '48 69'") from None


def _delimiter(text: str) -> bytes:
    """The octets of a delimiter. Raises UsageError."""
    try:
        delimiter = octets(parse_escaped(text))
    except ValueError as error:
        raise UsageError(f"--until: {error}") from None
    if not delimiter:
        raise UsageError("--until: an empty delimiter ends nothing")
    return delimiter


# What is answered


def _show(answer: bytes, *, as_hex: bool) -> None:
    """The answer on standard output as it is. A terminal gets the line feed that it lacks."""
    if as_hex:
        print(answer.hex())
        return
    sys.stdout.buffer.write(answer)
    if sys.stdout.isatty() and not answer.endswith(b"\n"):
        sys.stdout.buffer.write(b"\n")
