"""Listeners that the service manager keeps for the next master: systemd's file descriptor store (sd_notify(3)).

A master that is killed can hand nothing over; what it has stored before comes back to the one that is started in its
place, with ports, backlogs and the clients that wait in them. The manager knows nothing of a descriptor but a name, so
the name says all that is needed: where the listener should listen, and where it really does.

The master's `service_manager` sends the names and sockets; a start binds by `bind_stored`.
"""

from __future__ import annotations

import contextlib
import os
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from urllib.parse import quote, unquote

from forkd.config.address import Address, parse_address
from forkd.config.listener import Listener
from forkd.errors import ForkdError
from forkd.system.inherited import STORED_PREFIX, stored_sockets
from forkd.system.listeners import BoundListener, bind_all, update_listener

_LONGEST_NAME = 255  # of a name, sd_notify(3)
_UNQUOTED = "".join({*string.punctuation} - {":", "%"})  # a name is of printable ASCII, and has no colon


def store_names(listeners: Iterable[BoundListener]) -> dict[str, BoundListener]:
    """The listeners that can be stored, by their names in the store. Left out are those of `fd:` addresses, which the
    manager has anyway, and those whose name would be too long.
    """
    named: dict[str, BoundListener] = {}
    alike: Counter[Address] = Counter()  # several may each be for any free port
    for bound in listeners:
        wanted = bound.listener.address
        real = str(bound.address.port) if bound.inode is None else "-".join(map(str, bound.inode))
        if wanted.scheme == "udp":  # another number of sockets is another name, so that they are sent again
            real += f"-{len(bound.sockets)}"
        name = f"{STORED_PREFIX}{quote(str(wanted), safe=_UNQUOTED)} {real} {alike[wanted]}"
        alike[wanted] += 1
        if wanted.scheme != "fd" and len(name) <= _LONGEST_NAME:
            named[name] = bound
    return named


def stored_names() -> frozenset[str]:
    """The names that the manager's store had when this process was started."""
    return frozenset(stored_sockets().values())


def bind_stored(listeners: Sequence[Listener], slots: int = 1) -> list[BoundListener]:
    """Takes back the listeners that the manager has kept, binds the others, and closes what was kept and is not wanted
    any more. `slots` is as in `bind_all`, and so are the errors.
    """
    kept = _restore_all()
    bound = bind_all(listeners, kept, slots)
    used = {sock for one in bound for sock in one.sockets}
    for one in kept:
        if not used & {*one.sockets}:
            one.remove()
        else:
            _apply_settings(next(found for found in bound if found.sockets is one.sockets))
    return bound


def _apply_settings(bound: BoundListener) -> None:
    """Applies the settings, which may be others than those of the master that has died."""
    try:
        update_listener(bound)
    except OSError as error:
        raise ForkdError(f"can't listen on {bound.address}: {error.strerror}") from None


def _restore_all() -> list[BoundListener]:
    by_name: dict[str, list[int]] = {}
    for descriptor, name in stored_sockets().items():
        by_name.setdefault(name, []).append(descriptor)
    found = []  # in any order
    for name, descriptors in by_name.items():
        try:
            found.append(_restore(name, descriptors))
        except (ValueError, OSError):  # stored by another version, or its path is another socket's now
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
    return [bound for _, bound in sorted(found, key=itemgetter(0))]


def _restore(name: str, descriptors: list[int]) -> tuple[int, BoundListener]:
    """A stored listener, and its number among those of the same address. Raises ValueError or OSError for one that is
    of no use any more.
    """
    text, real, number = name.removeprefix(STORED_PREFIX).split(" ")
    address, inode, order = parse_address(unquote(text)), None, int(number)
    if address.scheme in ("tcp", "udp"):
        address = Address(address.scheme, host=address.host, port=int(real.partition("-")[0]))
    elif not address.abstract:
        there = os.lstat(address.path)
        inode = there.st_dev, there.st_ino
        if real != f"{there.st_dev}-{there.st_ino}":
            raise ValueError(f"{address.path} is not the one that was made")
    for descriptor in descriptors:
        os.fstat(descriptor)
    description = {"wanted": unquote(text), "address": str(address), "sockets": len(descriptors), "inode": inode}
    listener = Listener(address=parse_address(unquote(text)), handler="")
    bound = BoundListener.from_description(description, listener, list(descriptors))
    for sock in bound.sockets:
        sock.setblocking(False)
    return order, bound
