"""What settings must agree on among themselves, which no single value shows. Pure: settings in, mistakes out."""

from __future__ import annotations

from collections.abc import Iterator

from forkd.config.listener import Listener
from forkd.config.options import Settings

#: Where a mistake is, and what it is.
Mistake = tuple[tuple[str | int, ...], str]


def mistakes(settings: Settings) -> Iterator[Mistake]:
    """What is wrong with the settings among themselves; a listener is named by its number among theirs."""
    for index, listener in enumerate(settings.listen):
        for keys, message in (*_of_form(listener), *_of_addresses(listener), *_of_connections(listener)):
            yield ("listen", index, *keys), message
    yield from _mistakes_of_once(settings)


def _of_form(listener: Listener) -> Iterator[Mistake]:
    """What is served by another form of handler, or is no group."""
    address, kind = listener.address, listener.kind
    if address.scheme != "fd" and kind != "auto" and (kind == "datagram") is not address.takes_datagrams:
        what, wanted = (
            ("datagrams", "kind: datagram, an asyncio.DatagramProtocol")
            if address.takes_datagrams
            else ("connections", "kind: protocol or streams")
        )
        yield ("kind",), f"{kind} serves no {what}, which come to {address}; it wants {wanted}"
    if listener.multicast and address.scheme != "udp":
        yield ("multicast",), f"groups are joined by udp listeners, and {address} is none"
    if listener.proxy_protocol and address.scheme != "udp":
        yield ("proxy_protocol",), f"is read of datagrams that come to a udp listener, and {address} is none"


def _of_addresses(listener: Listener) -> Iterator[Mistake]:
    """What a listener whose clients have no addresses can't ask of them."""
    limits = listener.limits
    asked: dict[tuple[str, ...], object] = {
        ("limits", "per_ip"): limits.per_ip,
        ("limits", "rate_per_ip"): limits.rate_per_ip,
        ("allow",): listener.allow,
        ("deny",): listener.deny,
    }
    for keys in (keys for keys, value in asked.items() if value and listener.address.is_unix):
        yield keys, f"means the addresses that clients come from, and {listener.address} has none"


def _of_connections(listener: Listener) -> Iterator[Mistake]:
    """What counts connections where there are none."""
    if listener.address.takes_datagrams:
        for name in ("connections", "per_worker", "per_ip", "message"):
            if getattr(listener.limits, name) and not (name == "per_ip" and listener.address.is_unix):
                yield ("limits", name), f"is for connections, and at {listener.address} there are only datagrams"


def _mistakes_of_once(settings: Settings) -> Iterator[Mistake]:
    """What is wrong with the settings for single-connection mode, if they are for that."""
    if settings.mode != "once":
        return
    if len(settings.listen) > 1:
        yield ("listen",), f"mode once serves one client at one address, and here are {len(settings.listen)}"
    once = settings.once
    if once.fd in (1, 2):
        yield ("once", "fd"), f"{once.fd} is where forkd's own output goes; take 0, or a number from 3 on"
    address = settings.listen[0].address if settings.listen else None
    if once.from_ and address is not None and address.is_unix:
        yield ("once", "from"), f"means where a tcp client comes from, and {address} has none"
    if once.rendezvous is None:
        return
    if address is not None and address.scheme != "tcp":
        yield ("listen", 0, "address"), "a rendezvous is of two tcp addresses; write tcp://HOST:PORT"
    if once.rendezvous == address:
        yield ("once", "rendezvous"), f"{address} is our own address too; a socket would connect to itself"
    if once.adopt:
        yield ("once", "adopt"), "a rendezvous has no listener whose descriptor could be taken over; use once.fd"
    if once.from_:
        yield ("once", "from"), "a rendezvous is with its peer alone; leave it out"
