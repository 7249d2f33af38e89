"""Any settings that a daemon may have, drawn from the declarations, with texts that are easily taken for more."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from operator import add
from pathlib import Path
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits
from typing import Any

from hypothesis import strategies as st

from forkd import MOST_WORKERS
from forkd.config.address import LONGEST_PATH, Address
from forkd.config.fields import Kind, ListOf, MappingOf, make_section, options
from forkd.config.listener import Listener, Tls
from forkd.config.loader import disagreements
from forkd.config.settings import Admin, Settings
from forkd.config.units import Rate
from forkd.config.values import JOURNAL, UNIX, UNLIMITED, ScalarKind

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
LETTERS = st.characters(exclude_categories=["C", "Z"], include_characters=" ")  # one strategy: a text is one draw then
TEXTS = st.one_of(st.sampled_from([*ODD, *MORE_ODD]), st.text(LETTERS, min_size=1, max_size=25))
PATHS = TEXTS.map(lambda text: Path(f"/{text}"))
HOST_NUMBERS = (
    st.integers(0, (1 << 32) - 1).map(ipaddress.IPv4Address),
    st.integers(0, (1 << 128) - 1).map(ipaddress.IPv6Address),
)
HOSTS = st.one_of(
    st.sampled_from(["127.0.0.1", "localhost", "::1", "::", "fe80::1%eth0", "#"]),
    *(one.map(str) for one in HOST_NUMBERS),
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="[]:/@"), min_size=1),
)
PORTS = st.one_of(st.just(0), st.integers(0, 65535))
TCP = st.builds(lambda host, port: Address("tcp", host=host, port=port), HOSTS, PORTS)
UDP = TCP.map(lambda address: address._replace(scheme="udp"))
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

# Not by `from_regex`, which takes ten times as long: a draw for each letter, and seconds to list what UTF-8 can encode.
ALNUM = ascii_letters + digits
WORDS = st.text(ascii_lowercase + "_", min_size=1, max_size=3)
ATTRIBUTES = st.just("") | WORDS.map(".{}".format)
MODULES = st.builds(add, WORDS, ATTRIBUTES)
TAILS = st.text(ascii_lowercase + digits, max_size=3)

#: The values that each kind can have, by its name; whole numbers and choices say themselves what they can be.
ARGUMENTS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["5", "true", '"quoted"', "a:b", "\\a:b", "[1]", "", "two\nlines", "-"])
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "whole number or auto": st.integers(1, MOST_WORKERS),
    "rate": st.builds(Rate, st.integers(1, 999_999_999), st.sampled_from([1, 60, 3600, 86400])),
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
    "name": st.builds(add, st.sampled_from(ALNUM), st.text(ALNUM + "._-", max_size=63)),
    "module:attribute": st.builds("{}:{}{}{}".format, MODULES, st.sampled_from(ascii_uppercase), TAILS, ATTRIBUTES),
    "address": ADDRESSES,
    "argument": ARGUMENTS | st.lists(ARGUMENTS, max_size=3),
    "multicast group": st.sampled_from(["239.1.2.3", "224.0.0.251%eth0", "ff02::fb", "ff02::fb%wlan0"]),
    "tcp address": TCP.filter(lambda address: address.port > 0),
    "tcp or unix address": st.one_of(TCP, TEXTS.map(lambda text: Address("unix", path=f"/{text}"))),
    "HOST:PORT": UDP.filter(lambda address: address.port > 0),
    "network": st.one_of(
        st.just(ipaddress.ip_network("10.0.0.0/8")), *(one.map(ipaddress.ip_network) for one in HOST_NUMBERS)
    ),
}


VALUES["network or unix"] = st.just(UNIX) | VALUES["network"]


def values(kind: Kind) -> st.SearchStrategy[Any]:
    if isinstance(kind, MappingOf):
        return st.dictionaries(st.from_regex(kind.names, fullmatch=True), values(kind.item), max_size=3)
    if isinstance(kind, ListOf):
        return LISTENERS if kind.item is Listener else st.lists(values(kind.item), max_size=3).map(tuple)
    if not isinstance(kind, ScalarKind):
        return section(kind)
    if kind.bounds is not None and kind.name not in VALUES:
        drawn = (st.floats if kind.name.startswith("duration") else st.integers)(*kind.bounds)
        return st.just(0.0) | drawn if kind.zero else drawn
    return st.sampled_from(kind.schema["enum"]) if "enum" in kind.schema else VALUES[kind.name]


def section(declared: type) -> st.SearchStrategy[Any]:
    """A section with any value for some of its settings, and the defaults for the others."""
    choices = {name: values(option.kind) for name, option in options(declared).items()}
    required = {name for name, option in options(declared).items() if option.required}
    size = (len(choices) + 7) // 8

    @st.composite
    def drawn(draw: st.DrawFn) -> Any:
        # Bits say which settings are drawn, about one in four: it is the number of draws that takes the time.
        bits = draw(st.binary(min_size=2 * size, max_size=2 * size))
        chosen = int.from_bytes(bits[:size]) & int.from_bytes(bits[size:])
        found = {
            name: draw(strategy)
            for bit, (name, strategy) in enumerate(choices.items())
            if name in required or chosen >> bit & 1
        }
        return make_section(declared, found)

    return drawn()


def fitting(listener: Listener) -> Listener:
    """A listener without the file options where there is no file, and without what does not go with its address."""
    listener = fitting_program(listener)
    address, limits = listener.address, listener.limits
    if address.scheme != "udp":
        listener = replace(listener, multicast=())
    if address.scheme not in ("tcp", "udp"):
        listener = replace(listener, freebind=False)
    if not listener.command and address.scheme != "fd" and (listener.kind == "datagram") is not address.takes_datagrams:
        listener = replace(listener, kind="auto")
    proxies = () if address.scheme == "unix-dgram" else listener.proxy_protocol
    if address.scheme != "fd":
        proxies = tuple(one for one in proxies if (one == UNIX) is address.is_unix)
    listener = replace(listener, proxy_protocol=proxies)
    if address.is_unix and not proxies:
        limits = replace(limits, per_ip=0, rate_per_ip=None)
        listener = replace(listener, allow=(), deny=())
    if address.takes_datagrams:
        limits = replace(limits, connections=0, per_worker=0, per_ip=0, message=None)
    tls = Tls() if address.takes_datagrams else fitting_tls(listener.tls)
    if tls.cert is not None:
        limits = replace(limits, message=None)
    listener = replace(listener, limits=limits, tls=tls)
    if address.is_unix and not address.abstract:
        return listener
    return replace(listener, mode=None, owner=None, group=None)


def fitting_program(listener: Listener) -> Listener:
    """A listener without what a program has no use for, or without what only a program has."""
    if not listener.command:
        listener = replace(listener, wait=False)
        return replace(listener, kind="auto") if listener.kind == "program" else listener
    listener = replace(listener, handler=None, args={}, factory=False, kind="auto")
    if not listener.wait and not listener.address.takes_datagrams:
        return listener
    limits = replace(listener.limits, connections=0, per_worker=0, per_ip=0, rate_per_ip=None)
    return replace(listener, wait=True, allow=(), deny=(), proxy_protocol=(), limits=limits, tls=Tls())


def fitting_tls(tls: Tls) -> Tls:
    """What TLS is without what is of no use."""
    if tls.cert is None:
        return replace(tls, key=None, names=(), alpn=(), ciphers=None, client="none", client_ca=None)
    if tls.client == "none" or tls.client_ca is None:
        tls = replace(tls, client="none", client_ca=None)
    return replace(tls, ciphers=None) if tls.min_version == "1.3" else tls


def of_its_own(listener: Listener) -> object:
    """What no two listeners of a daemon share: the address, unless it is any free port."""
    return str(listener.address) if listener.address.port or not listener.address.host else object()


def fitting_services(settings: Settings) -> Settings:
    """Settings without options of the master's own addresses that those have no use for, and none in mode once."""
    if settings.mode == "once":
        listen = tuple(replace(one, wait=False) for one in settings.listen[:1])
        return replace(settings, admin=Admin(), agent=None, statsd=None, listen=listen)
    admin, addresses = settings.admin, settings.admin.address
    if all(one.is_unix for one in addresses):
        admin = replace(admin, allow=())
    if not any(one.is_unix and not one.abstract for one in addresses):
        admin = replace(admin, mode=None)
    return replace(settings, admin=admin)


LISTENERS = st.lists(section(Listener).map(fitting), min_size=1, max_size=4, unique_by=of_its_own).map(tuple)
SETTINGS: st.SearchStrategy[Settings] = (
    section(Settings).map(fitting_services).filter(lambda made: not list(disagreements(made)))
)
