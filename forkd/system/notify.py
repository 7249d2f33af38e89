"""systemd's notification protocol (sd_notify(3)): datagrams to the service manager, and the watchdog that it asks for.

Where there is no manager nothing is sent. A manager that does not read must not hold up the master: what can't be sent
at once is not sent. What is sent when, and again, is decided by the master's `service_manager`.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Mapping, Sequence

#: The variables of the protocol. They are the master's alone: a child that has them could speak for it.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def manager_address(environment: Mapping[str, str]) -> str:
    """Where the service manager listens; empty where there is none."""
    return environment.get("NOTIFY_SOCKET", "")


class Notifier:
    """The socket to the service manager.

    Args:
        environment: with `NOTIFY_SOCKET`, where there is a manager.

    Attributes:
        watchdog: seconds within which the manager wants to hear of this process again and again; None: never.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = manager_address(environment)
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        self._sock: socket.socket | None = None
        self.watchdog = _watchdog_seconds(environment)
        if self._address:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sock.setblocking(False)

    @property
    def has_manager(self) -> bool:
        """Whether there is a manager."""
        return self._sock is not None

    def send(self, *lines: str, descriptors: Sequence[int] = ()) -> bool:
        """Sends assignments such as `READY=1`, in one datagram, and copies of descriptors with it.

        Returns:
            Whether there is no need to send it again: it is sent, or the manager is gone. Else its queue is full.
        """
        if self._sock is None:
            return True
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._sock.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Closes it; for a forked child, which must not speak for the master."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def forget_manager() -> None:
    """Takes the protocol's variables from the environment of a forked child."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def usec(seconds: float) -> int:
    """Microseconds, as the protocol has times."""
    return int(seconds * 1e6)


def monotonic_usec() -> int:
    """CLOCK_MONOTONIC in microseconds, for `MONOTONIC_USEC=`."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """The watchdog's seconds, as the environment has them (sd_watchdog_enabled(3)); None where it is off or another
    process's.
    """
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdecimal() or not int(text) or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6
