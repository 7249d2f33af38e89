"""Why forkd has ended a connection of its own accord: what a protocol's `connection_lost` is then called with, and what
reading or writing in a streams handler raises.

    def connection_lost(self, error):
        if isinstance(error, IdleTimeout):
            self.forget_session()

Each is a ConnectionAbortedError, so code that knows none of them takes it for a connection that is gone, as it should.
"""

from __future__ import annotations


class Ended(ConnectionAbortedError):
    """What all have in common.

    Attributes:
        reason: one word for it, as in the log, in `forkd status` and in the settings that it comes from.
    """

    reason = "ended"


class FirstByteTimeout(Ended):
    """The client has never sent anything, and for `timeouts.first_byte` it was sent nothing either."""

    reason = "first_byte"


class IdleTimeout(Ended):
    """For `timeouts.idle` nothing has come and nothing gone."""

    reason = "idle"


class WriteTimeout(Ended):
    """For `timeouts.write` the client has taken nothing of what is unsent."""

    reason = "write"


class LifetimeOver(Ended):
    """The connection is as old as `timeouts.lifetime` allows."""

    reason = "lifetime"


class HeartbeatLost(Ended):
    """The client has sent nothing for twice `keepalive.heartbeat`, although the protocol's `heartbeat()` was called."""

    reason = "heartbeat"


class WriteBufferFull(Ended):
    """The handler wrote again while more than `limits.write_buffer` was unsent: the client does not read."""

    reason = "write_buffer"


class HandshakeFailed(Ended):
    """TLS was not agreed on, in `tls.handshake` or at all. No handler is told: none has begun."""

    reason = "handshake"


class Killed(Ended):
    """An operator has ended it (`forkd clients --kill`)."""

    reason = "killed"
