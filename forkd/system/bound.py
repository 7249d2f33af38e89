"""A listener and its sockets, which belong to the master: what becomes of them as workers come and go, and how another
process or image gets them.

A unix socket's path is removed only while it is still the file that we made.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkd.config.address import Address, parse_address
from forkd.config.listener import Listener
from forkd.errors import ForkdError
from forkd.system.datagrams import arranged, deafen, grow_group, width_of
from forkd.system.paths import inode_of
from forkd.system.tuning import tune


@dataclass(slots=True)
class BoundListener:
    """A listener and its sockets.

    Attributes:
        listener: its settings.
        address: where it really listens: with the port that the kernel chose where the settings say 0, and for an
            inherited socket where its maker has bound it.
        sockets: one for each address that the host's name stands for, of udp as many for each slot, slot by slot; one
            in all other cases.
        inode: device and inode of a unix socket's path, else None.
        lent: whether it is another master's yet, who alone may remove its path.
    """

    listener: Listener
    address: Address
    sockets: list[socket.socket]
    inode: tuple[int, int] | None = None
    lent: bool = False

    def places(self) -> dict[str, Any]:
        """Where its sockets take connections, fit for JSON: the address, and family, host and port of each socket that
        is open; of a unix one the path, an abstract one with NUL before it.
        """
        listening = [] if self.address.takes_datagrams else [sock for sock in self.sockets if sock.fileno() >= 0]
        return {"address": str(self.address), "sockets": [_place(sock) for sock in listening]}

    def described(self) -> dict[str, Any]:
        """All but the settings and the sockets, fit for JSON; `BoundListener.taken` makes it one again."""
        return {
            "wanted": str(self.listener.address),
            "address": str(self.address),
            "sockets": len(self.sockets),
            "inode": self.inode,
        }

    @classmethod
    def taken(
        cls, described: Mapping[str, Any], listener: Listener, descriptors: list[int], *, lent: bool = False
    ) -> BoundListener:
        """One that another process bound.

        Args:
            described: by `described`.
            listener: its settings.
            descriptors: of its sockets, in order; they are taken over, from the front of the list.
            lent: as the attribute.

        Raises:
            ValueError: it is not so described, or there are fewer descriptors.
        """
        if len(descriptors) < described["sockets"]:
            raise ValueError(f"{described['wanted']} came without its sockets")
        sockets = [socket.socket(fileno=descriptors.pop(0)) for _ in range(described["sockets"])]
        if listener.address.scheme == "udp":
            sockets = arranged(sockets)
        device_and_inode = described["inode"]
        inode = None if device_and_inode is None else (int(device_and_inode[0]), int(device_and_inode[1]))
        return cls(listener, parse_address(described["address"]), sockets, inode, lent)

    def fit(self, slots: int, *, shrink: bool = True) -> None:
        """Binds the datagram sockets that are missing for so many slots, and lets go those that are too many, unless
        these should stay; what lies in their queues is for the processes that have them. All generations that have this
        listener have the same list.

        Raises:
            ForkdError: one can't be bound; then nothing has changed.
        """
        if self.listener.address.scheme != "udp":
            return
        try:
            grown = grow_group(self.sockets, slots)
        except OSError as error:
            raise ForkdError(f"can't bind {self.address} for {slots} workers: {error.strerror}") from None
        for sock in grown:
            tune(sock, self.listener)
        self.sockets += grown
        if not shrink:
            return
        width = width_of(self.sockets)
        going, self.sockets[slots * width :] = self.sockets[slots * width :], []
        for sock in going:
            with contextlib.suppress(OSError):  # then it takes part until its last copy is closed
                deafen(sock)
            sock.close()

    def fall_silent(self) -> None:
        """Takes no more datagrams, for the end of the daemon: who sends one is told that nobody is there."""
        for sock in self.sockets if self.listener.address.scheme == "udp" else ():
            with contextlib.suppress(OSError):  # as above
                deafen(sock)

    def of_slot(self, slot: int) -> list[socket.socket]:
        """The sockets that the worker in this slot, from 1 on, serves."""
        if self.listener.address.scheme != "udp":
            return self.sockets
        width = width_of(self.sockets)
        return self.sockets[(slot - 1) * width : slot * width]

    def confine(self, slot: int) -> None:
        """In a worker: closes the sockets of the other slots."""
        own = self.of_slot(slot)
        for sock in self.sockets:
            if sock not in own:
                sock.close()
        self.sockets = own

    def close(self) -> None:
        """Closes the sockets in this process; the listener lives on in others that have them."""
        for sock in self.sockets:
            sock.close()

    def remove(self) -> None:
        """Closes the sockets and removes a unix socket's path, if it is still the one that was made here."""
        self.close()
        if self.inode is not None and not self.lent:
            with contextlib.suppress(FileNotFoundError):
                if inode_of(self.address.path) == self.inode:
                    Path(self.address.path).unlink()


def _place(sock: socket.socket) -> list[Any]:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return [sock.family, os.fsdecode(name), 0]
    return [sock.family, *name[:2]]
