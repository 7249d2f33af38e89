"""Who holds an address, and why it can't be had: for the message when it is in use. Read from /proc (proc_net(5)), so
it is a hint, never a fact to act on; for another user's processes it knows nothing, and says so by silence.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from forkd.config.address import Address
from forkd.errors import AddressInUse, ForkdError

# The state in /proc/net/tcp and udp of a socket that is bound for everybody: TCP_LISTEN, and TCP_CLOSE.
_STATES = {"tcp": "0A", "udp": "07"}


def holder_of(address: Address) -> str:
    """`NAME, pid N` of a process that listens there; empty where that can't be told."""
    inodes = {f"socket:[{inode}]" for inode in (_unix(address) if address.is_unix else _internet(address))}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(entry.readlink()) in inodes for entry in (process / "fd").iterdir()):
                return f"{_name(process)}, pid {process.name}"
        except OSError:  # it has gone, or is not ours to look at
            continue
    return ""


def in_use(address: Address) -> ForkdError:
    """The error for an address that somebody else holds."""
    path = Path(address.path)
    if address.is_unix and not address.abstract and path.is_symlink():
        return ForkdError(f"can't listen on {address}: it is a symbolic link; remove it, or name where it leads")
    if address.is_unix and not address.abstract and path.exists() and not path.is_socket():
        return AddressInUse(f"{address} is in use by a file that is not a socket")
    holder = holder_of(address)
    return AddressInUse(f"{address} is in use" + (f" by {holder}" if holder else ""))


def explained(error: OSError, address: Address) -> str:
    """Why an address can't be bound."""
    if error.errno == errno.EACCES and not address.is_unix and address.port < 1024:
        return "ports below 1024 are for root, or for who has CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is no address of this machine"
    return error.strerror or str(error)


def _name(process: Path) -> str:
    words = (process / "cmdline").read_bytes().split(b"\0")
    text = " ".join(word.decode(errors="replace") for word in words if word)
    return (text if text.isprintable() else ascii(text))[:80] or (process / "comm").read_text().strip()


def _lines(table: str) -> Iterator[list[str]]:
    try:
        text = Path("/proc/net", table).read_text()
    except OSError:
        return
    for line in text.splitlines()[1:]:
        yield line.split()


def _internet(address: Address) -> Iterator[str]:
    try:
        wanted = {info[4][0] for info in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)}
    except OSError:
        return
    for table, family in ((address.scheme, socket.AF_INET), (f"{address.scheme}6", socket.AF_INET6)):
        for fields in _lines(table):
            host, _, port = fields[1].partition(":")
            if fields[3] != _STATES[address.scheme] or int(port, 16) != address.port:
                continue
            found = _host(host, family)
            # A wildcard conflicts with every address, and the other way round.
            if found in wanted or {found, *wanted} & {"0.0.0.0", "::"}:  # noqa: S104
                yield fields[9]


def _host(text: str, family: socket.AddressFamily) -> str:
    """A host of /proc/net/tcp or udp: each 32-bit word in hexadecimal, as this machine stores it."""
    words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
    return socket.inet_ntop(family, b"".join(words))


def _unix(address: Address) -> Iterator[str]:
    for fields in _lines("unix"):
        if len(fields) == 8 and fields[7] == address.path:
            yield fields[6]
