"""Addresses as users write them: `tcp://HOST:PORT`, `unix:/path`, `unix:@abstract`, `fd:NAME-or-NUMBER`.

Parsing only: nothing is resolved, bound or looked up here.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Literal

FORMS = "tcp://HOST:PORT (an IPv6 host in brackets), unix:/path, unix:@name or fd:NAME (systemd's)"

#: sizeof(sockaddr_un.sun_path) less its final NUL, unix(7).
LONGEST_PATH = 107

_TCP = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\[\]:/@\s]+)):(?P<port>[0-9]{1,5})", re.ASCII)

# A name as systemd.socket(5) has it (FileDescriptorName=), but for spaces; or a number.
_FD = re.compile(r"[0-9]{1,7}|(?![0-9]+$)[!-9;-~]{0,255}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens.

    Attributes:
        scheme: the family of addresses.
        host: for tcp, a name or a numeric address without brackets; else empty.
        port: for tcp, 0 to 65535, 0 for any free one; else 0.
        path: for unix, an absolute path, or `@` and the abstract name; for fd, the number or name that an inherited
            socket has, empty for the first; else empty.
    """

    scheme: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def abstract(self) -> bool:
        """Whether it lives in Linux's abstract namespace, where no file stands for it (unix(7))."""
        return self.scheme == "unix" and self.path.startswith("@")

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}:{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address that `text` names.

    Raises:
        ValueError: it is of none of the forms; the message says what is wanted.
    """
    scheme, separator, rest = text.partition(":")
    if separator and scheme == "tcp" and rest.startswith("//"):
        return _parse_tcp(text, rest[2:])
    if separator and scheme == "unix":
        return _parse_unix(text, rest)
    if separator and scheme == "fd":
        return _parse_fd(text, rest)
    if _TCP.fullmatch(text):
        raise ValueError(f"{text!r} has no scheme; did you mean tcp://{text}?")
    if text.startswith(("/", "@")):
        raise ValueError(f"{text!r} has no scheme; did you mean unix:{text}?")
    raise ValueError(f"{text!r} is not an address; write {FORMS}")


def _parse_tcp(text: str, rest: str) -> Address:
    match = _TCP.fullmatch(rest)
    if match is None or not rest.isprintable():
        if rest.count(":") > 1 and "[" not in rest:
            raise ValueError(f"{text!r}: an IPv6 host stands in brackets, as in tcp://[::1]:7007")
        if ":" not in rest.rpartition("]")[2]:
            raise ValueError(f"{text!r} has no port; write tcp://HOST:PORT, with port 0 for any free one")
        raise ValueError(f"{text!r} is not an address; write tcp://HOST:PORT, as in tcp://127.0.0.1:7007")
    if match["v6"] and not _is_ipv6(match["v6"]):
        raise ValueError(f"{text!r}: {match['v6']} is not an IPv6 address")
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"{text!r}: a port is at most 65535")
    return Address("tcp", host=match["v6"] or match["host"], port=port)


def _is_ipv6(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except OSError:
        return False
    return True


def _parse_unix(text: str, path: str) -> Address:
    if len(path) < 2 or path[0] not in "/@":
        raise ValueError(f"{text!r}: write unix: and an absolute path, or unix:@name for an abstract socket")
    if not path.isprintable():
        raise ValueError(f"{text!r}: a unix socket's path has no NUL in it, nor anything else that can't be printed")
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(
            f"{text!r}: a unix socket's path has at most {LONGEST_PATH} bytes, this one {len(path.encode())}"
        )
    return Address("unix", path=path)


def _parse_fd(text: str, name: str) -> Address:
    if not _FD.fullmatch(name):
        raise ValueError(
            f"{text!r}: write fd: and an inherited socket's number or systemd's name for it, as in fd:0 or fd:web, or "
            "fd: alone for the first of systemd's"
        )
    return Address("fd", path=name)
