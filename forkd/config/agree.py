"""What settings must agree on among themselves, which no single value shows. Pure: settings in, mistakes out."""

from __future__ import annotations

from collections.abc import Iterator

from forkd.config.options import Settings

#: Where a mistake is, and what it is.
Mistake = tuple[tuple[str | int, ...], str]


def mistakes(settings: Settings) -> Iterator[Mistake]:
    """What is wrong with the settings among themselves; a listener is named by its number among theirs."""
    yield from mistakes_of_listeners(settings)
    yield from mistakes_of_once(settings)


def mistakes_of_listeners(settings: Settings) -> Iterator[Mistake]:
    """What a listener whose clients have no addresses can't ask of them."""
    for index, listener in enumerate(settings.listen):
        if listener.address.scheme != "unix":
            continue
        limits = listener.limits
        asked: dict[tuple[str, ...], object] = {
            ("limits", "per_ip"): limits.per_ip,
            ("limits", "rate_per_ip"): limits.rate_per_ip,
            ("allow",): listener.allow,
            ("deny",): listener.deny,
        }
        for keys in (keys for keys, value in asked.items() if value):
            yield (
                ("listen", index, *keys),
                f"means the addresses that clients come from, and {listener.address} has none",
            )


def mistakes_of_once(settings: Settings) -> Iterator[Mistake]:
    """What is wrong with the settings for single-connection mode, if they are for that."""
    if settings.mode != "once":
        return
    if len(settings.listen) > 1:
        yield ("listen",), f"mode once serves one client at one address, and here are {len(settings.listen)}"
    once = settings.once
    if once.fd in (1, 2):
        yield ("once", "fd"), f"{once.fd} is where forkd's own output goes; take 0, or a number from 3 on"
    address = settings.listen[0].address if settings.listen else None
    if once.from_ and address is not None and address.scheme == "unix":
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
