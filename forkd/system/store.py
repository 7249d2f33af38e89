"""Listeners that the service manager keeps for the next master: systemd's file descriptor store (sd_notify(3)).

A master that was killed has no say any more; what it has given to the manager before comes back to the one that is
started in its place, with ports, backlogs and whoever waits in them. The manager knows nothing of a descriptor but a
name, so that says all there is to know: where the listener should listen, and where it really does.
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
from forkd.system.bound import BoundListener
from forkd.system.inherited import STORED, stored_sockets
from forkd.system.sockets import bind_all, update_listener

_LONGEST = 255  # of a name, sd_notify(3)
_PLAIN = "".join({*string.punctuation} - {":", "%"})  # a name is of printable ASCII, and has no colon


def names_of(listeners: Iterable[BoundListener]) -> dict[str, BoundListener]:
    """The names that listeners are kept by. Without one is what can't be kept, or is kept by the manager anyway."""
    named: dict[str, BoundListener] = {}
    alike: Counter[Address] = Counter()  # several may each want any free port
    for bound in listeners:
        wanted = bound.listener.address
        real = str(bound.address.port) if bound.inode is None else "-".join(map(str, bound.inode))
        if wanted.scheme == "udp":  # of more or fewer sockets it is another name, for them to be sent anew
            real += f"-{len(bound.sockets)}"
        name = f"{STORED}{quote(str(wanted), safe=_PLAIN)} {real} {alike[wanted]}"
        alike[wanted] += 1
        if wanted.scheme != "fd" and len(name) <= _LONGEST:
            named[name] = bound
    return named


def stored_names() -> frozenset[str]:
    """The names of what the manager had kept for this process."""
    return frozenset(stored_sockets().values())


def bind_stored(listeners: Sequence[Listener], slots: int = 1) -> list[BoundListener]:
    """Binds every listener that the manager has not kept, and takes back those that it has; what it has kept and nobody
    wants is closed. `slots` and what it raises are as of `bind_all`.
    """
    kept = _take_stored()
    bound = bind_all(listeners, kept, slots)
    used = {sock for one in bound for sock in one.sockets}
    for one in kept:
        if not used & {*one.sockets}:
            one.remove()
        else:
            _follow(next(found for found in bound if found.sockets is one.sockets))
    return bound


def _follow(bound: BoundListener) -> None:
    """The settings may be others than those of the master that has died."""
    try:
        update_listener(bound)
    except OSError as error:
        raise ForkdError(f"can't listen on {bound.address}: {error.strerror}") from None


def _take_stored() -> list[BoundListener]:
    by_name: dict[str, list[int]] = {}
    for descriptor, name in stored_sockets().items():
        by_name.setdefault(name, []).append(descriptor)
    found = []  # in whatever order they were kept
    for name, descriptors in by_name.items():
        try:
            found.append(_take(name, descriptors))
        except (ValueError, OSError):  # by another version, or its path is somebody else's now
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
    return [bound for _, bound in sorted(found, key=itemgetter(0))]


def _take(name: str, descriptors: list[int]) -> tuple[int, BoundListener]:
    """One of them, and its place among its like. Raises ValueError or OSError for one that is of no use any more."""
    text, real, place = name.removeprefix(STORED).split(" ")
    address, inode, order = parse_address(unquote(text)), None, int(place)
    if address.scheme in ("tcp", "udp"):
        address = Address(address.scheme, host=address.host, port=int(real.partition("-")[0]))
    elif not address.abstract:
        there = os.lstat(address.path)
        inode = there.st_dev, there.st_ino
        if real != f"{there.st_dev}-{there.st_ino}":
            raise ValueError(f"{address.path} is not the one that was made")
    for descriptor in descriptors:
        os.fstat(descriptor)
    described = {"wanted": unquote(text), "address": str(address), "sockets": len(descriptors), "inode": inode}
    bound = BoundListener.taken(
        described, Listener(address=parse_address(unquote(text)), handler=""), list(descriptors)
    )
    for sock in bound.sockets:
        sock.setblocking(False)
    return order, bound
