"""Addresses as users write them: `tcp://HOST:PORT`, `udp://HOST:PORT`, `unix:/path`, `unix:@abstract`,
`unix-dgram:/path`, `unix-dgram:@abstract`, `fd:NAME-or-NUMBER`.

They are parsed and shown here; nothing is resolved, bound or looked up.
"""

from __future__ import annotations

import re
import socket
from typing import Literal, NamedTuple

FORMS = (
    "tcp://HOST:PORT or udp://HOST:PORT (an IPv6 host in brackets), unix:/path or unix:@name, the same after "
    "unix-dgram:, or fd:NAME (systemd's)"
)

#: sizeof(sockaddr_un.sun_path) less its final NUL, unix(7).
LONGEST_PATH = 107

_INTERNET = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\[\]:/@\s]+)):(?P<port>[0-9]{1,5})", re.ASCII
)

# A name as systemd.socket(5) has it (FileDescriptorName=), but for spaces; or a number.
_FD = re.compile(r"[0-9]{1,7}|(?![0-9]+$)[!-9;-~]{0,255}", re.ASCII)


_INTERNET_SCHEMES: dict[str, Literal["tcp", "udp"]] = {"tcp": "tcp", "udp": "udp"}
_UNIX_SCHEMES: dict[str, Literal["unix", "unix-dgram"]] = {"unix": "unix", "unix-dgram": "unix-dgram"}


class Address(NamedTuple):
    """Where a listener listens.

    Attributes:
        scheme: the family of addresses.
        host: for tcp and udp, a name or a numeric address without brackets; else empty.
        port: for tcp and udp, 0 to 65535, 0 for any free one; else 0.
        path: for unix and unix-dgram, an absolute path, or `@` and the abstract name; for fd, the number or name that
            an inherited socket has, empty for the first; else empty.
    """

    scheme: Literal["tcp", "udp", "unix", "unix-dgram", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def abstract(self) -> bool:
        """Whether it is a name in Linux's abstract namespace, which is no file (unix(7))."""
        return self.is_unix and self.path.startswith("@")

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket's."""
        return self.scheme in ("unix", "unix-dgram")

    @property
    def takes_datagrams(self) -> bool:
        """Whether it is for datagrams rather than connections; of an `fd:` address only the socket can tell."""
        return self.scheme in ("udp", "unix-dgram")

    def __str__(self) -> str:
        if self.scheme not in ("tcp", "udp"):
            return f"{self.scheme}:{self.path}"
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address that `text` names.

    Raises:
        ValueError: it has none of the forms; the message says what is wanted.
    """
    scheme, separator, rest = text.partition(":")
    if separator and (internet := _INTERNET_SCHEMES.get(scheme)) and rest.startswith("//"):
        return _parse_internet(text, internet, rest[2:])
    if separator and (unix := _UNIX_SCHEMES.get(scheme)):
        return _parse_unix(text, unix, rest)
    if separator and scheme == "fd":
        return _parse_fd(text, rest)
    if _INTERNET.fullmatch(text):
        raise ValueError(f"{text!r} has no scheme; did you mean tcp://{text}?")
    if text.startswith(("/", "@")):
        raise ValueError(f"{text!r} has no scheme; did you mean unix:{text}?")
    raise ValueError(f"{text!r} is not an address; write {FORMS}")


def _parse_internet(text: str, scheme: Literal["tcp", "udp"], rest: str) -> Address:
    match = _INTERNET.fullmatch(rest)
    if match is None or not rest.isprintable():
        if rest.count(":") > 1 and "[" not in rest:
            raise ValueError(f"{text!r}: an IPv6 host is written in brackets, as in {scheme}://[::1]:7007")
        if ":" not in rest.rpartition("]")[2]:
            raise ValueError(f"{text!r} has no port; write {scheme}://HOST:PORT, with port 0 for any free one")
        raise ValueError(f"{text!r} is not an address; write {scheme}://HOST:PORT, as in {scheme}://127.0.0.1:7007")
    if match["v6"] and not _is_ipv6(match["v6"]):
        raise ValueError(f"{text!r}: {match['v6']} is not an IPv6 address")
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"{text!r}: a port is at most 65535")
    return Address(scheme, host=match["v6"] or match["host"], port=port)


def _is_ipv6(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except OSError:
        return False
    return True


def _parse_unix(text: str, scheme: Literal["unix", "unix-dgram"], path: str) -> Address:
    if len(path) < 2 or path[0] not in "/@":
        raise ValueError(f"{text!r}: write {scheme}: and an absolute path, or {scheme}:@name for an abstract socket")
    if not path.isprintable():
        raise ValueError(f"{text!r}: a unix socket's path has no NUL in it, nor anything else that can't be printed")
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(
            f"{text!r}: a unix socket's path has at most {LONGEST_PATH} bytes, this one {len(path.encode())}"
        )
    return Address(scheme, path=path)


def _parse_fd(text: str, name: str) -> Address:
    if not _FD.fullmatch(name):
        raise ValueError(
            f"{text!r}: write fd: and an inherited socket's number or systemd's name for it, as in fd:0 or fd:web, or "
            "fd: alone for the first of systemd's"
        )
    return Address("fd", path=name)
