"""Writes log records to a descriptor, and waits for its reader for a bounded time, or not at all.

A pipe, a terminal or a socket takes nothing more when what reads it stands still. What it does not take waits here, up
to a bound; beyond that records are lost, which is counted, and told in the log when it can be written again. Files take
what is written as fast as the disk does.

Standard error is often shared with a shell and with other programs, and whether it blocks is a property of what they
share (O_NONBLOCK of open(2)): it is not changed here. A pipe is written to by splice(2), which has a flag for that; a
socket by send(2), likewise; a terminal is opened once more.

`logs` has one writer for the process. A loop that is attached writes what waits, when it can. The master waits for
nothing; every other process may wait for the reader, which holds up that process alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

log = logging.getLogger("forkd.log")

#: Bytes that wait at most, but for one record.
MOST_WAITING = 1 << 20

#: Seconds that a process waits for the reader at most, in any `_PATIENCE_AGAIN` seconds.
PATIENCE = 1.0
_PATIENCE_AGAIN = 10.0

#: Bytes at a time that a pipe takes as a whole (PIPE_BUF of pipe(7)), and for a terminal that can't be opened again.
_PIPE_PIECE, _TERMINAL_PIECE = select.PIPE_BUF, 256

#: Sends one record as a datagram. Raises OSError.
SendRecord = Callable[[socket.socket, bytes], None]


class Loop(Protocol):
    """What calls back when a descriptor can be written to; asyncio's loops do."""

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> Any:
        """Calls `callback` whenever that is so, until `remove_writer`."""

    def remove_writer(self, fd: int, /) -> Any:
        """Calls it no more."""


class UnwrittenLog(NamedTuple):
    """What a writer has not written yet; for another image of its process, which goes on with it.

    Attributes:
        records: that wait; of the first some may be written.
        lost: records that were lost, which the log was not told yet.
        lost_total: as of `LogWriter`.
    """

    records: tuple[bytes, ...] = ()
    lost: int = 0
    lost_total: int = 0


class LogWriter:
    """One process's way to its log.

    Args:
        descriptor: of the log.
        send: how a record is sent, where the descriptor is a socket of datagrams; None for a stream of bytes.

    Attributes:
        lost_total: records that were lost, as far as this process knows.
    """

    def __init__(self, descriptor: int = 2, send: SendRecord | None = None) -> None:
        self._descriptor, self._send = descriptor, send
        self._lock = threading.RLock()
        self._clear()
        self._target: _Target | None = None  # made at the first need

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._lost = self.lost_total = 0
        self._writable = True  # of the last try
        self._patience, self._patience_left, self._patience_again = PATIENCE, PATIENCE, 0.0
        self._loop: Loop | None = None
        self._thread = 0  # the loop's
        self._watched = -1

    def open(self, descriptor: int, send: SendRecord | None = None) -> None:
        """Writes to this descriptor from now on; or, when it leads to another file now, there."""
        self._look_for_fork()
        with self._lock:
            self._watch(wanted=False)
            if self._target is not None:
                self._target.close()
            self._descriptor, self._send, self._target = descriptor, send, None

    def reopen(self) -> None:
        """The same descriptor leads to another file now."""
        self.open(self._descriptor, self._send)

    def descriptors(self) -> set[int]:
        """The descriptors that are its own; opened now, where that was not done yet."""
        return self._opened().descriptors

    def attach(self, loop: Loop, patience: float = PATIENCE) -> None:
        """Has a loop see to it, from now on, that what waits is written.

        Args:
            loop: this thread's.
            patience: seconds that its process may wait for the reader, as `PATIENCE`.
        """
        self._look_for_fork()
        self._loop, self._thread = loop, threading.get_ident()
        self._patience = self._patience_left = patience

    def detach(self) -> None:
        """At the end of that loop: what is left may be waited for, for a moment."""
        self._look_for_fork()
        with self._lock:
            self._watch(wanted=False)
            self._loop, self._patience, self._patience_left = None, PATIENCE, PATIENCE
            self._patience_again = time.monotonic() + _PATIENCE_AGAIN
        self.flush()

    def put(self, record: bytes) -> None:
        """Writes a record, or keeps it, or loses it."""
        self._look_for_fork()
        with self._lock:
            if self._waiting and self._size + len(record) > MOST_WAITING:
                self._count_lost()
            else:
                self._waiting.append(record)
                self._size += len(record)
        self.flush()

    def unwritten(self) -> UnwrittenLog:
        """What waits, and what was lost."""
        self._look_for_fork()
        with self._lock:
            return UnwrittenLog((*self._waiting,), self._lost, self.lost_total)

    def go_on(self, unwritten: UnwrittenLog) -> None:
        """Goes on with what another writer has not written; before anything else is written."""
        with self._lock:
            self._waiting.extend(unwritten.records)
            self._size += sum(map(len, unwritten.records))
            self._lost += unwritten.lost
            self.lost_total += unwritten.lost_total

    def flush(self) -> None:
        """Writes what waits, as far as that can be."""
        self._look_for_fork()
        with self._lock:
            while self._waiting:
                try:
                    self._write_first()
                except BlockingIOError:
                    if not self._wait():
                        break
                except OSError:  # the disk is full, the reader of the pipe is gone: the daemon serves on
                    self._size -= len(self._waiting.popleft())
                    self._count_lost()
            self._watch(wanted=bool(self._waiting))
            told, self._lost = (0, self._lost) if self._waiting or not self._writable else (self._lost, 0)
        if told:
            log.warning("%d log lines lost: the log could not be written", told)

    def _look_for_fork(self) -> None:
        """In a forked child: what waits is the parent's to write, and the descriptors may have been closed."""
        if self._pid != os.getpid():
            self._lock = threading.RLock()
            self._target = None
            self._clear()

    def _opened(self) -> _Target:
        if self._target is None:
            self._target = _Target(self._descriptor)
        return self._target

    def _count_lost(self) -> None:
        self._lost += 1
        self.lost_total += 1
        self._writable = False

    def _write_first(self) -> None:
        record, target = self._waiting[0], self._opened()
        if self._send is not None and target.sock is not None:
            self._send(target.sock, record)
            count = len(record)
        else:
            count = target.write(record)
        self._writable = True
        self._size -= count
        if count == len(record):
            self._waiting.popleft()
        else:
            self._waiting[0] = record[count:]

    def _wait(self) -> bool:
        """Waits until something can be written; whether that is so, within what is left of the patience."""
        now = time.monotonic()
        if now >= self._patience_again:
            self._patience_left, self._patience_again = self._patience, now + _PATIENCE_AGAIN
        if self._patience_left <= 0:
            return False
        found = self._opened().wait(self._patience_left)
        self._patience_left -= time.monotonic() - now
        return found

    def _watch(self, *, wanted: bool) -> None:
        """Has the loop call `flush` when something can be written, or no more; another thread leaves that to it."""
        if self._loop is None or wanted is (self._watched >= 0) or threading.get_ident() != self._thread:
            return
        if wanted:
            self._watched = self._opened().out
            self._loop.add_writer(self._watched, self.flush)
        else:
            self._loop.remove_writer(self._watched)
            self._watched = -1


class _Target:
    """Where a descriptor leads, and how that is written to without a wait.

    Attributes:
        out: what is written to: a descriptor of its own where what it leads to may have to be waited for.
        sock: the socket, where it is one.
        descriptors: those that are its own.
    """

    def __init__(self, descriptor: int) -> None:
        self.out, self.descriptors = descriptor, set[int]()
        self.sock: socket.socket | None = None
        self._pipe: tuple[int, int] | None = None
        self.write: Callable[[bytes], int] = self._write_file
        with contextlib.suppress(OSError):  # as for want of descriptors; a descriptor that is closed is told by a write
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor):
                self.write = self._write_polled
            if stat.S_ISFIFO(mode):
                self._open_pipe(descriptor)
            elif stat.S_ISSOCK(mode):
                self.sock = socket.socket(fileno=self._own(os.dup(descriptor)))
                self.write = self._write_socket
            elif os.isatty(descriptor):
                self._open_terminal(descriptor)

    def _own(self, descriptor: int) -> int:
        self.out = descriptor
        self.descriptors.add(descriptor)
        return descriptor

    def _open_pipe(self, descriptor: int) -> None:
        self._own(os.dup(descriptor))
        self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.descriptors.update(self._pipe)
        self.write = self._write_pipe

    def _open_terminal(self, descriptor: int) -> None:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self._own(os.open(f"/proc/self/fd/{descriptor}", flags))
            self.write = self._write_file
        except OSError:  # another user's, as after su(1)
            self._own(os.dup(descriptor))

    def wait(self, seconds: float) -> bool:
        """Waits until it can be written to; whether that was so in time."""
        poll = select.poll()
        poll.register(self.out, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """Closes what is its own."""
        if self.sock is not None:
            self.descriptors.discard(self.sock.detach())
            self.descriptors.add(self.out)
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    # Each writes what can be written at once; how many bytes. Raises OSError; BlockingIOError: nothing can.

    def _write_file(self, data: bytes) -> int:
        return os.write(self.out, data)

    def _write_socket(self, data: bytes) -> int:
        assert self.sock is not None  # noqa: S101 (for the type checker)
        return self.sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _write_pipe(self, data: bytes) -> int:
        assert self._pipe is not None  # noqa: S101 (for the type checker)
        reader, writer = self._pipe
        count = os.write(writer, data[:_PIPE_PIECE])
        try:
            return os.splice(reader, self.out, count, flags=os.SPLICE_F_NONBLOCK)
        except OSError as error:
            os.read(reader, count)
            if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
                raise
        self.write = self._write_polled  # a filter of system calls forbids it
        return self._write_polled(data)

    def _write_polled(self, data: bytes) -> int:
        # Between the two another process that shares it may fill it; then this one waits.
        if not self.wait(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self.out, data[: _TERMINAL_PIECE if os.isatty(self.out) else _PIPE_PIECE])
