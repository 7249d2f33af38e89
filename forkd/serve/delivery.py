"""What a handler may want to know of what it has written: whether the peer has it, and in how many segments it goes.

That `write` returns says only that the bytes are kept somewhere: in the transport, in this machine's kernel, on the
way. What the peer's kernel has not acknowledged may never arrive; whether its program has read the rest only that
program can say.

    with transport.cork():
        transport.write(head)
        transport.write(body)
    await transport.wait_acked(5.0)

Streams handlers have it as `writer.transport`. Who uses none of this pays nothing for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from forkd.serve.loop import OUT
from forkd.serve.sending import SendingHalf
from forkd.system.tcp_info import read_tcp_info
from forkd.system.unsent import outgoing

# Seconds between two looks at what is unacknowledged: from the connection's round-trip time, but no less than the one,
# twice as long each time, and no more than the other.
_SOON, _AT_MOST = 0.001, 0.25


class Delivery(SendingHalf):
    """What a transport needs for it; it has no fields of its own."""

    __slots__ = ()

    def unacked(self) -> int:
        """Bytes that were written and that the peer's kernel has not acknowledged: those that are unsent, and the
        kernel's (SIOCOUTQ of tcp(7)), where an end of file that was written counts as one.

        Of a unix socket it is what the peer has not read, with what the kernel needs to keep it.

        Raises:
            ConnectionError: the connection is over. In `connection_lost` it still tells what the kernel had unsent.
        """
        if self._sock.fileno() < 0:
            raise self._over()
        return self.get_write_buffer_size() + outgoing(self._sock)

    async def wait_acked(self, timeout: float | None = None) -> None:
        """Returns when the peer's kernel has acknowledged all that was written; what is corked is sent first.

        The kernel tells of no such event, so this looks again and again: after a round-trip time, then less often.

        Args:
            timeout: seconds; None: as long as the connection lasts.

        Raises:
            TimeoutError: there are unacknowledged bytes after that time; it says how many. They are sent on.
            ConnectionError: the connection has ended first.
        """
        if self._corks:
            self._send_gathered()
        until = None if timeout is None else self._loop.time() + timeout
        info = None if self._conn_lost else read_tcp_info(self._sock)
        pause = max(_SOON, min(_AT_MOST, info.rtt / 1e6 if info else 0.0))
        while not self._conn_lost:
            count = self.unacked()
            if not count:
                return
            left = pause if until is None else until - self._loop.time()
            if left <= 0:
                raise TimeoutError(f"{count} bytes are unacknowledged after {timeout:g} s")
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, _AT_MOST)
        raise self._over()

    def _over(self) -> ConnectionError:
        if isinstance(self._error, ConnectionError):
            return type(self._error)(*self._error.args)
        why = f": {self._error.strerror}" if self._error is not None else ""
        return ConnectionAbortedError(f"the connection is over{why}")

    @contextmanager
    def cork(self) -> Iterator[None]:
        """Gathers what is written in a `with` block and sends it as one at the block's end, so that several writes make
        one segment.

        Above the high-water mark what there is is sent meanwhile. Blocks may be nested, and may await. What was written
        before an exception is sent too; `close` and `write_eof` in the block send it first.
        """
        self._corks += 1
        if self._out is None:
            self._out = bytearray()
        try:
            yield
        finally:
            self._corks -= 1
            if not self._corks:
                self._uncork()

    def _uncork(self) -> None:
        self._send_gathered()
        if not (self._out or self._closing or self._eof_sent):
            self._out = None
            self._maybe_resume_protocol()  # type: ignore[attr-defined]

    def _send_gathered(self) -> None:
        """Sends what was written in a corked transport, unless the loop is at it already."""
        out = self._out
        if not out or self._interest & OUT:
            return
        try:
            sent = self._send(out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        del out[:sent]
        if out:
            self._send_later()
