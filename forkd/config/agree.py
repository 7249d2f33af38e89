"""What settings must agree on among themselves, which no single value shows. Pure: settings in, mistakes out."""

from __future__ import annotations

from collections.abc import Iterator

from forkd.config.options import Settings

#: Where a mistake is, and what it is.
Mistake = tuple[tuple[str | int, ...], str]


def mistakes_of(settings: Settings) -> Iterator[Mistake]:
    """All that is wrong."""
    yield from _mistakes_of_listeners(settings)
    yield from _mistakes_of_once(settings)


def _mistakes_of_listeners(settings: Settings) -> Iterator[Mistake]:
    for index, listener in enumerate(settings.listen):
        address, kind = listener.address, listener.kind
        if address.scheme != "fd" and kind != "auto" and (kind == "datagram") is not address.takes_datagrams:
            what, wanted = (
                ("datagrams", "kind: datagram, an asyncio.DatagramProtocol")
                if address.takes_datagrams
                else ("connections", "kind: protocol or streams")
            )
            yield ("listen", index, "kind"), f"{kind} serves no {what}, which come to {address}; it wants {wanted}"
        if listener.multicast and address.scheme != "udp":
            yield ("listen", index, "multicast"), f"groups are joined by udp listeners, and {address} is none"


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
