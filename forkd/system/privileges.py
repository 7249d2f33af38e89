"""Dropping privileges: a freshly forked worker gets the limits, root directory, user and groups of the settings.

Every step is checked when it is done, and all of it is verified in the end by asking the kernel: a worker that is not
what it should be must not serve. The order is forced: limits and the root directory while there is the right to change
them; the bounding set before CAP_SETPCAP is lost; groups before the user; what can't be undone last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from forkd.config.settings import Settings
from forkd.errors import ForkdError
from forkd.system.capabilities import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    Capability,
    ProcStatus,
    clear_ambient_set,
    drop_bounding_set,
    drop_capabilities,
    has_capability,
)
from forkd.system.identity import Identity
from forkd.system.libc import prctl
from forkd.system.rlimits import set_limits
from forkd.system.unix_paths import current_umask


class PrivilegeError(ForkdError):
    """A worker can't drop its privileges as it should; the sentence names the step."""


def drop_privileges(settings: Settings, identity: Identity) -> None:
    """Makes this process a worker's, for good. The kernel forgets a signal that was asked for at the parent's death
    (prctl(2), PR_SET_PDEATHSIG).

    Args:
        settings: its limits, root directory, umask and the like.
        identity: the user and groups that it becomes.

    Raises:
        PrivilegeError: a step failed, or did not do what it should; this process must not serve.
    """
    load_late_modules()
    status = None
    with contextlib.suppress(OSError):
        status = ProcStatus()
    try:
        strict = has_capability(Capability.SETPCAP)
        for name, step in _steps(settings, identity):
            try:
                step()
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise PrivilegeError(f"can't drop privileges: {name}: {reason}") from None
        for wrong in _deviations(settings, identity, status, with_bounding_set=strict):
            raise PrivilegeError(f"can't drop privileges: all is done, but {wrong}")
    finally:
        if status is not None:
            status.close()


def load_late_modules() -> None:
    """Loads what Python loads when it first needs it: in a chroot, or as another user, it may not find it then. Where
    the master has done so before the fork, this takes no time.
    """
    import concurrent.futures.thread  # noqa: F401, PLC0415
    import encodings.ascii  # noqa: PLC0415
    import encodings.idna  # noqa: PLC0415
    import encodings.latin_1  # noqa: F401, PLC0415


def _becomes_unprivileged(identity: Identity) -> bool:
    """Whether it becomes a user that should have no privileges at all."""
    return identity.uid not in (None, 0)


def _no_new_privs(settings: Settings) -> bool:
    return settings.user is not None if settings.no_new_privs is None else settings.no_new_privs


def _steps(settings: Settings, identity: Identity) -> Iterator[tuple[str, Callable[[], None]]]:
    """The steps to take, in their order, each with its name for messages."""
    uid, gid, groups, chroot, umask = identity.uid, identity.gid, identity.groups, settings.chroot, settings.umask
    yield "rlimits", lambda: set_limits(settings.rlimits)
    if chroot is not None:
        yield f"chroot({chroot})", lambda: _chroot(str(chroot))
    if _becomes_unprivileged(identity):
        if has_capability(Capability.SETPCAP):
            yield "prctl(PR_CAPBSET_DROP)", drop_bounding_set
        yield "prctl(PR_CAP_AMBIENT)", clear_ambient_set
    if groups is not None:
        yield f"setgroups({list(groups)})", lambda: os.setgroups(groups)
    if gid is not None:
        yield f"setresgid({gid})", lambda: os.setresgid(gid, gid, gid)
    if uid is not None:
        yield f"setresuid({uid})", lambda: os.setresuid(uid, uid, uid)
    if _becomes_unprivileged(identity):
        yield "capset", drop_capabilities
    if settings.rlimits.core and uid is not None:
        # A process that has changed its user dumps no core, nor can others of that user trace it. That is right, as it
        # has the memory of the master, unless core files are asked for.
        yield "prctl(PR_SET_DUMPABLE)", lambda: _prctl(PR_SET_DUMPABLE)
    if _no_new_privs(settings):
        yield "prctl(PR_SET_NO_NEW_PRIVS)", lambda: _prctl(PR_SET_NO_NEW_PRIVS)
    if umask is not None:
        yield f"umask({umask:04o})", lambda: _umask(umask)


def _prctl(option: int) -> None:
    prctl(option, 1)


def _umask(umask: int) -> None:
    os.umask(umask)


def _chroot(path: str) -> None:
    os.chroot(path)
    os.chdir("/")


def _deviations(
    settings: Settings, identity: Identity, status: ProcStatus | None, *, with_bounding_set: bool
) -> Iterator[str]:
    """What is not as it should be, a clause each."""
    uid, gid, groups = identity.uid, identity.gid, identity.groups
    if uid is not None and os.getresuid() != (uid, uid, uid):
        yield f"its user ids are {os.getresuid()}"
    if gid is not None and os.getresgid() != (gid, gid, gid):
        yield f"its group ids are {os.getresgid()}"
    if groups is not None and set(os.getgroups()) != set(groups):
        yield f"its supplementary groups are {os.getgroups()}"
    if settings.umask is not None and current_umask() != settings.umask & 0o777:
        yield f"its umask is {current_umask():04o}"
    if _becomes_unprivileged(identity) and _is_root_again():
        yield "it can become root again"
    if status is not None:
        yield from _deviations_in_status(settings, identity, status.read(), with_bounding_set=with_bounding_set)


def _is_root_again() -> bool:
    try:
        os.setuid(0)
    except PermissionError:
        return False
    return True


def _deviations_in_status(
    settings: Settings, identity: Identity, found: dict[str, str], *, with_bounding_set: bool
) -> Iterator[str]:
    if _becomes_unprivileged(identity):
        if set(found["Uid"].split()) != {str(identity.uid)}:  # the fourth is the file system's, which no call tells
            yield f"the kernel says that its user ids are {found['Uid']}"
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", *(["CapBnd"] if with_bounding_set else [])):
            if int(found.get(name, "0"), 16):
                yield f"it has capabilities: {name} {found[name]}"
    if _no_new_privs(settings) and found.get("NoNewPrivs", "1") != "1":
        yield "programs that it starts may gain privileges: NoNewPrivs 0"
