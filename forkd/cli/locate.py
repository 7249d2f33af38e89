"""Finds the running daemon that a command means, wherever its run directory is, and whichever user's it is.

A command may be run by another user, in another environment or directory, or with another settings file than those that
the daemon was started with. So where it is not found at once it is looked for in all places that its run directory can
have, and then among all masters that run. Only where it is in none of them it is not running (`NotRunning`). One that
runs and that this user may not ask is `NotAllowed`; one of another project that happens to have the same name is
`OtherProject`.

The default run directory follows from the user and the environment: cron has no XDG_RUNTIME_DIR. `places_of` names all
that can be meant; `running_masters` reads the process titles, which show a daemon wherever its files are. A title is a
claim that any process can make: it tells what to say and which process to ask, and nothing is signalled because of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from forkd.cli.control_client import MasterConnection, RunningMaster, is_listened_at, running_masters
from forkd.cli.target import WantedDaemon
from forkd.errors import ForkdError, NotAllowed, NotRunning, OtherProject
from forkd.messages import StatusReply, StatusRequest
from forkd.system.run_directory import ROOT_DIRECTORY, RunDirectory, default_run_directory, is_put_by_root

Status = Mapping[str, Any]
T = TypeVar("T")

#: Where those of users who are logged in have theirs (file-hierarchy(7)).
_USERS = Path("/run/user")

_BUILTIN = "forkd."  # handlers of forkd itself, which are the same in every directory


#: Seconds that each of all daemons has to answer.
_LIST_SECONDS = 2.0

#: Masters that are asked at the same time.
_MOST_ASKED = 64


class SeenDaemon(NamedTuple):
    """A daemon that runs on this machine.

    Attributes:
        master: its process.
        run: its run directory; None where that can't be found out.
        status: what it tells of itself; empty where it can't be asked.
        is_denied: whether that is so because it is another user's.
        error: why it can't be asked, in a sentence; else empty.
    """

    master: RunningMaster
    run: RunDirectory | None = None
    status: Status = MappingProxyType({})
    is_denied: bool = False
    error: str = ""


class AskedMaster(NamedTuple):
    """A master, its status, and its run directory; None where it can't be asked, or has not answered in time."""

    master: RunningMaster
    status: Status
    path: Path | None


def every_daemon() -> list[SeenDaemon]:
    """All daemons whose processes this user can see, by name. None is waited for longer than two seconds."""
    return _at_once(_seen, sorted(running_masters(), key=lambda one: (one.name, one.pid)))


def _seen(master: RunningMaster) -> SeenDaemon:
    path = master.run_directory() if _may_ask(master) else None
    if path is None:  # another user's, whose control socket may be for a group of this one
        held = [one for one in places_of(master.name) if is_listened_at(RunDirectory(master.name, one).control)]
        path = next((one for one in held if _owner(one) == master.uid), None)
    if path is None:
        denied = not _may_ask(master)
        why = f"runs as user {master.user}; only that user and root may ask it" if denied else "has no control socket"
        return SeenDaemon(master, is_denied=denied, error=why)
    run = RunDirectory(master.name, path)
    try:
        with MasterConnection(run) as connection:
            status = connection.ask(StatusRequest(), StatusReply, _LIST_SECONDS).status
    except NotAllowed as error:
        return SeenDaemon(master, run, is_denied=True, error=str(error))
    except ForkdError as error:
        return SeenDaemon(master, run, error=str(error))
    return SeenDaemon(master, run, status)


def _owner(path: Path) -> int:
    """The owner of a path; -1 where that can't be seen."""
    try:
        return path.stat().st_uid
    except OSError:
        return -1


def connect(wanted: WantedDaemon) -> MasterConnection:
    """A connection to the daemon.

    Raises:
        NotRunning: it does not run.
        NotAllowed: it runs, and this user may not ask it; or it can't be told whether it runs.
        OtherProject: a daemon of another project has its name.
        ForkdError: it runs, but can't be asked; or it can't be told which one is meant.
    """
    master = MasterConnection(find(wanted))
    if wanted.named or not wanted.source:
        return master
    try:
        check_project(wanted, master.ask(StatusRequest(), StatusReply).status)
    except BaseException:
        master.__exit__()
        raise
    return master


def find(wanted: WantedDaemon) -> RunDirectory:
    """The run directory of the daemon. Raises as `connect`."""
    if wanted.run_directory is not None and wanted.run_directory_is_sure:
        there = RunDirectory(wanted.name, wanted.run_directory)
        return there if wanted.named or wanted.source else _renamed(there)
    held, blocked = _held_places(wanted)
    if held:
        return _one_of(wanted, held)
    others = _at_once(_ask, [one for one in running_masters() if wanted.file or one.name == wanted.name])
    if found := [run for one in others if (run := _matching(wanted, one)) is not None]:
        return _one_of(wanted, found)
    if denied := next((one for one, *_ in others if one.name == wanted.name and not _may_ask(one)), None):
        raise NotAllowed(
            f"{wanted.name} runs, pid {denied.pid}, as user {denied.user}; only that user and root may ask it"
        )
    if wanted.file and (moved := next(_without_file(others, Path(wanted.source)), "")):
        raise ForkdError(f"{wanted.name} is not running under this name, but {moved}")
    if blocked and not os.access("/proc/1/cmdline", os.R_OK):
        raise NotAllowed(f"can't tell whether {wanted.name} runs: this user may not look into {blocked[0]}")
    raise NotRunning(f"{wanted.name} is not running{looked_in(wanted)}")


def find_own(wanted: WantedDaemon) -> RunDirectory | None:
    """The run directory of this user's daemon of the name, if it runs; in whichever environment it was started. What
    runs in another user's directory is none: `app` refuses that directory.
    """
    held, _ = _held_places(wanted)
    return next((run for run in held if run.path.stat().st_uid == os.geteuid()), None)


def places(wanted: WantedDaemon) -> list[Path]:
    """Where its run directory can be."""
    return places_of(wanted.name) if wanted.run_directory is None else [wanted.run_directory]


def looked_in(wanted: WantedDaemon) -> str:
    """The end of a sentence that says where it was looked for; empty where there was only one place."""
    *most, last = map(str, places(wanted))
    return f"; looked for in {', '.join(most)} and {last}" if most else ""


def check_project(wanted: WantedDaemon, status: Status) -> None:
    """Raises OtherProject where a daemon has the name only because its project calls a handler or a file the same."""
    source, directory = status.get("source", ""), status.get("directory", "")
    if wanted.named or not source or not wanted.source:
        return
    if wanted.file:
        if not source.startswith("/") or _same(source, wanted.source) or not os.path.lexists(source):
            return
        theirs, ours = source, wanted.source
    else:
        if source.startswith(("/", _BUILTIN)) or _same(directory, wanted.directory):
            return
        theirs, ours = directory, wanted.directory
    raise OtherProject(
        f"{wanted.name} runs, pid {status['pid']}, but it is that of {theirs}, and here is {ours}; to mean that one "
        f"say --name {wanted.name}, and to have two give this one another name"
    )


def _renamed(run: RunDirectory) -> RunDirectory:
    """A run directory that alone says which daemon is meant, with that one's name where it can be seen."""
    try:
        pid = run.pid_file.probe()[1]
    except ForkdError:  # one of this user's group may ask the daemon, and not open that file
        return run
    return next((RunDirectory(one.name, run.path) for one in running_masters() if one.pid == pid), run)


def _held_places(wanted: WantedDaemon) -> tuple[list[RunDirectory], list[Path]]:
    """The run directories in which a daemon of the name runs; and those that this user may not look into."""
    held, blocked = [], []
    for place in places(wanted):
        run = RunDirectory(wanted.name, place)
        try:
            if run.pid_file.probe()[0]:
                held.append(run)
        except NotAllowed:
            # Nothing that another user can do to the pid file is to hold a daemon up, so it is not theirs to open.
            if is_listened_at(run.control):
                held.append(run)
            else:
                blocked.append(place)
        except ForkdError:
            if wanted.run_directory is not None and os.access(place, os.X_OK):
                raise
            blocked.append(place)
    return held, blocked


def _one_of(wanted: WantedDaemon, found: list[RunDirectory]) -> RunDirectory:
    """The only one, or this user's own, which comes first. Raises ForkdError where that does not decide it."""
    if len(found) > 1 and not (found[0].path in places(wanted) and found[0].path.lstat().st_uid == os.geteuid()):
        where = " and ".join(str(run.path) for run in found)
        raise ForkdError(f"several daemons are called {wanted.name}: in {where}; say which one by --run-directory")
    return found[0]


def _may_ask(master: RunningMaster) -> bool:
    return os.geteuid() in (0, master.uid)


def _matching(wanted: WantedDaemon, asked: AskedMaster) -> RunDirectory | None:
    """The run directory of a master that is the daemon that is meant."""
    master, status, path = asked
    if path is None:
        return None
    source, same_name = status.get("source", ""), master.name == wanted.name
    if wanted.file:
        fits = _same(source, wanted.source) or (same_name and not os.path.lexists(source))
    else:
        fits = same_name and (wanted.named or _same(status.get("directory", ""), wanted.directory))
    return RunDirectory(master.name, path) if fits else None


def _without_file(masters: Iterable[AskedMaster], file: Path) -> Iterator[str]:
    """This user's daemons whose settings file is gone and may be this one by now, as it was called the same or was in
    the same directory; each as a sentence.
    """
    for master, status, _ in masters:
        if master.uid == os.geteuid():
            source = status.get("source", "")
            near = file.name == Path(source).name or file.parent == Path(source).parent
            if source.startswith("/") and near and not os.path.lexists(source):
                yield (
                    f"{master.name} runs, pid {master.pid}, whose file {source} is gone; if that is what you mean, say "
                    f"--name {master.name}"
                )


def _at_once(ask: Callable[[RunningMaster], T], masters: list[RunningMaster]) -> list[T]:
    """Asks all at the same time, so that those that stand still hold a command up for two seconds in all."""
    if not masters:
        return []
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 (rare: where a daemon is not where it should be)

    with ThreadPoolExecutor(min(len(masters), _MOST_ASKED)) as pool:
        return list(pool.map(ask, masters))


def _ask(master: RunningMaster) -> AskedMaster:
    path = master.run_directory() if _may_ask(master) else None
    if path is not None:
        try:
            with MasterConnection(RunDirectory(master.name, path)) as connection:
                return AskedMaster(master, connection.ask(StatusRequest(), StatusReply, _LIST_SECONDS).status, path)
        except ForkdError:
            pass
    return AskedMaster(master, {}, None)


def _same(one: str, other: str) -> bool:
    """Whether two paths are the same, or lead to the same file."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


# Where a run directory can be


def places_of(name: str) -> list[Path]:
    """The directories in which the daemon `name` of this user or of root can be, the default first; for root those of
    all users. A directory that is there and belongs to another user than it should is left out. What is in /run/forkd
    has been put there by root, also where it is another user's: systemd has made it for a unit with `User=`.
    """
    uid = os.geteuid()
    default = default_run_directory(name)
    bases: list[tuple[Path, int]] = [(default.parent, uid)]
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        bases.append((Path(session, "forkd"), uid))
    bases.append((_USERS / str(uid) / "forkd", uid))
    temporary = list(dict.fromkeys([Path(tempfile.gettempdir()), Path("/tmp")]))  # noqa: S108 (ownership is looked at)
    bases += [(directory / f"forkd-{uid}", uid) for directory in temporary]
    bases.append((ROOT_DIRECTORY, 0))
    if uid == 0:
        bases += [(path / "forkd", int(path.name)) for path in _numbered(_USERS, "")]
        bases += [(path, int(path.name[6:])) for one in temporary for path in _numbered(one, "forkd-")]
    places = dict.fromkeys(base / name for base, owner in bases if _may_be_of(base / name, owner))
    return list(places)


def _numbered(directory: Path, prefix: str) -> list[Path]:
    """The entries of a directory that are called by a prefix and a user's number."""
    try:
        return sorted(path for path in directory.iterdir() if re.fullmatch(rf"{prefix}\d{{1,10}}", path.name, re.ASCII))
    except OSError:
        return []


def _may_be_of(path: Path, owner: int) -> bool:
    """Whether a directory is this user's; also where there is none, or where that can't be seen."""
    try:
        return is_put_by_root(path) or path.lstat().st_uid == owner
    except OSError:
        return True
