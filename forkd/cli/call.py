"""`forkd call`: one request to a server of any kind, and its answer; every wait has an end.

Over a stream a request that has been sent is not sent again, since the server may have acted upon it; only connecting
is tried again. By datagrams it is sent again when no answer comes: the server must cope with the same request twice.
Over the reliable datagram protocol (`forkd.rdp`) it is carried out once at most.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import socket
import sys
import time
from math import inf
from time import monotonic
from typing import Any, NoReturn

from forkd import LONGEST_WAIT
from forkd.client import connect
from forkd.config.address import Address, parse_address
from forkd.config.units import parse_duration, parse_escaped, unescape
from forkd.errors import ForkdError, UsageError

TRY_TIMEOUT = 1.0  # seconds of a try, where the command line says nothing else
STREAM_DEADLINE = 60.0  # seconds of a whole call_stream over a stream
DATAGRAM_RETRIES = 5

#: Bytes of a request or an answer at most.
MAX_SIZE = 1 << 26

_CHUNK = 1 << 16
_PAUSE = 0.1  # seconds before a refused connection is tried again; longer each time
_FORMS = "tcp://HOST:PORT, unix:/path, unix:@name, udp://HOST:PORT, unix-dgram:/path or unix-dgram:@name"


def call(command: argparse.Namespace) -> int:
    """`forkd call`."""
    target = _parse_target(command.address)
    timeout, total = (_duration(command, name) for name in ("timeout", "deadline"))
    if command.until is not None and (target.takes_datagrams or command.rdp):
        raise UsageError("--until is for streams; a datagram's answer is one datagram")
    until = None if command.until is None else _delimiter(command.until)
    if command.rdp and target.scheme != "udp":
        raise UsageError(f"--rdp goes over udp://HOST:PORT, not to {target}")
    request = _request(command)
    if command.rdp:
        answer = _call_rdp(target, request, timeout, total, command.retries)
    else:
        retries, deadline = (DATAGRAM_RETRIES, inf) if target.takes_datagrams else (0, STREAM_DEADLINE)
        attempts = Attempts(
            retries=retries if command.retries is None else command.retries,
            timeout=timeout or TRY_TIMEOUT,
            end=monotonic() + (total or deadline),
        )
        try:
            answer = _call_server(target, request, attempts, until)
        except CallFailed as error:
            _give_up(target, attempts.made, monotonic() - attempts.began, str(error))
    _print_answer(answer, as_hex=command.hex)
    return 0


def _call_server(address: Address, request: bytes, attempts: Attempts, until: bytes | None) -> bytes:
    if not address.takes_datagrams:
        return call_stream(address, request, attempts, until)
    if address.is_unix:
        path = "\0" + address.path[1:] if address.abstract else address.path
        return call_datagrams([(socket.AF_UNIX, path)], request, attempts)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise CallFailed(error.strerror or str(error)) from None
    return call_datagrams([(family, where) for family, _, _, _, where in found], request, attempts)


def _call_rdp(
    target: Address, request: bytes, timeout: float | None, total: float | None, retries: int | None
) -> bytes:
    from forkd.rdp import GaveUp, RdpClient, Timers  # noqa: PLC0415 (imported only for --rdp)

    host, port = target.host, target.port
    try:
        with RdpClient(host, port, timeout=timeout, retries=retries, timers=Timers(patience=total)) as client:
            return client.request(request)
    except GaveUp as error:
        why = "nothing listens there" if error.unreachable else "no answer"
        _give_up(target, error.tries, error.seconds, why)
    except ValueError as error:
        raise UsageError(f"--rdp: {error}") from None
    except OSError as error:
        raise ForkdError(f"{target} can't be asked: {error.strerror or error}") from None


def _give_up(target: Address, tries: int, seconds: float, why: str) -> NoReturn:
    times = f"{tries} {'try' if tries == 1 else 'tries'}"
    raise ForkdError(f"gave up on {target} after {times} in {seconds:.1f} s: {why}")


# The command line, standard input and standard output


def _parse_target(text: str) -> Address:
    """The address to call. Raises UsageError."""
    try:
        target = parse_address(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if target.scheme == "fd":
        raise UsageError(f"{text!r} can't be called; write {_FORMS}")
    if not target.is_unix and not target.port:
        raise UsageError(f"{text!r} can't be called: port 0 is no server's")
    return target


def _duration(command: argparse.Namespace, name: str) -> float | None:
    """An option's seconds, above 0; None where it is not given. Raises UsageError."""
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
        data = sys.stdin.buffer.read(MAX_SIZE + 1)
    else:
        data = os.fsencode(command.data)
    if len(data) > MAX_SIZE:
        raise UsageError(f"a request of more than {MAX_SIZE} bytes")
    if not command.hex:
        return data
    try:
        return bytes.fromhex(data.decode("ascii"))
    except ValueError:
        raise UsageError(f"{data[:40]!r} is not hexadecimal; write two digits a byte, as in '48 69'") from None


def _delimiter(text: str) -> bytes:
    """The octets of a delimiter. Raises UsageError."""
    try:
        delimiter = unescape(parse_escaped(text))
    except ValueError as error:
        raise UsageError(f"--until: {error}") from None
    if not delimiter:
        raise UsageError("--until: an empty delimiter ends nothing")
    return delimiter


def _print_answer(answer: bytes, *, as_hex: bool) -> None:
    """Prints the answer as it is. A terminal gets the line feed that it lacks."""
    if as_hex:
        print(answer.hex())
        return
    sys.stdout.buffer.write(answer)
    if sys.stdout.isatty() and not answer.endswith(b"\n"):
        sys.stdout.buffer.write(b"\n")


# What all calls have in common


class CallFailed(Exception):
    """There is no answer; the message is the reason, for the user."""


class Attempts:
    """How often and how long a call may try, and how often it has.

    Args:
        retries: tries beyond the first.
        timeout: seconds that a try takes at most; over a stream, seconds without a byte in either direction.
        end: the deadline of the whole call, on the monotonic clock.

    Attributes:
        made: tries up to now.
        began: when the call began.
    """

    def __init__(self, retries: int, timeout: float, end: float) -> None:
        self.retries, self.timeout, self.end = retries, timeout, end
        self.made = 0
        self.began = monotonic()

    def begin(self) -> float:
        """Counts another try, and returns its deadline."""
        self.made += 1
        return min(monotonic() + self.timeout, self.end)

    @property
    def last(self) -> bool:
        """Whether the present try is the last."""
        return self.made > self.retries or monotonic() >= self.end


def _poll(poll: select.poll, until: float) -> list[tuple[int, int]]:
    """The events of a poll until a deadline; none when it is over."""
    left = until - monotonic()
    return poll.poll(min(left, LONGEST_WAIT) * 1000) if left > 0 else []


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, FileNotFoundError):
        return "there is no such socket"
    return error.strerror or str(error)


# Streams


def call_stream(address: Address, request: bytes, attempts: Attempts, until: bytes | None) -> bytes:
    """Sends a request over a new connection and returns the answer.

    Args:
        address: a tcp or unix one.
        request: what to send.
        attempts: how often to try to connect, and how long to wait.
        until: what the answer ends with; None: with the server's end of the connection, after our half of it has ended.

    Raises:
        CallFailed: there is no whole answer.
    """
    with _connect(address, attempts) as sock:
        return _StreamCall(sock, request, until).run(attempts)


def _connect(address: Address, attempts: Attempts) -> socket.socket:
    pause = _PAUSE
    while True:
        until = attempts.begin()
        try:
            return connect(address, max(0.001, until - monotonic()))
        except OSError as error:
            if attempts.last:
                raise CallFailed(_reason(error)) from None
        time.sleep(max(0.0, min(pause, attempts.timeout, attempts.end - monotonic())))
        pause *= 2


class _StreamCall:
    """A request and its answer over a connection, sent and received at the same time: a server that answers while it
    reads would get stuck otherwise.
    """

    def __init__(self, sock: socket.socket, request: bytes, until: bytes | None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._unsent = memoryview(request)
        self._size = len(request)
        self._takes = True  # whether the server takes more of the request
        self._until = until
        self._answer = bytearray()

    def run(self, attempts: Attempts) -> bytes:
        """The answer. Raises CallFailed."""
        poll = select.poll()
        self._send()
        while True:
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent and self._takes else 0))
            events = _poll(poll, min(monotonic() + attempts.timeout, attempts.end))
            if not events:
                raise CallFailed(self._silence(attempts))
            if self._unsent and self._takes and events[0][1] & ~select.POLLIN:
                self._send()
            if events[0][1] & ~select.POLLOUT and self._received_all():
                return bytes(self._answer)
            if monotonic() >= attempts.end:
                raise CallFailed(self._silence(attempts))

    def _send(self) -> None:
        try:
            if self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent[:_CHUNK], socket.MSG_NOSIGNAL) :]
            if not self._unsent and self._until is None:
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # reading will fail with it too; it may have answered before
            self._takes = False

    def _received_all(self) -> bool:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            raise CallFailed(f"{_reason(error)}, after {self._so_far}") from None
        if not data:
            if self._until is not None:
                raise CallFailed(f"it ended the connection before a {self._until!r}, after {self._so_far}")
            if self._unsent and not self._answer:
                raise CallFailed(f"it ended the connection with {len(self._unsent)} of {self._size} bytes unsent")
            if self._size and not self._answer:
                raise CallFailed("it ended the connection without an answer")
            return True
        searched = max(0, len(self._answer) - len(self._until or b"") + 1)
        self._answer += data
        if self._until is not None and (found := self._answer.find(self._until, searched)) >= 0:
            del self._answer[found + len(self._until) :]
            return True
        if len(self._answer) > MAX_SIZE:
            raise CallFailed(f"the answer has more than {MAX_SIZE} bytes")
        return False

    def _silence(self, attempts: Attempts) -> str:
        over = "the time for the whole is over" if monotonic() >= attempts.end else ""
        if self._unsent:
            return f"{over or 'it takes no more of the request'}, {len(self._unsent)} of {self._size} bytes are unsent"
        if over or self._answer:
            return f"{over or 'it fell silent'}, after {self._so_far}"
        return "it took the request and says nothing"

    @property
    def _so_far(self) -> str:
        return f"{len(self._answer)} bytes of an answer"


# Datagrams


def call_datagrams(endpoints: list[tuple[int, Any]], request: bytes, attempts: Attempts) -> bytes:
    """Sends a request as one datagram, again when no answer comes, and returns the first answer.

    An answer is what comes from the very address that was asked: the sockets are connected, so the kernel drops what
    comes from others. A refusal (an ICMP message, which any host can forge) ends no try but the last one: the server
    may be just about to start.

    Args:
        endpoints: family and address of each address of the server. Where one refuses, the next is asked.
        request: what to send.
        attempts: how often, and how long to wait for an answer each time.

    Raises:
        CallFailed: there is no answer.
    """
    with contextlib.ExitStack() as stack:
        asked = _DatagramCall(endpoints, request, stack)
        while True:
            until = attempts.begin()
            refusals = asked.send()
            while events := _poll(asked.poll, until) if len(refusals) < len(endpoints) or not attempts.last else []:
                for descriptor, _ in events:
                    answer = asked.receive(descriptor, refusals)
                    if answer is not None:
                        return answer
            if attempts.last:
                raise CallFailed(refusals[-1] if refusals else "no answer")


class _DatagramCall:
    """The sockets of a request by datagrams, one for each endpoint that was asked, and a poll that watches them all: an
    answer to an earlier try is an answer too.
    """

    def __init__(self, endpoints: list[tuple[int, Any]], request: bytes, stack: contextlib.ExitStack) -> None:
        self.poll = select.poll()
        self._endpoints = endpoints
        self._request = request
        self._stack = stack
        self._sockets: dict[int, socket.socket] = {}
        self._current = -1

    def send(self) -> list[str]:
        """Asks the next endpoint, and the one after it where that refuses; why each that was asked has refused."""
        refusals: list[str] = []
        self._send(refusals)
        return refusals

    def _send(self, refusals: list[str]) -> None:
        while len(refusals) < len(self._endpoints):
            self._current = (self._current + 1) % len(self._endpoints)
            try:
                sock = self._sockets.get(self._current) or self._open()
                sock.connect(self._endpoints[self._current][1])  # each time: a unix socket may be another by now
                sock.send(self._request)
            except BlockingIOError:  # its queue is full, so that this try is lost
                return
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise CallFailed(f"{len(self._request)} bytes are too long for one datagram") from None
                refusals.append(_reason(error))
            else:
                return

    def _open(self) -> socket.socket:
        family, _ = self._endpoints[self._current]
        sock = self._stack.enter_context(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
        if family == socket.AF_UNIX:
            sock.bind("")  # to any abstract name, where the answer can come to: unix(7), autobind
        self._sockets[self._current] = sock
        self.poll.register(sock, select.POLLIN)
        return sock

    def receive(self, descriptor: int, refusals: list[str]) -> bytes | None:
        """The answer that has come on a socket; None, and the next endpoint asked, when it is a refusal."""
        sock = next(one for one in self._sockets.values() if one.fileno() == descriptor)
        try:
            return sock.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            refusals.append(_reason(error))
            self._send(refusals)
            return None
