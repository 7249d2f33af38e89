"""Any settings that a daemon may have, drawn from the declarations, with texts that are easily taken for more."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from forkd.config.address import LONGEST_PATH, Address
from forkd.config.agree import mistakes
from forkd.config.declare import ListOf, Option, default_of, made_of, options
from forkd.config.listener import Listener
from forkd.config.options import Settings
from forkd.config.scales import Rate
from forkd.config.units import JOURNAL, MOST_WORKERS, UNLIMITED, Kind

ODD = [
    "[x]",
    "[",
    "[]",
    "{}",
    "# x",
    "#",
    "a: b",
    "- a",
    ",",
    "~",
    "null",
    "yes",
    "unset",
    "auto",
    "stderr",
    "0123",
    "1%",
]
MORE_ODD = ["'", '"', "\\", "&a", "*a", "!x", " ", " x ", "a b", "x mode", "->", "é", "日", "\U0001f600"]

# Nothing here is filtered: hypothesis gives up a test whose inputs are mostly thrown away.
LETTERS = st.characters(exclude_categories=["C", "Z"])
TEXTS = st.one_of(st.sampled_from([*ODD, *MORE_ODD]), st.text(LETTERS | st.just(" "), min_size=1, max_size=25))
PATHS = TEXTS.map(lambda text: Path(f"/{text}"))
HOSTS = st.one_of(
    st.sampled_from(["127.0.0.1", "localhost", "::1", "::", "fe80::1%eth0", "#"]),
    st.ip_addresses().map(str),
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="[]:/@"), min_size=1),
)
PORTS = st.one_of(st.just(0), st.integers(0, 65535))
TCP = st.builds(lambda host, port: Address("tcp", host=host, port=port), HOSTS, PORTS)
UDP = TCP.map(lambda address: replace(address, scheme="udp"))
ADDRESSES = st.one_of(
    TCP,
    UDP,
    st.sampled_from(["", "0", "web", "[x]", "#"]).map(lambda name: Address("fd", path=name)),
    st.builds(
        lambda scheme, first, text: Address(scheme, path=first + text),
        st.sampled_from(["unix", "unix-dgram"]),
        st.sampled_from("/@"),
        TEXTS,
    ).filter(lambda address: len(address.path.encode()) <= LONGEST_PATH),
)

#: The values that each kind can have, by its name; whole numbers and choices say themselves what they can be.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "whole number or auto": st.integers(1, MOST_WORKERS),
    "duration": st.floats(0, 1e15),
    "duration or off": st.floats(0, 1e15),
    "rate": st.builds(Rate, st.integers(1, 999_999_999), st.sampled_from([1, 60, 3600, 86400])),
    "size": st.integers(0, (1 << 63) - 1),
    "whole number or unlimited": st.just(UNLIMITED) | st.integers(64, 1 << 30),
    "size or unlimited": st.just(UNLIMITED) | st.integers(0, (1 << 63) - 1),
    "name or number": TEXTS,
    "percentage": st.floats(0, 1),
    "true or false": st.booleans(),
    "file mode": st.integers(0, 0o7777),
    "text": TEXTS,
    "text with escapes": TEXTS.map(lambda text: text.replace("\\", "\\x5c")),
    "path": PATHS,
    "path or journal or stderr": PATHS | st.just(JOURNAL),
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    "module:attribute": st.from_regex(
        r"[a-z_]{1,3}(\.[a-z_]{1,3})?:[A-Z][a-z0-9]{0,3}(\.[a-z_]{1,3})?", fullmatch=True
    ),
    "address": ADDRESSES,
    "multicast group": st.sampled_from(["239.1.2.3", "224.0.0.251%eth0", "ff02::fb", "ff02::fb%wlan0"]),
    "tcp address": TCP.filter(lambda address: address.port > 0),
    "network": st.ip_addresses().map(ipaddress.ip_network) | st.sampled_from([ipaddress.ip_network("10.0.0.0/8")]),
}


def values(kind: Kind[Any] | ListOf | type) -> st.SearchStrategy[Any]:
    if isinstance(kind, ListOf):
        return LISTENERS if kind.item is Listener else st.lists(values(kind.item), max_size=3).map(tuple)
    if not isinstance(kind, Kind):
        return section(kind)
    if kind.name == "whole number":
        return st.integers(kind.schema["minimum"], kind.schema["maximum"])
    if kind.bounds is not None:
        return (st.integers if kind.name == "size" else st.floats)(*kind.bounds)
    return st.sampled_from(kind.schema["enum"]) if "enum" in kind.schema else VALUES[kind.name]


def section(declared: type) -> st.SearchStrategy[Any]:
    """A section with any value for each of its settings, unset ones too."""

    def of(name: str, option: Option) -> st.SearchStrategy[Any]:
        unset = not option.required and default_of(declared, name) is None
        return st.none() | values(option.kind) if unset else values(option.kind)

    drawn = st.fixed_dictionaries({name: of(name, option) for name, option in options(declared).items()})
    return drawn.map(lambda found: made_of(declared, found))


def fitting(listener: Listener) -> Listener:
    """A listener without the file options where there is no file, and without what does not go with its address."""
    address, limits = listener.address, listener.limits
    if address.scheme != "udp":
        listener = replace(listener, multicast=(), proxy_protocol=())
    if address.scheme != "fd" and (listener.kind == "datagram") is not address.takes_datagrams:
        listener = replace(listener, kind="auto")
    if address.is_unix:
        limits = replace(limits, per_ip=0, rate_per_ip=None)
        listener = replace(listener, allow=(), deny=())
    if address.takes_datagrams:
        limits = replace(limits, connections=0, per_worker=0, per_ip=0, message=None)
    listener = replace(listener, limits=limits)
    if address.is_unix and not address.abstract:
        return listener
    return replace(listener, mode=None, owner=None, group=None)


def of_its_own(listener: Listener) -> object:
    """What no two listeners of a daemon share: the address, unless it is any free port."""
    return str(listener.address) if listener.address.port or not listener.address.host else object()


LISTENERS = st.lists(section(Listener).map(fitting), min_size=1, max_size=4, unique_by=of_its_own).map(tuple)
SETTINGS: st.SearchStrategy[Settings] = section(Settings).filter(lambda made: not list(mistakes(made)))
