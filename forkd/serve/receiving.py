"""The receiving half of a connection: what the kernel has for it, read and handed to the protocol, and the end of that.

asyncio's contract as well. `_data_ready` is on the path of every request.
"""

from __future__ import annotations

import errno
import os
import socket
from asyncio import base_events
from collections.abc import Callable
from typing import Any

from forkd.serve.loop import EDGE, ERR, HUP, IN, OUT, RDHUP
from forkd.serve.sending import SendingHalf

#: Bytes of one read at most.
READ_SIZE = 64 * 1024

_RESET = errno.ECONNRESET, os.strerror(errno.ECONNRESET)


class ReceivingHalf(SendingHalf):
    """What a transport needs for receiving. Its subclass fills these fields, all in one go."""

    __slots__ = ("_deliver", "_kept_open", "_paused", "_reader", "_recv")

    _deliver: Any  # data_received of the protocol in charge
    _reader: Any  # what reads for it
    _recv: Callable[[int], bytes]
    _paused: bool
    _kept_open: bool | None  # what the protocol has answered to the end of file; None: it has not been told of any

    def close(self) -> None:
        """Stops reading, sends what is unsent, then closes."""
        raise NotImplementedError

    def _handler_failed(self, error: BaseException, message: str) -> None:
        """Tells of what a handler has raised, and ends the connection."""
        raise NotImplementedError

    def _data_ready(self, mask: int) -> None:
        if mask != IN:
            self._mixed_ready(mask)
            return
        try:
            data = self._recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._read_failed(error)
            return
        if not data:
            self._end_of_file()
            return
        try:
            self._context.run(self._deliver, data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self._handler_failed(error, "Fatal error: protocol.data_received() call failed.")

    def _buffer_ready(self, mask: int) -> None:
        if mask != IN:
            self._mixed_ready(mask)
            return
        protocol: Any = self._protocol
        try:
            buffer = self._context.run(protocol.get_buffer, -1)
            if not len(buffer):
                raise RuntimeError("get_buffer() returned an empty buffer")  # noqa: TRY301 (asyncio's own error)
            count = self._sock.recv_into(buffer)
        except (SystemExit, KeyboardInterrupt):
            raise
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._read_failed(error)
            return
        except BaseException as error:  # noqa: BLE001 (the handler's border: its buffer may be of no use)
            self._handler_failed(error, "Fatal error: protocol.get_buffer() call failed.")
            return
        if not count:
            self._end_of_file()
            return
        if self._stamps is not None:
            self._stamps.note_in(count)
        try:
            self._context.run(protocol.buffer_updated, count)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self._handler_failed(error, "Fatal error: protocol.buffer_updated() call failed.")

    def _mixed_ready(self, mask: int) -> None:
        """Anything but plainly readable: writable, hung up, in error; or not to be read now."""
        if self._interest & OUT and mask & ~IN:
            self._flush()
        if self._interest & IN and mask & ~OUT:
            # Asked for its error the kernel forgets it, so that reading gives what came before, then the end of file:
            # a client that resets costs no exception in recv.
            if mask & ERR and (number := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                self._error = (
                    ConnectionResetError(*_RESET) if number == _RESET[0] else OSError(number, os.strerror(number))
                )
            self._reader(IN)
        elif self._interest & EDGE and mask & (RDHUP | HUP | ERR):
            self._hung_up(mask)

    def _hung_up(self, mask: int) -> None:
        """While nothing is read: the peer has reset the connection, has closed it, or sends no more.

        A reset ends the connection. The end of file is told, unless there is something to be read before it; but the
        transport does not close itself then, as it would otherwise, before the handler reads on: a peer that has only
        shut down its sending side may be owed an answer, and it looks like one that has closed.
        """
        if mask & ERR and (number := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            # A reset that comes after the end of file is EPIPE to Linux.
            self._error = (
                ConnectionResetError(*_RESET)
                if number in (errno.ECONNRESET, errno.EPIPE)
                else OSError(number, os.strerror(number))
            )
        if self._error is not None:
            self._broken(self._error)
            return
        if self._kept_open is None and not (self._nothing_unread() and self._tell_end_of_file()):
            return
        # It reads on already; or the connection is closed in both directions, and no answer can be sent.
        if not self._kept_open and (mask & HUP or not self._paused):
            self.close()

    def _nothing_unread(self) -> bool:
        """Whether the next read would find the end of file, and the protocol can be told of it."""
        # asyncio's sendfile takes anything but a loss for a mistake while it has the connection.
        if isinstance(self._protocol, base_events._SendfileFallbackProtocol):  # type: ignore[attr-defined]
            return False
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._broken(error)
            return False

    def _broken(self, error: OSError) -> None:
        self._report(error, "Fatal read error on socket transport")
        self._force_close(error)

    def _tell_end_of_file(self) -> bool:
        """Tells the protocol, whose answer is in `_kept_open` then; False when it has raised instead."""
        self._kept_open = True  # should it read on in there it has been told already
        try:
            self._kept_open = bool(self._context.run(self._protocol.eof_received))  # type: ignore[attr-defined]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self._handler_failed(error, "Fatal error: protocol.eof_received() call failed.")
            return False
        return True

    def _end_of_file(self) -> None:
        if self._conn_lost:
            return
        if self._error is not None:
            self._read_failed(self._error)
            return
        if not self._tell_end_of_file():
            return
        if self._kept_open:
            if not self._closing:
                self._watch(self._interest & ~IN | EDGE)
        elif self._out or self._closing:
            self.close()
        else:  # called from the loop with nothing unsent, so there is nobody to be surprised by it happening at once
            self._closing = True
            self._conn_lost += 1
            self._connection_lost(None)

    def _read_failed(self, error: OSError) -> None:
        if self._conn_lost:
            return
        self._report(error, "Fatal read error on socket transport")
        self._closing = True
        self._conn_lost += 1
        self._connection_lost(error)

    def is_reading(self) -> bool:
        """Whether data is being received."""
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        """Receives nothing until `resume_reading`; the peer feels it when the kernel's buffer is full. That it has gone
        is noticed all the same.
        """
        if self._closing or self._paused:
            return
        self._paused = True
        self._watch(self._interest & ~IN | RDHUP | EDGE)

    def resume_reading(self) -> None:
        """Receives again."""
        if self._closing or not self._paused:
            return
        self._paused = False
        if self._kept_open is None:
            self._watch(self._interest & ~(RDHUP | EDGE) | IN)
        elif not self._kept_open:
            self.close()
