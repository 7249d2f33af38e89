"""A crowd of clients that come, say something, check the echo, go, and come again, until the test has seen enough.

They speak to `handlers/teller.py`, which tells first which process serves, so that whoever is cut off can say by whom.
One loop in a thread has them all; what it counts is complete when the crowd has gone.
"""

from __future__ import annotations

import random
import select
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Self

from clients import endpoint
from processes import PATIENCE

GREETING = 8  # bytes by which the handler tells its pid
CHUNK = 65536


@dataclass(slots=True)
class Score:
    """What became of the visits.

    Attributes:
        whole: those that got each byte, by the pid that served.
        refused: connections that nobody took.
        reset: those that ended before all had come, by the pid that served; 0 where it had not told.
        wrong: those that got other bytes.
        stuck: those that had no end in time.
    """

    whole: Counter[int] = field(default_factory=Counter)
    refused: int = 0
    reset: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    stuck: int = 0

    @property
    def losses(self) -> tuple[int, int, int, int]:
        """Refused, reset, wrong and stuck."""
        return self.refused, self.reset.total(), self.wrong, self.stuck


class Visit:
    """One connection: what it has said, some pieces one after the other, and what has come of that so far."""

    def __init__(self, family: int, where: object, number: int) -> None:
        self.number = number
        self.pieces = random.randint(1, 5)
        self.sent = self.got = b""
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        try:
            # Each client has an address of its own: the ports of one would not do for all that are yet to be forgotten.
            self.sock.bind((f"127.1.0.{number + 1}", 0))
            self.sock.connect(where)
        except OSError:
            self.sock.close()
            raise

    @property
    def server(self) -> int:
        """The pid that serves; 0 as long as it has not told."""
        return int(self.got[:GREETING]) if len(self.got) >= GREETING else 0

    def say(self) -> None:
        """Says the next piece."""
        piece = random.randbytes(random.randint(1, 2000))
        self.pieces -= 1
        self.sent += piece
        self.sock.sendall(piece)

    def hear(self) -> bool:
        """Takes what has come, and says the next piece when that was all; whether this was the last."""
        portion = self.sock.recv(CHUNK)
        if not portion:
            raise ConnectionResetError("end of file")
        self.got += portion
        if len(self.got) < GREETING + len(self.sent):
            return False
        if self.right and self.pieces:
            self.say()
            return False
        return True

    @property
    def right(self) -> bool:
        """Whether just what was sent has come back."""
        return self.got[GREETING:] == self.sent


class Crowd:
    """So many clients at a time, within a `with`.

    Args:
        address: whom they visit, a tcp address of 127.0.0.1.
        size: how many.
    """

    def __init__(self, address: str, size: int = 50) -> None:
        self.score = Score()
        self._family, self._where = endpoint(address)
        self._size = size
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._enough.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._visit()
        except BaseException as error:  # noqa: BLE001 (it is the test's, which is in another thread)
            self._error = error

    def _visit(self) -> None:
        self._visits: dict[int, Visit] = {}
        with select.epoll() as self._poll:
            for number in range(self._size):
                self._come(number)
            deadline = monotonic() + PATIENCE
            while self._visits and monotonic() < deadline:
                if not self._enough.is_set():
                    deadline = monotonic() + PATIENCE
                for descriptor, _ in self._poll.poll(0.1):
                    self._ready(self._visits[descriptor])
        self.score.stuck += len(self._visits)
        for visit in self._visits.values():
            visit.sock.close()

    def _come(self, number: int) -> None:
        """Begins the next visit of a client; who is refused, or cut off while it speaks, tries again."""
        while not self._enough.is_set():
            try:
                visit = Visit(self._family, self._where, number)
            except ConnectionRefusedError:
                self.score.refused += 1
                continue
            try:
                visit.say()
            except ConnectionError:
                self._end(visit, self.score.reset)
                continue
            self._visits[visit.sock.fileno()] = visit
            self._poll.register(visit.sock, select.EPOLLIN)
            return

    def _ready(self, visit: Visit) -> None:
        try:
            if not visit.hear():
                return
            outcome = self.score.whole if visit.right else None
        except ConnectionError:
            outcome = self.score.reset
        self._poll.unregister(visit.sock)
        del self._visits[visit.sock.fileno()]
        self._end(visit, outcome)
        self._come(visit.number)

    def _end(self, visit: Visit, outcome: Counter[int] | None) -> None:
        visit.sock.close()
        if outcome is None:
            self.score.wrong += 1
        else:
            outcome[visit.server] += 1
