"""What a process that a handler forks keeps of its worker: nothing of forkd's.

A process pool of a handler lives as long as it likes. It must not hold a listener, which would keep the port from the
next daemon; a connection, whose client would wait for its end; the channel to the master; the loop's epoll, which it
shares with its parent; or signal handlers that tell that loop. `leave_at_fork` sees to what a worker has before its
handlers are imported, `leave_loop_at_fork` to what it serves later. A handler that wants a connection in a forked
process gives it a copy: `os.dup`. What `subprocess` forks is left as it is: execve(2) does all this.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable

from forkd import signals
from forkd.serve.accept.proxy_protocol import ProxyHeaderReader
from forkd.serve.datagram.transport import DatagramTransport
from forkd.serve.lingering import Lingering
from forkd.serve.loop import PollLoop
from forkd.serve.stream.threads import ThreadServer
from forkd.serve.stream.tls import TlsHandshake
from forkd.serve.stream.transport import StreamTransport
from forkd.system.logs import set_role
from forkd.system.process import set_title

_HOLDERS = StreamTransport | DatagramTransport | Lingering | ProxyHeaderReader | TlsHandshake | ThreadServer


def leave_at_fork(name: str, role: str, close: Callable[[], None]) -> None:
    """Has each process that is forked from now on leave this one's descriptors and signals, and take its own title.

    Args:
        name: the daemon's.
        role: this process's.
        close: closes the descriptors that are this process's alone.
    """

    def leave() -> None:
        if _will_execute():
            return
        set_role(f"{role} child")
        set_title(name, f"{role} child")
        _reset_signals()
        close()

    os.register_at_fork(after_in_child=leave)


def leave_loop_at_fork(loop: PollLoop) -> None:
    """Has each process that is forked from now on leave a loop and its connections. Should it come back into the loop,
    that raises.
    """

    def leave() -> None:
        if _will_execute():
            return
        for owner in {getattr(ready, "__self__", None) for ready in loop.selector.served.values()}:
            if isinstance(owner, _HOLDERS):
                owner.close_in_child()
        for connection in loop.outside:
            connection.close_in_child()
        loop.close_in_child()
        asyncio._set_running_loop(None)
        asyncio.set_event_loop(None)

    os.register_at_fork(after_in_child=leave)


def _will_execute() -> bool:
    """Whether it is `subprocess` that has forked this process, with a function to be called before execve(2)."""
    return sys._getframe(2).f_globals.get("__name__") == "subprocess"


def _reset_signals() -> None:
    """Gives the signals that forkd, or asyncio for it, handles their defaults; a handler's own stay."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
    faulthandler.unregister(signals.DUMP)
    signal.signal(signals.DUMP, signal.SIG_DFL)
    for signum in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            module = getattr(signal.getsignal(signum), "__module__", None) or ""
            if module.partition(".")[0] in ("forkd", "asyncio"):
                default = signal.default_int_handler if signum is signal.SIGINT else signal.SIG_DFL
                signal.signal(signum, default)
