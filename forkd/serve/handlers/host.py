"""From a handler of whatever form to what serves a connection by it; for all who accept some."""

from __future__ import annotations

import asyncio

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.serve.accept import Serve, Tally
from forkd.serve.deadlines import Deadlines, Patience
from forkd.serve.handlers.load import Handler
from forkd.serve.handlers.protocol import ProtocolServer
from forkd.serve.handlers.streams import streams_factory
from forkd.serve.loop import PollLoop
from forkd.system.tuning import connection_tuner


def host(
    handler: Handler,
    listener: Listener,
    address: Address,
    loop: PollLoop,
    tally: Tally,
    conversations: set[asyncio.Task[None]],
    deadlines: Deadlines,
    *,
    access: bool,
) -> Serve:
    """What serves each connection of a listener.

    Args:
        handler: what the listener's settings name.
        listener: its settings.
        address: where it really listens, for the log.
        loop: this process's loop.
        tally: its count of connections, told when one ends.
        conversations: holds the task of each streams handler that has not returned.
        deadlines: this process's.
        access: whether the end of each connection is recorded.
    """
    factory = handler.target
    if handler.form == "streams":
        factory = streams_factory(handler.target, loop, conversations)
    patience = Patience(listener, deadlines)
    server = ProtocolServer(
        loop,
        factory,
        tally,
        listener.limits.write_buffer,
        str(address),
        patience if patience.first or patience.write else None,
        access=access,
    )
    if (fit := connection_tuner(listener)) is None:
        return server
    return lambda sock, peer: server(fit(sock), peer)
