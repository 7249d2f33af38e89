"""Programs: one for each client, its standard input and output the connection, as inetd's "nowait" has it; or one at a
time for a listening or datagram socket, as its "wait" has it.

Of a connection with TLS the program has one end of a socket pair, and a `Relay` on the loop passes on what is said.

The program is started by posix_spawn(3), which does not copy this process, with all signals at their defaults and no
descriptor but 0, 1 and 2, in a process group of its own. Its environment tells where it is and by what client, by the
names of ucspi (tcp-environ) and of xinetd. What it writes to standard error goes to the log, by line. A pidfd tells the
loop of its end. At a deadline, or when the worker ends, its whole group is told to end, and killed where it does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.errors import HandlerError
from forkd.serve.deadlines import ActivityStamps
from forkd.serve.loop import IN, OUT, PollLoop
from forkd.serve.stream.handed_over import HandedOver, HandOverServer
from forkd.serve.stream.tls import NOT_YET, BufferedTlsSession, TlsSession
from forkd.serve.stream.transport import ServerContext
from forkd.system.channel import wait_ready
from forkd.system.libc import c_function

log = logging.getLogger("forkd.program")

#: Seconds that a program has to end when it is told to; then it is killed.
_GRACE = 2.0

#: Seconds that killed programs have to be gone, at the very end of a worker.
_KILL_SECONDS = 0.2

#: Seconds in which a program that has a socket ends at once, and how many such ends there may be before the next one is
#: held up for as long.
_SHORT, _MOST_SHORT = 1.0, 20

#: Bytes that are moved at once between a client and a program. What waits for a slow program is kept for each
#: connection, and what is left of it is copied at each send that takes a part.
_READ_SIZE = 64 * 1024

#: Bytes of a line in the log at most, and of one read.
_LINE = 4096

#: Reads of what a program that has ended has written: all that a pipe holds. Another of its group may still write.
_READS_AT_END = 65_536 // _LINE

#: Variables that are about this process, or about a client, and not for programs.
_NOT_INHERITED = [
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "MAINPID",
    "PROTO",
    "REMOTE_ADDR",
    "REMOTE_HOST",
    "REMOTE_PORT",
    "LOCAL_ADDR",
    "LOCAL_PORT",
    "REMOTE_USER",
    "TCPLOCALIP",
    "TCPLOCALPORT",
    "TCPLOCALHOST",
    "TCPREMOTEIP",
    "TCPREMOTEPORT",
    "TCPREMOTEHOST",
    "TCPREMOTEINFO",
    "UNIXLOCALPATH",
    "UNIXREMOTEPID",
    "UNIXREMOTEEUID",
    "UNIXREMOTEEGID",
    "SSL_PROTOCOL",
    "SSL_CIPHER",
    "SSL_CIPHER_USEKEYSIZE",
    "SSL_TLS_SNI",
    "SSL_ALPN_PROTOCOL",
    "SSL_CLIENT_VERIFY",
    "SSL_CLIENT_S_DN",
    "SSL_CLIENT_DN",
    "SSL_CLIENT_I_DN",
    "SSL_CLIENT_M_SERIAL",
    "SSL_CLIENT_V_START",
    "SSL_CLIENT_V_END",
    "SSL_CLIENT_CERT",
]

#: The short names of what a distinguished name is made of (RFC 4514, section 3); others keep their long ones.
_SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}

_UCRED_SIZE = 12  # struct ucred of unix(7): three ints

_CLOSE_RANGE_CLOEXEC = 4  # linux/close_range.h
_TO_DEFAULT = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})

_REMOTE = (b"REMOTE_ADDR", b"REMOTE_HOST", b"TCPREMOTEIP"), (b"REMOTE_PORT", b"TCPREMOTEPORT")
_LOCAL = (b"LOCAL_ADDR", b"TCPLOCALIP"), (b"LOCAL_PORT", b"TCPLOCALPORT")


def base_environment(listener: Listener) -> dict[bytes, bytes]:
    """What all programs of a listener find in their environment: in bytes, which is not worked out for each of them."""
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {os.fsencode(name): os.fsencode(value) for name, value in (inherited | dict(listener.environment)).items()}


def client_environment(sock: socket.socket, peer: Any) -> dict[bytes, bytes]:
    """What a program finds in its environment about its client.

    Args:
        sock: the connection.
        peer: the client's address as accept(2) gave it, or as a proxy has told it.
    """
    header = getattr(sock, "proxy_header", None)
    local = header.destination if header is not None and header.destination is not None else _local_address(sock)
    if sock.family == socket.AF_UNIX and not isinstance(peer, tuple):
        return {b"PROTO": b"UNIX", b"UNIXLOCALPATH": _path(local)} | _peer_credentials(sock)
    found = {b"PROTO": b"TCP"}
    for address, (host_names, port_names) in ((local, _LOCAL), (peer, _REMOTE)):
        if isinstance(address, tuple):
            found |= dict.fromkeys(host_names, address[0].removeprefix("::ffff:").encode())
            found |= dict.fromkeys(port_names, b"%d" % address[1])
    return found


def _local_address(sock: socket.socket) -> Any:
    try:
        return sock.getsockname()
    except OSError:  # the client has gone
        return None


def _path(path: Any) -> bytes:
    """A unix socket's address in the form that settings have it."""
    name = os.fsencode(path) if path else b""
    return b"@" + name[1:] if name.startswith(b"\0") else name


def _peer_credentials(sock: socket.socket) -> dict[bytes, bytes]:
    with contextlib.suppress(OSError):
        numbers = memoryview(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED_SIZE)).cast("i")
        names = (b"UNIXREMOTEPID", b"UNIXREMOTEEUID", b"UNIXREMOTEEGID")
        return dict(zip(names, (b"%d" % number for number in numbers), strict=True))
    return {}


def tls_environment(session: TlsSession) -> dict[bytes, bytes]:
    """What a program finds in its environment about its client's TLS, by the names of mod_ssl, which ucspi-ssl has too,
    and of stunnel. Of a certificate that the client has shown all is verified.
    """
    cipher = session.cipher()
    found = {
        "SSL_PROTOCOL": session.version(),
        "SSL_CIPHER": cipher and cipher[0],
        "SSL_CIPHER_USEKEYSIZE": cipher and str(cipher[2]),
        "SSL_TLS_SNI": session.server_name,
        "SSL_ALPN_PROTOCOL": session.selected_alpn_protocol(),
        "SSL_CLIENT_VERIFY": "NONE",
    }
    if (shown := session.getpeercert(True)) is not None:
        says = session.getpeercert()
        subject = distinguished_name(says["subject"])
        found |= {
            "SSL_CLIENT_VERIFY": "SUCCESS",
            "SSL_CLIENT_S_DN": subject,
            "SSL_CLIENT_DN": subject,
            "SSL_CLIENT_I_DN": distinguished_name(says["issuer"]),
            "SSL_CLIENT_M_SERIAL": says["serialNumber"],
            "SSL_CLIENT_V_START": says["notBefore"],
            "SSL_CLIENT_V_END": says["notAfter"],
            "SSL_CLIENT_CERT": ssl.DER_cert_to_PEM_cert(shown),
        }
    return {os.fsencode(name): os.fsencode(value) for name, value in found.items() if value}


def distinguished_name(parts: Sequence[Sequence[tuple[str, str]]]) -> str:
    """A name of a certificate, as `getpeercert` has it, in the form of RFC 4514: the last part first."""
    return ",".join(
        "+".join(f"{_SHORT_NAMES.get(kind, kind)}={_escaped(value)}" for kind, value in part)
        for part in reversed(parts)
    )


def _escaped(value: str) -> str:
    """A part of a distinguished name with what means something there escaped (RFC 4514, section 2.4)."""
    found = "".join(
        f"\\{ord(one):02X}" if ord(one) < ord(" ") else f"\\{one}" if one in '"+,;<>\\' else one for one in value
    )
    if found[:1] in ("#", " "):
        found = f"\\{found}"
    return f"{found[:-1]}\\ " if found.endswith(" ") and len(value) > 1 else found


def _start(
    command: Sequence[str], descriptors: tuple[int, int], directory: Path | None, environment: Mapping[bytes, bytes]
) -> int:
    """Starts a program; its pid. Raises OSError, or SubprocessError.

    Args:
        command: the program and its arguments.
        descriptors: what its standard input and output are, and its standard error.
        directory: its current directory; None: this process's.
        environment: all of its environment.
    """
    both, error = descriptors
    executable = _found(command[0], environment.get(b"PATH", b""))
    if directory is None and (close_on_exec := _close_on_exec()) is not None:
        close_on_exec(3, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)  # whatever a library has left open
        return os.posix_spawn(
            executable,
            [*command],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, one, to) for one, to in ((both, 0), (both, 1), (error, 2))],
            setpgroup=0,
            setsigmask=(),
            setsigdef=_TO_DEFAULT,
        )
    started = subprocess.Popen(  # twice the work, but it can change the directory
        command,
        bufsize=0,
        executable=executable,
        stdin=both,
        stdout=both,
        stderr=error,
        cwd=directory,
        env=environment,
        process_group=0,
    )
    started.returncode = 0  # it is reaped here
    return started.pid


@cache
def _close_on_exec() -> Callable[..., int] | None:
    """close_range(2), of Linux 5.11 and glibc 2.34; None where it can't be had."""
    with contextlib.suppress(AttributeError, OSError):
        function = c_function("close_range", ctypes.c_uint, ctypes.c_uint, ctypes.c_int)
        function(0xFFFFFFFE, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)  # of which there is none
        return function
    return None


@lru_cache(maxsize=64)
def _found(program: str, path: bytes) -> str:
    """Where a program is: looked for once, not in each directory for each client."""
    return shutil.which(program, path=os.fsdecode(path or os.defpath)) or program


class Program(ABC):
    """A process of its own, in a process group of its own; `exited` is called on the loop when it has ended.

    Args:
        loop: the process's loop.
        command: the program and its arguments.
        descriptor: what its standard input and output are.
        directory: its current directory; None: this process's.
        environment: all of its environment.

    Attributes:
        pid: its number.

    Raises:
        OSError: it can't be started.
    """

    def __init__(
        self,
        loop: PollLoop,
        command: Sequence[str],
        descriptor: int,
        directory: Path | None,
        environment: Mapping[bytes, bytes],
    ) -> None:
        self._loop = loop
        self._command = command[0]
        reader, writer = os.pipe()
        try:
            os.set_blocking(reader, False)
            try:
                self.pid = _start(command, (descriptor, writer), directory, environment)
            except (FileNotFoundError, PermissionError):  # it may have been put elsewhere, or back
                _found.cache_clear()
                self.pid = _start(command, (descriptor, writer), directory, environment)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._reaped = False
        self._errors = ErrorLines(loop, reader, self._command, self.pid)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:  # no descriptor is left
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        loop.selector.served[self._pidfd] = self._ready
        loop.selector.epoll.register(self._pidfd, IN)

    def signal_group(self, signum: int) -> None:
        """Sends its process group a signal, while it has not been reaped."""
        if not self._reaped:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # of another user by now
                os.killpg(self.pid, signum)

    def _ready(self, mask: int) -> None:
        if not wait_ready(self._pidfd, select.POLLIN, 0):  # that was of the one who had this descriptor before
            return
        self._loop.selector.epoll.unregister(self._pidfd)
        status = self.reap(os.WNOHANG)
        for _ in range(_READS_AT_END):  # before it is told how the program has ended
            if not self._errors.ready(IN):
                break
        self.exited(status)

    @abstractmethod
    def exited(self, status: int) -> None:
        """It has ended with this exit status; less than 0: by that signal."""

    def reap(self, options: int) -> int:
        """Its exit status; less than 0: the signal that it has ended by."""
        del self._loop.selector.served[self._pidfd]
        os.close(self._pidfd)
        status = 0
        with contextlib.suppress(ChildProcessError):  # the handler of another listener waits for any child
            status = os.waitpid(self.pid, options)[1]
        self._reaped = True
        return os.waitstatus_to_exitcode(status)

    def kill_at_end(self) -> None:
        """After the loop has stopped: kills its group, and takes its exit status."""
        if not self._reaped:
            self.signal_group(signal.SIGKILL)
            if wait_ready(self._pidfd, select.POLLIN, _KILL_SECONDS):
                self.reap(os.WNOHANG)

    def close_in_child(self) -> None:
        """In a forked process: closes what it shares with its parent."""
        self._errors.close_in_child()
        if not self._reaped:
            self._reaped = True  # it is no child of this process
            os.close(self._pidfd)

    def tell(self, status: int, whose: str) -> None:
        """Logs an exit status that is not 0, and has it counted, or be that of `forkd once`."""
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        log.info("%s[%d] of %s has ended: %s", os.path.basename(self._command), self.pid, whose, how)
        self._loop.program_failed(status if status > 0 else 128 - status)


class WaitingSocket:
    """A listening or datagram socket that one program at a time has, when something comes to it: inetd's "wait".

    Args:
        context: what the process's connections share; a program counts as one.
        listener: the socket's settings.
        address: where it really listens, for the log.
        sock: the socket.
    """

    def __init__(self, context: ServerContext, listener: Listener, address: Address, sock: socket.socket) -> None:
        self.loop = context.loop
        self.listener = str(address)
        self.command, self.directory = listener.command, listener.directory
        self.environment = base_environment(listener) | {b"PROTO": b"UDP" if address.scheme == "udp" else b"TCP"}
        self.sock = sock
        self._stats = context.stats
        self._watches = self._stopped = False
        self._short = 0  # programs, one after another, that have ended at once
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.watch()

    def watch(self) -> None:
        """Waits until something comes."""
        if not self._stopped:
            self._watches = True
            self.loop.selector.served[self.sock.fileno()] = self._ready
            self.loop.selector.epoll.register(self.sock.fileno(), IN)

    def _leave(self) -> None:
        if self._watches:
            self._watches = False
            self.loop.selector.epoll.unregister(self.sock.fileno())
            del self.loop.selector.served[self.sock.fileno()]

    def _ready(self, mask: int) -> None:
        self._leave()
        self._stats.opened()
        try:
            self.sock.setblocking(True)
            SocketProgram(self)
        except (OSError, subprocess.SubprocessError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            self.loop.call_exception_handler(
                {"exception": HandlerError(f"{self.listener}: {self.command[0]} can't be started: {why}")}
            )
            self.program_ended(0.0)

    def program_ended(self, seconds: float) -> None:
        """The program has ended after so long. Where many end at once the next one is not started at once."""
        self._short = self._short + 1 if seconds < _SHORT else 0
        if self._short > _MOST_SHORT:
            self.loop.call_later(_SHORT, self.watch)
        else:
            self.watch()
        self._stats.closed()

    def stop(self) -> None:
        """Starts no more programs, and closes this process's copy of the socket."""
        self._stopped = True
        self._leave()
        self.sock.close()

    def close_in_child(self) -> None:
        """In a forked process: nothing, as all listeners are closed there."""


class SocketProgram(Program):
    """The program that has such a socket.

    Args:
        waiting: the socket, which is told of its end.
    """

    is_over = True  # no client: no operator can end it
    peer = None

    def __init__(self, waiting: WaitingSocket) -> None:
        super().__init__(waiting.loop, waiting.command, waiting.sock.fileno(), waiting.directory, waiting.environment)
        self._waiting = waiting
        self._began = monotonic()
        self._told_to_end = False
        waiting.loop.outside.add(self)

    def exited(self, status: int) -> None:
        """Lets the next one be started."""
        waiting = self._waiting
        waiting.loop.outside.discard(self)
        if status and not self._told_to_end:
            self.tell(status, waiting.listener)
        waiting.program_ended(monotonic() - self._began)

    def notify_drain(self) -> None:
        """Nothing: it may go on until the drain's deadline."""

    def close_at_exit(self) -> None:
        """At the end of the process: tells the program's group to end."""
        self._told_to_end = True
        self.signal_group(signal.SIGTERM)

    def abort(self) -> None:
        """After the loop has stopped: kills the program's group."""
        self.kill_at_end()


class ErrorLines:
    """What a program writes to standard error, into the log by line.

    Args:
        loop: the process's loop.
        reader: the end of the pipe; this owns it.
        command, pid: the program.
    """

    def __init__(self, loop: PollLoop, reader: int, command: str, pid: int) -> None:
        self._selector = loop.selector
        self._reader = reader
        self._command = command
        self._pid = pid
        self._rest = b""
        self._selector.served[reader] = self.ready
        self._selector.epoll.register(reader, IN)

    def ready(self, mask: int) -> bool:
        """Reads once, if there is something; whether there may be more."""
        if self._reader < 0:
            return False
        try:
            data = os.read(self._reader, _LINE)
        except BlockingIOError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) >= _LINE:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            if line:
                name = os.path.basename(self._command)
                log.info("%s[%d]: %s", name, self._pid, line.decode(errors="backslashreplace"))
        if not data:
            self._selector.epoll.unregister(self._reader)
            del self._selector.served[self._reader]
            self.close_in_child()
        return bool(data)

    def close_in_child(self) -> None:
        """Closes the pipe; in a forked process its copy."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1


class ProgramConnection(HandedOver):
    """A connection that a program has.

    Args:
        sock, peer, server: as of `HandedOver`.
        session: its TLS, of which the program sees nothing; None: it has none.
    """

    __slots__ = ("_program", "_relay", "_told_to_end")

    def __init__(
        self, sock: socket.socket, peer: Any, server: ProgramServer, session: BufferedTlsSession | None
    ) -> None:
        self._told_to_end = False
        environment = server.environment | client_environment(sock, peer)
        self._relay: Relay | None = None
        if session is None:
            sock.setblocking(True)
            self._program = ClientProgram(self, sock, server, environment)
            super().__init__(sock, peer, server)
            return
        ours, theirs = socket.socketpair()
        try:
            self._program = ClientProgram(self, theirs, server, environment | tls_environment(session))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        super().__init__(sock, peer, server)
        if sock.family != socket.AF_UNIX:
            self.received_before = session.handshake_bytes(sock)
        else:
            self.stamps = ActivityStamps(session, self._opened)
        self._relay = Relay(server.loop, session, (sock, ours), self.stamps or session)
        self._relay.move()

    @property
    def was_told_to_end(self) -> bool:
        """Whether forkd has told the program to end."""
        return self._told_to_end

    def is_lost(self) -> bool:
        """As of any connection."""
        return super().is_lost() or (self._relay is not None and self._relay.is_lost)

    def program_ended(self) -> None:
        """The program has ended; what it has said last is still to be passed on where there is a relay."""
        if self._relay is None:
            self.finish()
            return
        self._relay.finish(self.finish)
        if self._ended is not None:
            self._relay.lose_client()

    def cut(self) -> None:
        """Tells the program's group to end; kills it a little later."""
        self._told_to_end = True
        if self._relay is not None and self._relay.is_finishing:
            self._relay.lose_client()
        self._program.signal_group(signal.SIGTERM)
        self._server.loop.call_later(_GRACE, self._program.signal_group, signal.SIGKILL)

    def close_at_exit(self) -> None:
        """At the end of the process: tells the program's group to end."""
        self._told_to_end = True
        self._program.signal_group(signal.SIGTERM)

    def abort(self) -> None:
        """After the loop has stopped: kills the program's group."""
        self._program.kill_at_end()

    def close_in_child(self) -> None:
        """As of any connection."""
        super().close_in_child()
        if self._relay is not None:
            self._relay.close_in_child()
        self._program.close_in_child()

    def _has_sent_end(self) -> bool:
        return super()._has_sent_end() if self._relay is None else self._relay.client_has_ended


class ClientProgram(Program):
    """The program of one connection.

    Args:
        connection: the connection, which is told when this has ended.
        sock: what its standard input and output are.
        server: the connection's.
        environment: all of its environment.
    """

    def __init__(
        self,
        connection: ProgramConnection,
        sock: socket.socket,
        server: ProgramServer,
        environment: Mapping[bytes, bytes],
    ) -> None:
        super().__init__(server.loop, server.command, sock.fileno(), server.directory, environment)
        self._connection = connection

    def exited(self, status: int) -> None:
        """Ends the connection."""
        connection = self._connection
        # That a program is ended by its client's leaving is no failure, nor that it is told to end.
        excused = connection.was_told_to_end or status in (0, -signal.SIGPIPE) or connection.is_lost()
        connection.program_ended()
        if not excused:
            self.tell(status, f"client {connection.peer!r}")


class Relay:
    """Passes on what a client with TLS and its program say to each other, neither faster than the other takes it.

    The end of either is passed on too, and the other way goes on. A client that is lost looks to the program as if the
    connection were its own: it reads the end of file, and writing fails.

    Args:
        loop: the process's loop.
        session: the client's TLS.
        ends: the client's socket, which is not this one's to close, and the end of the pair of which the program has
            the other; this owns it.
        source: what reads and writes: the session, or what notes that for it.

    Attributes:
        client_has_ended: whether the client has sent its end, or is lost.
        is_lost: whether the client can't be sent anything any more.
    """

    def __init__(
        self,
        loop: PollLoop,
        session: BufferedTlsSession,
        ends: tuple[socket.socket, socket.socket],
        source: BufferedTlsSession | ActivityStamps,
    ) -> None:
        self._loop = loop
        self._selector = loop.selector
        self._session = session
        self._client, self._program = ends
        self._program.setblocking(False)
        self._recv, self._send = source.recv, source.send
        self._to_program = b""  # what was read, and not taken yet
        self._masks = {one.fileno(): 0 for one in ends}  # what epoll watches each of them for
        self.client_has_ended = self.is_lost = False
        self._program_takes = self._program_sends = True
        self._end_told = False  # to the client
        self._finished: Callable[[], None] | None = None  # set when the program has ended
        for fd in self._masks:
            self._selector.served[fd] = self.move

    def move(self, mask: int = 0) -> None:
        """Passes on what there is, one read of either; called by the loop."""
        if not self._masks:
            return
        self._from_client()
        self._from_program()
        if not (self._program_sends or self._end_told or self.is_lost):
            self._end_told = True
            self._session.close_notify()
        self._settle()
        unsent = self._session.unsent and not self.is_lost
        reads_client = not (self.client_has_ended or self._to_program) and self._program_takes
        self._watch(self._client, IN * reads_client | OUT * unsent)
        reads_program = self._program_sends and not unsent
        self._watch(self._program, IN * reads_program | OUT * bool(self._to_program))
        # Of its end, where it came with data, the client's socket does not tell. And whatever the program has started
        # may keep its socket open, and say nothing.
        if (reads_client and self._session.pending()) or (reads_program and self._finished is not None):
            self._loop.call_soon(self.move)

    def _from_client(self) -> None:
        if not (self.client_has_ended or self._to_program) and self._program_takes:
            try:
                self._to_program = self._recv(_READ_SIZE)
                self.client_has_ended = not self._to_program
            except NOT_YET:
                pass
            except OSError:
                self._session.cut = True
                self.lose_client()
        if self._to_program:
            try:
                self._to_program = self._to_program[self._program.send(self._to_program) :]
            except BlockingIOError:
                pass
            except OSError:  # it reads no more; what the client sends waits, as with a socket of the program's own
                self._to_program, self._program_takes = b"", False
        if self.client_has_ended and not self._to_program and self._program_takes:
            self._program_takes = False
            with contextlib.suppress(OSError):
                self._program.shutdown(socket.SHUT_WR)

    def _from_program(self) -> None:
        session = self._session
        try:
            session.flush()
            if self._program_sends and not session.unsent and (said := self._said()) and not self.is_lost:
                self._send(said)
        except OSError:
            self.lose_client()

    def _said(self) -> bytes:
        """What the program says; empty where it says nothing now, or no more."""
        said = b""
        try:
            said = self._program.recv(_READ_SIZE)
            self._program_sends = bool(said)
        except BlockingIOError:
            self._program_sends = self._finished is None
        except OSError:  # it has ended without reading all
            self._program_sends = False
        return said

    def _watch(self, sock: socket.socket, mask: int) -> None:
        fd = sock.fileno()
        before = self._masks.get(fd, mask)
        if mask == before:
            return
        self._masks[fd] = mask
        if not before:
            self._selector.epoll.register(fd, mask)
        elif mask:
            self._selector.epoll.modify(fd, mask)
        else:
            self._selector.epoll.unregister(fd)

    def lose_client(self) -> None:
        """The client is gone, or to go. When the program has taken what was read, it is told so by the pair's end."""
        self.client_has_ended = self.is_lost = True
        self._settle()

    def finish(self, finished: Callable[[], None]) -> None:
        """Passes on what the program, which has ended, has still said, then tells the client the end.

        Args:
            finished: called in the end.
        """
        self._finished = finished
        self._to_program, self._program_takes = b"", False
        self.move()
        self._settle()

    def _settle(self) -> None:
        """Ends what is done."""
        if self.is_lost and not self._to_program:
            self._program_takes = self._program_sends = False
            self._close()
        if self._finished is not None and not self._program_sends and (self.is_lost or not self._session.unsent):
            self._close()
            finished, self._finished = self._finished, None
            finished()

    def _close(self) -> None:
        """Closes the end of the pair, and leaves the client's socket."""
        for fd, mask in self._masks.items():
            if mask:
                self._selector.epoll.unregister(fd)
            del self._selector.served[fd]
        self._masks.clear()
        self._program.close()

    @property
    def is_finishing(self) -> bool:
        """Whether the program has ended, and not all that it has said is passed on."""
        return self._finished is not None

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the pair's end."""
        self._program.close()


class ProgramServer(HandOverServer):
    """Serves accepted connections, each by a program.

    Args:
        context: what the process's connections share.
        listener: its settings.
        address: where it really listens.

    Attributes:
        command, directory: the listener's.
        environment: that of all its programs.
    """

    def __init__(self, context: ServerContext, listener: Listener, address: Address) -> None:
        super().__init__(context, listener, address)
        self.command, self.directory = listener.command, listener.directory
        self.environment = base_environment(listener)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # which programs inherit

    def __call__(self, sock: socket.socket, peer: Any, tls: BufferedTlsSession | None = None) -> None:
        """Serves one connection and owns its socket."""
        if tls is None:  # else it has begun with its handshake
            self.began(sock.fileno())
        try:
            ProgramConnection(sock, peer, self, tls)
        except (OSError, subprocess.SubprocessError) as error:
            sock.close()
            why = error.strerror if isinstance(error, OSError) else str(error)
            self.loop.call_exception_handler(
                {"exception": HandlerError(f"{self.listener}: {self.command[0]} can't be started: {why}")}
            )
            self.closed()
