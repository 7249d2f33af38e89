"""The command line's end of the control socket: requests to a running master, and its replies.

Every wait has an end. What the master refuses, or does not answer in time, is a ForkdError; the commands print nothing
of the messages themselves.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from forkd import LONGEST_WAIT
from forkd.errors import BootError, ForkdError, NotAllowed, NotRunning
from forkd.messages import LARGEST_REPLY, ErrorReply, InvalidMessage, JsonObject, Request, decode_reply
from forkd.system.channel import Channel, ChannelClosed, peer_uid, wait_ready
from forkd.system.proc import descriptors_of, unix_sockets
from forkd.system.run_directory import RunDirectory

#: Seconds within which a healthy master replies to a request that needs no work.
REPLY_SECONDS = 10.0

#: Seconds within which a master that has lost its control socket's path has made it again, and accepts.
MISSING_SECONDS = 3.0

#: A connection's errors that pass: the path is being made again, or others wait to be accepted.
_PASSING = (FileNotFoundError, ConnectionRefusedError, BlockingIOError)

_TITLE = re.compile(r"forkd: ([A-Za-z0-9][A-Za-z0-9._-]{0,63}) master")

R = TypeVar("R")


class MasterConnection:
    """A connection to a running master.

    Args:
        run: its run directory.

    Attributes:
        uid: the user that the master runs as.

    Raises:
        NotRunning: no daemon of this name runs.
        NotAllowed: it runs, and this user may not ask it.
        ForkdError: it runs, but can't be asked.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        sock = _connected(run)
        self.uid = peer_uid(sock)
        self._channel = Channel(sock, takes_descriptors=True, largest=LARGEST_REPLY)
        self._replies: deque[JsonObject] = deque()

    @property
    def run(self) -> RunDirectory:
        """Its run directory."""
        return self._run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._channel.close()

    def ask(self, request: Request, expected: type[R], seconds: float = REPLY_SECONDS) -> R:
        """Sends a request and returns the reply, which is of the class that is expected.

        Raises:
            BootError: the master refuses, with its reason.
            ForkdError: it does not reply in time, or is gone.
        """
        try:
            self._channel.send(request)
        except ChannelClosed:
            raise ForkdError(f"{self._run.name} closed the connection: only root and its own user may ask") from None
        return self.receive_reply(expected, seconds)

    def receive_reply(self, expected: type[R], seconds: float) -> R:
        """The next reply. Raises as `ask`."""
        deadline = time.monotonic() + seconds
        while not self._replies:
            self._wait(deadline)
            try:
                self._replies.extend(self._channel.receive())
            except ChannelClosed:
                raise ForkdError(f"{self._run.name} closed the connection without an answer") from None
        try:
            reply = decode_reply(self._replies.popleft(), expected)
        except InvalidMessage as error:
            raise ForkdError(f"{self._run.name} replies as another version of forkd: {error}") from None
        if isinstance(reply, ErrorReply):
            raise BootError(reply.error, reply.details)
        return reply

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._channel.fileno()

    def take_descriptors(self) -> list[int]:
        """The descriptors that came with the replies up to now; the caller owns them."""
        taken, self._channel.descriptors = self._channel.descriptors, []
        return taken

    def wait_for_exit(self, seconds: float) -> None:
        """Waits until the master's process has ended. Raises ForkdError when it does not in time."""
        deadline = time.monotonic() + seconds
        while True:
            self._wait(deadline)
            try:
                self._channel.receive()
            except ChannelClosed:
                return

    def _wait(self, deadline: float) -> None:
        while not wait_ready(self._channel, select.POLLIN, _left(deadline)):
            if time.monotonic() >= deadline:
                raise ForkdError(f"{self._run.name} does not answer")


def _left(deadline: float) -> float:
    """Seconds up to a deadline, as many as can be waited for at once."""
    return min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT)


def _connected(run: RunDirectory) -> socket.socket:
    """A connection to the control socket. Raises as `MasterConnection`."""
    deadline = time.monotonic() + MISSING_SECONDS
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)  # else a master that stands still, with a full backlog, is waited for without end
        try:
            sock.connect(str(run.control))
            _check_peer(run, sock)
        except OSError as error:
            sock.close()
            held, pid = _probe(run)
            if not held and not is_listened_at(run.control):
                raise NotRunning(f"{run.name} is not running") from None
            who = f"{run.name} runs, pid {pid}," if pid else f"{run.name} runs,"
            if isinstance(error, PermissionError):
                raise NotAllowed(f"{who} but this user may not ask it at {run.control}") from None
            if isinstance(error, BlockingIOError) and time.monotonic() > deadline:
                raise ForkdError(f"{who} but does not answer: too many wait at {run.control} already") from None
            if time.monotonic() > deadline or not isinstance(error, _PASSING):
                raise ForkdError(f"{who} but can't be asked at {run.control}: {error.strerror}") from None
            time.sleep(0.05)
        else:
            return sock


def _check_peer(run: RunDirectory, sock: socket.socket) -> None:
    """Checks that it is the owner of the run directory, or root, who listens there. Raises NotAllowed, ForkdError."""
    peer, owner = peer_uid(sock), run.path.stat().st_uid
    if peer not in (0, owner):
        why = f"user {peer} answers at {run.control}, but its directory is user {owner}'s"
    elif os.geteuid() not in (0, peer) and not run.control.stat().st_mode & stat.S_IWGRP:  # control_group
        why = f"{run.name} runs, as user {peer}; only that user and root may ask it"
    else:
        return
    sock.close()
    raise ForkdError(f"{why}; remove that socket") if peer not in (0, owner) else NotAllowed(why)


def _probe(run: RunDirectory) -> tuple[bool, int | None]:
    """As `PidFile.probe`; where that is not for this user, what else shows it. Raises NotAllowed where nothing does."""
    try:
        return run.pid_file.probe()
    except NotAllowed:
        found = next(running_masters(run.name), None)
        if not is_listened_at(run.control):
            raise
        return True, None if found is None else found.pid


def is_listened_at(path: Path) -> bool:
    """Whether a socket was bound to this path and listens, also where the path is gone by now; False where there is no
    /proc.
    """
    with contextlib.suppress(OSError):
        return any(listens and name == str(path) for _, name, listens in unix_sockets(os.getpid()))
    return False


# Which masters run


class RunningMaster(NamedTuple):
    """A process that says, by its title, that it is a master.

    Attributes:
        pid: its number.
        uid: the user that it runs as.
        name: the daemon's.
    """

    pid: int
    uid: int
    name: str

    @property
    def user(self) -> str:
        """The user's name, or the number where there is none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    def run_directory(self) -> Path | None:
        """Where its control socket is, as the kernel says; None where that is not this user's to see.

        In a /tmp of its own, which a unit has by `PrivateTmp=`, it is by way of the process: proc_pid_root(5).
        """
        with contextlib.suppress(OSError):
            own = {link for _, link in descriptors_of(self.pid)}
            for inode, name, listens in unix_sockets(self.pid):
                path = Path(name)
                if not (listens and f"socket:[{inode}]" in own and path.name in ("control.sock", "control.sock.new")):
                    continue
                with contextlib.suppress(OSError, ValueError):  # another user can have any path told here
                    found = _seen_from_here(Path(f"/proc/{self.pid}/root"), path.parent)
                    if found.stat().st_uid in (0, self.uid):
                        return found
        return None


def _seen_from_here(root: Path, path: Path) -> Path:
    """A directory of a process whose root is this one, as this process reaches it. Raises OSError where it does not,
    and ValueError for a relative path.
    """
    theirs = root / path.relative_to("/")
    with contextlib.suppress(OSError):
        if os.path.samefile(path, theirs):
            return path
    theirs.stat()
    return theirs


def running_masters(name: str = "") -> Iterator[RunningMaster]:
    """The masters that run on this machine, of this name if one is given; none where there is no /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found = _TITLE.fullmatch((process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0 "))
            if found is not None and (not name or found[1] == name) and _is_near(process):
                yield RunningMaster(int(process.name), process.stat().st_uid, found[1])
        except OSError:  # it has ended
            continue


def _is_near(process: Path) -> bool:
    """Whether a process has the same root directory as this one: a container's daemon is another one. The mount
    namespace is no sign of that, as systemd gives one to each unit with `PrivateTmp=` and the like. Where the root is
    hidden, the process is another user's, and yes.
    """
    try:
        return os.path.samefile(process / "root", "/")
    except PermissionError:
        return True
