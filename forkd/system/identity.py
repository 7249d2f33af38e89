"""Who the workers are to be: names looked up, and whether this process could make a child that.

Names are looked up by who starts the daemon, or by the helper that prepares a reload, and never by the master or a
worker: the name service may block, load libraries, or be gone by the time that a worker is to be replaced. What is
found goes with the generation as numbers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forkd.config.options import Settings
from forkd.errors import ForkdError
from forkd.system.accounts import LARGEST, find_group, find_user
from forkd.system.capabilities import Capability, has_capability

#: A mistake: the setting that it is about, and a sentence.
Flaw = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a worker becomes. None is whom the daemon is.

    Attributes:
        uid: the user.
        gid: the group.
        groups: the supplementary groups.
    """

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] | None = None

    def plain(self) -> dict[str, Any]:
        """Fit for JSON; `Identity.of` makes it one again."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Identity:
        """One that another process looked up. Raises KeyError, TypeError or ValueError for what is none."""
        groups = plain["groups"]
        numbers = [plain["uid"], plain["gid"], *(groups or ())]
        if not all(one is None or (type(one) is int and 0 <= one <= LARGEST) for one in numbers):
            raise ValueError(f"{plain!r} is no identity")
        return cls(plain["uid"], plain["gid"], None if groups is None else tuple(groups))

    def may_write(self, found: os.stat_result) -> bool:
        """Whether the permissions of a file or directory let it write there."""
        if found.st_uid == self.uid:
            return True  # it could give itself the permission
        if found.st_gid in (self.gid, *(self.groups or ())):
            return bool(found.st_mode & stat.S_IWGRP)
        return bool(found.st_mode & stat.S_IWOTH)


def find_identity(settings: Settings) -> Identity:
    """As `look_up`; raises ForkdError with all mistakes."""
    identity, flaws = look_up(settings)
    if flaws:
        raise ForkdError("\n".join(f"{name}: {message}" for name, message in flaws))
    return identity


def look_up(settings: Settings) -> tuple[Identity, list[Flaw]]:
    """Whom the settings mean, as far as that can be told, and every reason why a worker can't become that."""
    flaws: list[Flaw] = []
    uid = gid = None
    groups: tuple[int, ...] | None = None
    try:
        uid, gid = _user(settings)
    except ValueError as error:
        flaws.append(("user", str(error)))
    try:
        gid = gid if settings.group is None else find_group(settings.group)
    except ValueError as error:
        flaws.append(("group", str(error)))
    try:
        if settings.user is not None or settings.group is not None or settings.groups:
            groups = tuple(dict.fromkeys(find_group(one) for one in settings.groups))
    except ValueError as error:
        flaws.append(("groups", str(error)))
    if not flaws:
        groups = _groups_to_have(uid, groups, chosen=bool(settings.groups))
        flaws = _forbidden(Identity(uid, gid, groups), settings)
    identity = Identity(uid, gid, groups)
    return identity, flaws + _misplaced(identity, settings)


def _user(settings: Settings) -> tuple[int | None, int | None]:
    if settings.user is None:
        return None, None
    uid, gid = find_user(settings.user)
    if gid is None and settings.group is None:
        raise ValueError(f"this machine knows no user {settings.user}, and so no group of it; set group too")
    return uid, gid


def _groups_to_have(uid: int | None, groups: tuple[int, ...] | None, *, chosen: bool) -> tuple[int, ...] | None:
    """The groups to set. Who has no right to change them, and becomes nobody else, keeps what it has."""
    own = uid is None or os.getresuid() == (uid, uid, uid)
    keeps = own and not has_capability(Capability.SETGID)
    if groups is None or (keeps and (not chosen or set(groups) == set(os.getgroups()))):
        return None
    return groups


def _forbidden(identity: Identity, settings: Settings) -> list[Flaw]:
    """What this process is not allowed to make of a child."""
    flaws: list[Flaw] = []
    uid, gid = identity.uid, identity.gid
    name = "user" if settings.group is None else "group"
    if uid is not None and os.getresuid() != (uid, uid, uid):
        if not has_capability(Capability.SETUID):
            flaws.append(("user", _refusal(f"become {settings.user}", Capability.SETUID, f", or as {settings.user}")))
        elif not has_capability(Capability.KILL) and uid != 0:
            flaws.append(("user", _refusal(f"signal workers that are {settings.user}", Capability.KILL)))
    if flaws:
        pass  # that says it all
    elif gid is not None and os.getresgid() != (gid, gid, gid) and not has_capability(Capability.SETGID):
        flaws.append((name, _refusal(f"take the group {gid}", Capability.SETGID)))
    elif identity.groups is not None and not has_capability(Capability.SETGID):
        flaws.append(("groups" if settings.groups else name, _refusal("set groups", Capability.SETGID)))
    if settings.chroot is not None:
        if not settings.chroot.is_dir():
            flaws.append(("chroot", f"{settings.chroot} is not a directory"))
        elif not has_capability(Capability.SYS_CHROOT):
            flaws.append(("chroot", _refusal("change its root directory", Capability.SYS_CHROOT)))
    return flaws


def _refusal(deed: str, needed: Capability, otherwise: str = "") -> str:
    if os.geteuid() == 0:
        return f"the daemon can't {deed}: it is root, but without CAP_{needed.name}; give it that (capabilities(7))"
    return f"the daemon can't {deed}: it is user {os.geteuid()}; start it as root{otherwise}"


def _misplaced(identity: Identity, settings: Settings) -> list[Flaw]:
    """The log where workers that are somebody else could put a file of theirs in its place."""
    path = settings.log.to
    if not isinstance(path, Path) or identity.uid in (None, 0, os.geteuid()):
        return []
    for found, what in ((path.parent, "its directory"), (path, "the file")):
        try:
            status = found.lstat() if found == path else found.stat()
        except OSError:  # it is made later, or its absence is told by who opens it
            continue
        sticky = status.st_mode & stat.S_ISVTX and status.st_uid != identity.uid
        if identity.may_write(status) and not sticky and not stat.S_ISLNK(status.st_mode):
            return [("log.to", f"{what} may be written by {settings.user}, as which a worker could redirect the log")]
    return []
