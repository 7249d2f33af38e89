"""Users and groups: looked up by name or number, and the identity that workers run as.

Names are looked up by the process that starts the daemon, or by the helper that prepares a reload, and never by the
master or a worker: the name service may block, load libraries, or be gone by the time that a worker is to be replaced.
What is found goes with the generation as numbers.

`look_up_identity` also finds out whether this process could make a child that user, and tells every mistake at once.
`privileges` makes the change.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from forkd.errors import ForkdError
from forkd.system.capabilities import Capability, has_capability

if TYPE_CHECKING:
    from forkd.config.settings import Settings

#: The largest id of a user or group: (uid_t) -1 means "leave it" (setresuid(2), chown(2)).
LARGEST_ID = 0xFFFFFFFE

#: Variables that lead to what is the starting user's.
_OTHERS = (
    "MAIL", "DBUS_SESSION_BUS_ADDRESS", "SSH_AUTH_SOCK", "XAUTHORITY",
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME",
)  # fmt: skip

#: A mistake: the setting that it is about, and a sentence.
Mistake = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and groups that a worker runs as. None leaves what the daemon has.

    Attributes:
        uid: the user's id.
        gid: the group's id.
        groups: the ids of the supplementary groups.
        account: its name, home directory and shell, where it has a user of its own.
        control_gid: the id of the group that may use the control socket; looked up with the others.
    """

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] | None = None
    account: tuple[str, str, str] | None = None
    control_gid: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """Fit for JSON; `from_plain` makes it an identity again."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Identity:
        """One that another process looked up. Raises KeyError, TypeError or ValueError for anything else."""
        groups = plain["groups"]
        control_gid = plain.get("control_gid")  # a master of an older version has none, nor an account
        numbers = [plain["uid"], plain["gid"], control_gid, *(groups or ())]
        if not all(one is None or (type(one) is int and 0 <= one <= LARGEST_ID) for one in numbers):
            raise ValueError(f"{plain!r} is no identity")
        account = plain.get("account")
        if account is not None:
            name, home, shell = account
            if not all(isinstance(one, str) for one in (name, home, shell)):
                raise ValueError(f"{plain!r} is no identity")
            account = name, home, shell
        return cls(plain["uid"], plain["gid"], None if groups is None else tuple(groups), account, control_gid)

    def environment(self) -> dict[str, str | None]:
        """The variables that say whose process it is, as login(1) sets them; None for those that are to go."""
        if self.account is None:
            return {}
        name, home, shell = self.account
        runtime = f"/run/user/{self.uid}"
        try:
            there = os.stat(runtime).st_uid == self.uid
        except OSError:
            there = False
        own: dict[str, str | None] = {"HOME": home, "USER": name, "LOGNAME": name, "SHELL": shell}
        return own | {"XDG_RUNTIME_DIR": runtime if there else None} | dict.fromkeys(_OTHERS)


def find_identity(settings: Settings) -> Identity:
    """The identity that the settings mean. Raises ForkdError with all mistakes."""
    identity, mistakes = look_up_identity(settings)
    if mistakes:
        raise ForkdError("\n".join(f"{name}: {message}" for name, message in mistakes))
    return identity


def look_up_identity(settings: Settings) -> tuple[Identity, list[Mistake]]:
    """The identity that the settings mean, as far as it can be found, and every reason why a worker can't take it."""
    mistakes: list[Mistake] = []
    uid = gid = None
    groups: tuple[int, ...] | None = None
    try:
        uid, gid = _user_and_group(settings)
    except ValueError as error:
        mistakes.append(("user", str(error)))
    try:
        gid = gid if settings.group is None else find_group(settings.group)
    except ValueError as error:
        mistakes.append(("group", str(error)))
    try:
        if settings.user is not None or settings.group is not None or settings.groups:
            groups = tuple(dict.fromkeys(find_group(one) for one in settings.groups))
    except ValueError as error:
        mistakes.append(("groups", str(error)))
    if not mistakes:
        groups = _groups_to_set(uid, groups, chosen=bool(settings.groups))
        mistakes = _missing_rights(Identity(uid, gid, groups), settings)
    control_gid = None
    try:
        control_gid = _control_group(settings.control_group)
    except ValueError as error:
        mistakes.append(("control_group", str(error)))
    identity = Identity(uid, gid, groups, _account_of(uid), control_gid)
    return identity, mistakes


def find_user(text: str) -> tuple[int, int | None]:
    """A user's id, and that of its primary group; None for the group of an id that no user of this machine has."""
    number = _parse_id(text)
    try:
        entry = pwd.getpwnam(text) if number is None else pwd.getpwuid(number)
    except (KeyError, UnicodeError):
        if number is None:
            raise ValueError(f"there is no user {text!r} on this machine") from None
        return number, None
    return entry.pw_uid, entry.pw_gid


def _account_of(uid: int | None) -> tuple[str, str, str] | None:
    """The name, home directory and shell of another user than this process's."""
    if uid is None or uid == os.geteuid():
        return None
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:  # a number that no user of this machine has
        return str(uid), "/", "/bin/sh"
    return entry.pw_name, entry.pw_dir or "/", entry.pw_shell or "/bin/sh"


def find_group(text: str) -> int:
    """A group's id."""
    number = _parse_id(text)
    if number is not None:
        return number
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, UnicodeError):
        raise ValueError(f"there is no group {text!r} on this machine") from None


def _control_group(name: str | None) -> int | None:
    """The id of the group that may use the control socket. Raises ValueError where this process may not give it."""
    if name is None:
        return None
    gid = find_group(name)
    if gid not in (os.getegid(), *os.getgroups()) and not has_capability(Capability.CHOWN):
        raise ValueError(f"the daemon can't give its control socket to the group {name}, in which it is not")
    return gid


def _parse_id(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > 10 or int(text) > LARGEST_ID:
        raise ValueError(f"{text[:20]} is no user's or group's number; they end at {LARGEST_ID}")
    return int(text)


def _user_and_group(settings: Settings) -> tuple[int | None, int | None]:
    if settings.user is None:
        return None, None
    uid, gid = find_user(settings.user)
    if gid is None and settings.group is None:
        raise ValueError(f"this machine knows no user {settings.user}, and so no group of it; set group too")
    return uid, gid


def _groups_to_set(uid: int | None, groups: tuple[int, ...] | None, *, chosen: bool) -> tuple[int, ...] | None:
    """The groups to set. A process without the right to change them, whose user stays the same, keeps its own."""
    own = uid is None or os.getresuid() == (uid, uid, uid)
    keeps = own and not has_capability(Capability.SETGID)
    if groups is None or (keeps and (not chosen or set(groups) == set(os.getgroups()))):
        return None
    return groups


def _missing_rights(identity: Identity, settings: Settings) -> list[Mistake]:
    """What this process lacks the right to change in a child."""
    mistakes: list[Mistake] = []
    uid, gid = identity.uid, identity.gid
    name = "user" if settings.group is None else "group"
    if uid is not None and os.getresuid() != (uid, uid, uid):
        if not has_capability(Capability.SETUID):
            mistakes.append(
                ("user", _refusal(f"become {settings.user}", Capability.SETUID, f", or as {settings.user}"))
            )
        elif not has_capability(Capability.KILL) and uid != 0:
            mistakes.append(("user", _refusal(f"signal workers that are {settings.user}", Capability.KILL)))
    if mistakes:
        pass  # that says it all
    elif gid is not None and os.getresgid() != (gid, gid, gid) and not has_capability(Capability.SETGID):
        mistakes.append((name, _refusal(f"take the group {gid}", Capability.SETGID)))
    elif identity.groups is not None and not has_capability(Capability.SETGID):
        mistakes.append(("groups" if settings.groups else name, _refusal("set groups", Capability.SETGID)))
    if settings.chroot is not None:
        if not settings.chroot.is_dir():
            mistakes.append(("chroot", f"{settings.chroot} is not a directory"))
        elif not has_capability(Capability.SYS_CHROOT):
            mistakes.append(("chroot", _refusal("change its root directory", Capability.SYS_CHROOT)))
    return mistakes


def _refusal(action: str, needed: Capability, otherwise: str = "") -> str:
    if os.geteuid() == 0:
        return f"the daemon can't {action}: it is root, but without CAP_{needed.name}; give it that (capabilities(7))"
    return f"the daemon can't {action}: it is user {os.geteuid()}; start it as root{otherwise}"
