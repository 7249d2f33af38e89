"""Many clients of an echo at the same time, each at an address of its own.

`BurstClients` connect at once and stay: which of them are served, and what the others receive. `ChurnClients` come,
send something, check the echo, go and come again, until the test has seen enough.
"""

from __future__ import annotations

import contextlib
import random
import select
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, Self

from tests.support.clients import endpoint
from tests.support.processes import DEADLINE

GREETING = 8  # bytes by which `handlers/teller.py` tells its pid
CHUNK = 65536
REFUSED = "refused"  # of a connection that was lost before it came about


@dataclass(slots=True)
class BurstClients:
    """Clients that send a byte as soon as they are connected, and stay; all are closed at the end of the `with`.

    Attributes:
        waiting: those that have neither been served nor turned away yet.
        served: those that got their byte back.
        refused: what each of the others received before the end; None for one that was reset.
    """

    waiting: set[socket.socket] = field(default_factory=set)
    served: list[socket.socket] = field(default_factory=list)
    refused: list[bytes | None] = field(default_factory=list)
    _received: dict[socket.socket, bytes] = field(default_factory=dict)

    def connect(self, address: str, hosts: Iterable[str]) -> Self:
        """Connects one client from each of these hosts, all at once."""
        family, where = endpoint(address)
        for host in hosts:
            sock = socket.socket(family, socket.SOCK_STREAM)
            self.waiting.add(sock)
            sock.setblocking(False)
            sock.bind((host, 0))
            sock.connect_ex(where)
        return self

    def wait(self, served: int = -1, seconds: float = DEADLINE) -> Self:
        """Waits until each client has been served or turned away; with `served`, until so many are served."""
        deadline = monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for one in self.waiting:
                selector.register(one, selectors.EVENT_READ if one in self._received else selectors.EVENT_WRITE)
            while self.waiting and len(self.served) != served:
                assert monotonic() < deadline, f"{len(self.waiting)} wait, {len(self.served)} are served"
                for key, _ in selector.select(deadline - monotonic()):
                    sock: socket.socket = key.fileobj  # type: ignore[assignment]
                    if sock not in self._received:
                        self._received[sock] = b""
                        selector.modify(sock, selectors.EVENT_READ)
                        self._send(sock)
                    elif self._receive(sock):
                        selector.unregister(sock)
        return self

    def _send(self, sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):  # turned away already, which is seen when it is read from
            sock.send(b"!")

    def _receive(self, sock: socket.socket) -> bool:
        """Whether it is decided now what becomes of the client."""
        try:
            data = sock.recv(4096)
        except ConnectionResetError:
            self._received[sock] = b"reset"
            data = b""
        received = self._received[sock] = self._received[sock] + data
        if received == b"!":
            self.served.append(sock)
        elif data:
            return False
        else:
            self.refused.append(None if received == b"reset" else received)
            sock.close()
        self.waiting.discard(sock)
        return True

    def close(self, count: int = -1) -> None:
        """Closes so many of those that are served; all, and those that wait, if it is not given."""
        closed = self.served[: len(self.served) if count < 0 else count]
        for sock in (*closed, *(self.waiting if count < 0 else ())):
            sock.close()
        self.served = self.served[len(closed) :]
        if count < 0:
            self.waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Loss:
    """A connection that was refused, or ended before all had come back.

    Attributes:
        server: the pid that served it; 0 where it had not told.
        address: the server's.
        peer: the client's own address.
        began: when it was connected, in seconds since the epoch.
        ended: when it was lost.
        how: the error, `REFUSED`, or the end of the file.
        sent: bytes that were sent.
        received: bytes that came back, without the greeting.
    """

    server: int
    address: str
    peer: Any
    began: float
    ended: float
    how: str
    sent: int
    received: int


@dataclass(slots=True)
class Outcomes:
    """What became of the connections of `ChurnClients`.

    Attributes:
        whole: those that got each byte, by the pid that served them.
        lost: those that were refused, or ended before all had come.
        wrong: those that got other bytes.
        stuck: those that had no end in time.
    """

    whole: Counter[int] = field(default_factory=Counter)
    lost: list[Loss] = field(default_factory=list)
    wrong: int = 0
    stuck: int = 0

    @property
    def reset(self) -> Counter[int]:
        """How many ended before all had come, by the pid that served."""
        return Counter(loss.server for loss in self.lost if loss.how != REFUSED)

    @property
    def losses(self) -> tuple[int, int, int, int]:
        """Refused, reset, wrong and stuck."""
        reset = self.reset.total()
        return len(self.lost) - reset, reset, self.wrong, self.stuck

    def add(self, other: Outcomes) -> None:
        """Takes in those of other clients."""
        self.whole += other.whole
        self.lost += other.lost
        self.wrong += other.wrong
        self.stuck += other.stuck


class ChurnConnection:
    """One connection: some pieces that are sent one after the other, and what has come back of them so far.

    Args:
        clients: whose it is.
        number: the client's.

    Raises:
        OSError: it can't be connected.
    """

    def __init__(self, clients: ChurnClients, number: int) -> None:
        self.number = number
        self._clients = clients
        self._chance = clients.chance
        self.pieces = self._chance.randint(1, clients.pieces)
        self.began, self.sent, self.unsent, self.received = time(), bytearray(), bytearray(), bytearray()
        self._paused_until = 0.0
        family, where = endpoint(clients.address)
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        try:
            if family == socket.AF_INET:
                # One of its own: the ports of one address would not do for all that are in TIME_WAIT yet.
                self.sock.bind((f"127.1.0.{number + 1}", 0))
            self.sock.connect(where)
        except OSError:
            self.sock.close()
            raise
        self.sock.setblocking(False)

    @property
    def server(self) -> int:
        """The pid that serves; 0 as long as it has not told."""
        return int(self.received[:GREETING]) if len(self.received) >= GREETING else 0

    def send(self) -> None:
        """Sends the next piece, as far as the socket takes it."""
        piece = self._chance.randbytes(self._chance.randint(1, self._clients.size))
        self.pieces -= 1
        self.sent += piece
        self.unsent += piece
        self.flush()

    def flush(self) -> None:
        """Sends what is left of a piece."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.sock.send(self.unsent)]

    def receive(self) -> bool:
        """Takes what has come, and sends the next piece when that was all; whether this was the last."""
        with contextlib.suppress(BlockingIOError):
            portion = self.sock.recv(CHUNK)
            if not portion:
                raise ConnectionResetError("end of file")
            self.received += portion
        if len(self.received) < GREETING + len(self.sent):
            return False
        if not (self.is_right and self.pieces):
            return True
        if not self._clients.pause:
            self.send()
        elif not self._paused_until:
            self._paused_until = monotonic() + self._chance.uniform(0, self._clients.pause)
        return False

    def resume(self) -> None:
        """Sends the next piece where the pause before it is over."""
        if self._paused_until and monotonic() >= self._paused_until:
            self._paused_until = 0.0
            self.send()

    @property
    def is_right(self) -> bool:
        """Whether just what was sent has come back."""
        return self.received[GREETING:] == self.sent

    def lost(self, error: ConnectionError) -> Loss:
        """What is known of it now that it is lost. The server's pid may have come before a send has failed."""
        with contextlib.suppress(OSError):
            while portion := self.sock.recv(CHUNK):
                self.received += portion
        received = max(0, len(self.received) - GREETING)
        how, peer = error.strerror or str(error), self.sock.getsockname()
        return Loss(self.server, self._clients.address, peer, self.began, time(), how, len(self.sent), received)


class ChurnClients:
    """So many clients at a time, within a `with`, of `handlers/teller.py`, which tells first which process serves.

    One loop in a thread has them all; what it counts is complete after the `with`.

    Args:
        address: of the server, on this machine.
        count: how many.
        pieces: that a client sends at most, waiting for each to come back.
        size: bytes of a piece at most.
        pause: seconds that it waits at most before the next one.
        seed: of chance.
    """

    def __init__(
        self,
        address: str,
        count: int = 50,
        *,
        pieces: int = 5,
        size: int = 2000,
        pause: float = 0.0,
        seed: int | None = None,
    ) -> None:
        self.outcomes = Outcomes()
        self.address, self.pieces, self.size, self.pause = address, pieces, size, pause
        self.chance = random.Random(seed)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        self._open: dict[int, ChurnConnection] = {}
        self._outside = [*range(count)]  # clients that have no connection

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._serve_clients()
        except BaseException as error:  # noqa: BLE001 (it is the test's, which is in another thread)
            self._error = error

    def _serve_clients(self) -> None:
        with select.epoll() as self._poll:
            deadline = monotonic() + DEADLINE
            while not self._enough.is_set() or (self._open and monotonic() < deadline):
                if not self._enough.is_set():
                    deadline = monotonic() + DEADLINE
                    outside, self._outside = self._outside, []
                    for number in outside:
                        self._connect(number)
                for descriptor, events in self._poll.poll(0.01 if self.pause or self._outside else 0.1):
                    self._step(self._open[descriptor], events)
                for connection in list(self._open.values()) if self.pause else ():
                    self._step(connection, 0)
        self.outcomes.stuck += len(self._open)
        for connection in self._open.values():
            connection.sock.close()

    def _connect(self, number: int) -> None:
        """Opens a client's next connection; where that is refused, or cut off while it sends, another one later."""
        began = time()
        try:
            connection = ChurnConnection(self, number)
        except (ConnectionRefusedError, FileNotFoundError):
            self.outcomes.lost.append(Loss(0, self.address, None, began, time(), REFUSED, 0, 0))
            self._outside.append(number)
            return
        try:
            connection.send()
        except ConnectionError as error:
            self._close(connection, error)
            return
        self._open[connection.sock.fileno()] = connection
        self._poll.register(connection.sock, self._events_of(connection))

    def _events_of(self, connection: ChurnConnection) -> int:
        return select.EPOLLIN | select.EPOLLOUT * bool(connection.unsent)

    def _step(self, connection: ChurnConnection, events: int) -> None:
        """Goes on with a connection; one that is over is followed by the client's next."""
        before = self._events_of(connection)
        lost, over = None, False
        try:
            if events & select.EPOLLOUT:
                connection.flush()
            if events & ~select.EPOLLOUT:
                over = connection.receive()
            connection.resume()
        except ConnectionError as error:
            lost, over = error, True
        if not over:
            if self._events_of(connection) != before:
                self._poll.modify(connection.sock, self._events_of(connection))
            return
        self._poll.unregister(connection.sock)
        del self._open[connection.sock.fileno()]
        self._close(connection, lost)

    def _close(self, connection: ChurnConnection, lost: ConnectionError | None) -> None:
        if lost is not None:
            self.outcomes.lost.append(connection.lost(lost))
        elif connection.is_right:
            self.outcomes.whole[connection.server] += 1
        else:
            self.outcomes.wrong += 1
        connection.sock.close()
        self._outside.append(connection.number)
