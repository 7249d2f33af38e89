"""TLS of accepted connections: the handshake, and what a transport reads and writes by.

`load_contexts` reads a listener's certificates, as long as the process may; the key is often root's alone, so what is
renewed later comes from the master (`renew_contexts`). A connection begins with `TlsHandshake`, which ends within
`tls.handshake` and hands over a `TlsSession`. That session works on the connection's own socket: OpenSSL reads and
writes by the descriptor, without buffers in between.

Which certificate a client is shown depends on the name that it asks for (SNI, RFC 6066, section 3): the one whose names
fit best, an exact one before a wildcard (RFC 6125, section 6.4.3: of one label), the listener's own where none does.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any

from forkd.config.listener import Listener, Tls
from forkd.config.settings import Settings
from forkd.ended import Ended, HandshakeFailed
from forkd.errors import ForkdError
from forkd.serve.deadlines import Deadlines, Watched
from forkd.serve.loop import IN, OUT, PollLoop
from forkd.system.channel import wait_ready
from forkd.system.socket_stats import cookie_of, received_bytes, unread_bytes
from forkd.system.tls_files import Contents, readable

#: Plain bytes of one record at most (RFC 8446, section 5.1).
RECORD = 16_384

#: Bytes of one read of a `BufferedTlsSession`.
_CHUNK = 32_768

#: Records of one send at most: so much at a time is taken off what a client is owed.
_RECORDS = 16

_NO_CONTENTS: Contents = MappingProxyType({})

#: The certificates of this process, by the settings and whether names are told.
_loaded: dict[tuple[Tls, bool], TlsContexts] = {}

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_ASKED = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
#: What reading raises: nothing can be read now, though more may come; and nothing more comes.
NOT_YET = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
AT_END = (ssl.SSLZeroReturnError, ssl.SSLEOFError)


class TlsContexts:
    """A listener's certificates, by the names that clients ask for.

    Args:
        tls: the settings.
        contents: what is in the files, where it was read already.
        tell_name: whether sessions are to know which name their client has asked for.

    Attributes:
        default: of clients that ask for no name, or for one that none has.
        certificates: what each says: `file`, `names`, and `expires`, when it ends, in seconds since the epoch.

    Raises:
        ForkdError: a file can't be read, or is not what it should be; it names the setting and the file.
    """

    def __init__(self, tls: Tls, contents: Contents = _NO_CONTENTS, *, tell_name: bool = False) -> None:
        self._tls = tls
        self._tell_name = tell_name
        self.renew(contents)

    def renew(self, contents: Contents) -> None:
        """Takes what is in the files now, for connections that begin from now on. Raises as the class."""
        tls, by_name = self._tls, dict[str, ssl.SSLContext]()
        default, own = self._make(tls.cert, tls.key, "tls.cert", contents)
        certificates = [own]
        for index, one in enumerate(tls.names):
            context, says = self._make(one.cert, one.key, f"tls.names[{index}].cert", contents)
            certificates.append(says)
            for name in says["names"]:
                by_name.setdefault(name.lower(), context)
        if by_name:
            for name in own["names"]:
                by_name.setdefault(name.lower(), default)
        if by_name or self._tell_name:
            _report_no_names()
            default.sni_callback = self._choose
        self._by_name, self.default, self.certificates = by_name, default, certificates

    def find(self, name: str | None) -> ssl.SSLContext:
        """The context for the name that a client asks for."""
        wanted = (name or "").lower().rstrip(".")
        return self._by_name.get(wanted) or self._by_name.get(f"*.{wanted.partition('.')[2]}") or self.default

    def _choose(self, session: Any, name: str | None, _: ssl.SSLContext) -> None:
        session.context = self.find(name)
        if isinstance(session, TlsSession):
            session.server_name = name

    def _make(
        self, cert: Path | None, key: Path | None, setting: str, contents: Contents
    ) -> tuple[ssl.SSLContext, dict[str, Any]]:
        """The context of a certificate, and what that says."""
        assert cert is not None  # noqa: S101 (for the type checker: the settings say so)
        tls = self._tls
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[tls.min_version]
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION
        # A client that closes, or shuts down, without the end that TLS has can be answered still. Some Pythons set it.
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        context.num_tickets = 1  # each is a write of its own, and few clients resume more than one connection
        with _told(setting, cert, key), readable(cert, contents) as cert_file, readable(key, contents) as key_file:
            assert cert_file is not None  # noqa: S101 (as above)
            context.load_cert_chain(cert_file, key_file, password=_no_password)
            says = describe(cert, cert_file)
        if tls.ciphers is not None:
            with _told("tls.ciphers"):
                context.set_ciphers(tls.ciphers)
        if tls.alpn:
            with _told("tls.alpn"):
                context.set_alpn_protocols(tls.alpn)
        context.verify_mode = _ASKED[tls.client]
        if tls.client_ca is not None:
            with _told("tls.client_ca", tls.client_ca), readable(tls.client_ca, contents) as authorities:
                context.load_verify_locations(authorities)
        return context, says


@cache
def _report_no_names() -> None:
    """Has Python not print a traceback for each client that asks for a name that is not ASCII: before it calls a
    `sni_callback` it decodes the name, and what that raises it can only report. The handshake fails, which is logged.
    """
    report = sys.unraisablehook

    def report_others(found: sys.UnraisableHookArgs) -> None:
        if found.exc_type is UnicodeDecodeError and (
            isinstance(found.object, bytes) or "servername" in (found.err_msg or "")
        ):
            return
        report(found)

    sys.unraisablehook = report_others


class _told:
    """Turns what loading raises into a sentence about the setting and its files."""

    def __init__(self, setting: str, *files: Path | None) -> None:
        self._what = " ".join([setting, *(str(one) for one in files if one is not None)])

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, ssl.SSLError):
            reason = _openssl_reason(error) or ("NO_START_LINE" if "PEM" in str(error) else str(error.args[0]))
            raise ForkdError(f"{self._what}: {_HINTS.get(reason, reason.replace('_', ' ').lower())}") from None
        if isinstance(error, OSError):
            raise ForkdError(f"{self._what}: {error.strerror}") from None
        if isinstance(error, ValueError):
            raise ForkdError(f"{self._what}: {error}") from None


_HINTS = {
    "KEY_VALUES_MISMATCH": "the key is another certificate's",
    "NO_START_LINE": "the file is not in PEM, or lacks its certificate or key",
    "No cipher can be selected.": "names no cipher that OpenSSL knows",
}


def _openssl_reason(error: ssl.SSLError) -> str:
    """OpenSSL's own word for it; empty where the error is Python's."""
    return getattr(error, "reason", None) or ""


def _no_password() -> str:
    raise ValueError("the key has a password; take one without, readable by root alone")


def load_certificates(settings: Settings, contents: Contents = _NO_CONTENTS) -> None:
    """Reads the certificates of all listeners. Raises ForkdError, as `TlsContexts`."""
    for listener in settings.listen:
        try:
            load_contexts(listener, contents)
        except ForkdError as error:
            raise ForkdError(f"{listener.address}: {error}") from None


def load_contexts(listener: Listener, contents: Contents = _NO_CONTENTS) -> TlsContexts | None:
    """The certificates of a listener, which a process reads once: later it may be a user who may not. None where there
    is no TLS. Raises ForkdError, as `TlsContexts`.
    """
    if listener.tls.cert is None:
        return None
    kind = listener.tls, bool(listener.command)
    if kind not in _loaded:
        _loaded[kind] = TlsContexts(listener.tls, contents, tell_name=kind[1])
    return _loaded[kind]


def renew_contexts(listener: Listener, contents: Contents) -> TlsContexts:
    """Renews the certificates of a listener, and of those with the same settings. Raises as `TlsContexts`; then they
    are what they were.
    """
    TlsContexts(listener.tls, contents)  # tried aside: none is renewed where it is of no use
    same = [contexts for (tls, _), contexts in _loaded.items() if tls == listener.tls]
    for contexts in same:
        contexts.renew(contents)
    return same[0]


def describe(cert: Path, readable_as: Path) -> dict[str, Any]:
    """What a file's first certificate says, as of `TlsContexts.certificates`. Raises ssl.SSLError."""
    says: dict[str, Any] = ssl._ssl._test_decode_cert(os.fspath(readable_as))  # type: ignore[attr-defined]
    names = [name for kind, name in says.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if not names:
        names = [value for part in says["subject"] for kind, value in part if kind == "commonName"]
    return {"file": str(cert), "names": names, "expires": float(ssl.cert_time_to_seconds(says["notAfter"]))}


class TlsSession:
    """TLS over one accepted connection. Its calls read and write plain bytes.

    Args:
        contexts: the listener's certificates.
        sock: the connection's non-blocking socket.

    Attributes:
        recv: as a socket's: at most so many bytes, of one record. It is OpenSSL's own call, for speed: it raises what
            is in `NOT_YET` where no whole record has come, and what is in `AT_END` at the peer's end.
        do_handshake: goes on with the handshake. OpenSSL's own call, too: it raises what is in `NOT_YET`, and OSError.
        server_name: the host that the client asks for, where the contexts have that told.
        cut: whether the peer is not to be told the end any more: it was, or can't be.
        is_ending: whether that has begun: no data can be sent any more.
    """

    __slots__ = ("__weakref__", "_ssl", "_write", "cut", "do_handshake", "is_ending", "recv", "server_name")

    def __init__(self, contexts: TlsContexts, sock: socket.socket) -> None:
        # What ssl.SSLSocket has inside. That takes the descriptor away from its socket, which may own a slot.
        self._ssl: Any = contexts.default._wrap_socket(sock, True, owner=self)  # type: ignore[attr-defined]
        self.do_handshake: Callable[[], None] = self._ssl.do_handshake
        self.cut = self.is_ending = False
        self.server_name: str | None = None
        self.recv: Callable[[int], bytes] = self._ssl.read
        self._write: Callable[[bytes | bytearray | memoryview], int] = self._ssl.write

    @property
    def context(self) -> ssl.SSLContext:
        """The certificate that the client is shown."""
        found: ssl.SSLContext = self._ssl.context
        return found

    @context.setter
    def context(self, context: ssl.SSLContext) -> None:
        self._ssl.context = context

    def recv_into(self, buffer: Any) -> int:
        """As a socket's. What does not fit into the buffer is `pending`, and no event tells of it."""
        view = memoryview(buffer).cast("B")
        count: int = self._ssl.read(len(view), view)
        return count

    def pending(self) -> bool:
        """Whether there are plain bytes that were read from the socket already."""
        return bool(self._ssl.pending())

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """As a socket's. What it did not take is to be sent next, and more may follow it."""
        sent, whole = 0, len(data)
        try:
            if whole <= RECORD:
                return self._write(data)
            with memoryview(data) as view:
                for _ in range(_RECORDS):
                    sent += self._write(view[sent : sent + RECORD])
                    if sent == whole:
                        break
        except NOT_YET:
            pass
        except ssl.SSLEOFError:  # older Pythons say so whatever the system has said of the socket
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from None
        if not sent:
            raise BlockingIOError(errno.EAGAIN, "the socket takes no more")
        return sent

    def close_notify(self) -> bool:
        """Tells the peer that nothing more comes (RFC 8446, section 6.1); False where the socket takes it later."""
        if not self.cut:
            self.is_ending = True
            try:
                self._ssl.shutdown()
            except ssl.SSLWantWriteError:
                return False
            except (OSError, ValueError):  # it has not told its own end, which is not waited for
                pass
            self.cut = True
        return True

    def handshake_bytes(self, sock: socket.socket) -> int:
        """When the handshake is done: how many bytes have come for it."""
        return handshake_bytes(sock)

    # What `get_extra_info("ssl_object")` is asked, as an ssl.SSLObject is

    def getpeercert(self, binary_form: bool = False) -> Any:
        """The client's certificate; as ssl.SSLSocket.getpeercert."""
        return self._ssl.getpeercert(binary_form)

    def cipher(self) -> tuple[str, str, int] | None:
        """As ssl.SSLSocket.cipher."""
        found: tuple[str, str, int] | None = self._ssl.cipher()
        return found

    def compression(self) -> str | None:
        """As ssl.SSLSocket.compression."""
        found: str | None = self._ssl.compression()
        return found

    def version(self) -> str | None:
        """As ssl.SSLSocket.version."""
        found: str | None = self._ssl.version()
        return found

    def selected_alpn_protocol(self) -> str | None:
        """As ssl.SSLSocket.selected_alpn_protocol."""
        found: str | None = self._ssl.selected_alpn_protocol()
        return found

    def info(self, name: str, default: Any) -> Any:
        """What asyncio's `get_extra_info` knows of TLS."""
        match name:
            case "ssl_object":
                return self
            case "sslcontext":
                return self.context
            case "peercert":
                return self.getpeercert()
            case "cipher":
                return self.cipher()
            case "compression":
                return self.compression()
        return default


def handshake_bytes(sock: socket.socket) -> int:
    """How many bytes have come to a connection whose handshake was done just now, without what came behind it."""
    received = received_bytes(sock)
    try:
        return received - unread_bytes(sock)
    except OSError:  # the client has gone
        return received


class BufferedTlsSession(TlsSession):
    """TLS over one accepted connection, with buffers between OpenSSL and the socket.

    So each direction can end on its own: OpenSSL reads, too, when it tells the peer the end, and what it finds on a
    socket then is lost. Calls are as of `TlsSession`, and what the socket does not take is kept (`unsent`).
    """

    __slots__ = ("_at_end", "_in", "_out", "_sock", "_unsent")

    def __init__(self, contexts: TlsContexts, sock: socket.socket) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl: Any = contexts.default._wrap_bio(self._in, self._out, True, owner=self)  # type: ignore[attr-defined]
        self._sock = sock
        self._unsent = b""
        self._at_end = False  # the peer's end was found behind data
        self.cut = self.is_ending = False
        self.server_name = None

    @property
    def unsent(self) -> bool:
        """Whether there is something that the socket has not taken; then no more is to be sent."""
        return bool(self._unsent or self._out.pending)

    def flush(self) -> None:
        """Sends it, as far as the socket takes it. Raises OSError."""
        while self.unsent:
            self._unsent = self._unsent or self._out.read()
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            except BlockingIOError:
                return

    def do_handshake(self) -> None:
        """Goes on with the handshake. Raises what is in `NOT_YET`, and OSError."""
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                if self.unsent:
                    raise ssl.SSLWantWriteError from None
                self._fill()
            except OSError:
                self.flush()  # the peer is told, too
                raise
            else:
                self.flush()
                return

    def recv(self, size: int) -> bytes:
        """At most so many bytes; all that there is if `size` is twice as much as `_CHUNK`."""
        found = bytearray()
        while len(found) < size and not self._at_end:
            try:
                data = self._ssl.read(size - len(found))
            except ssl.SSLWantReadError:
                if found:
                    break
                self._fill()
                continue
            except AT_END:
                data = b""
            self._at_end = not data
            found += data
        return bytes(found)

    def _fill(self) -> None:
        """Reads what has come. Raises SSLWantReadError where nothing has, and OSError."""
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    def pending(self) -> bool:
        """Whether the peer's end has come already, of which no event tells."""
        return self._at_end

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Takes all of it. Raises OSError."""
        taken = 0
        with memoryview(data) as view:
            while taken < len(view):
                taken += self._ssl.write(view[taken:])
        self.flush()
        return taken

    def close_notify(self) -> bool:
        """Tells the peer that nothing more comes; it may send on. What the socket does not take is `unsent`."""
        super().close_notify()
        with suppress(OSError):
            self.flush()
        return True

    def handshake_bytes(self, sock: socket.socket) -> int:
        """As of `TlsSession`."""
        return super().handshake_bytes(sock) - self._in.pending


def say_end(sock: ssl.SSLSocket) -> None:
    """Tells the peer of a blocking connection that nothing more comes, as `TlsSession.close_notify` does; waits until
    the socket takes that. One that the handler has closed can't be told any more.
    """
    with suppress(OSError, ValueError):
        while sock.fileno() >= 0 and sock._sslobj is not None:  # type: ignore[attr-defined]
            sock.settimeout(0)
            try:
                sock._sslobj.shutdown()  # type: ignore[attr-defined]
            except ssl.SSLWantWriteError:
                wait_ready(sock, select.POLLOUT)
            else:
                return


class TlsHandshakes:
    """What the handshakes of one listener share.

    Args:
        loop: the process's loop.
        deadlines: the process's.
        contexts: the listener's certificates.
        seconds: that a client has.

    Attributes:
        selector: the loop's.
        contexts, deadlines, seconds: as the arguments.
        firsts: by handshake, when its time is over (`Deadlines.add_firsts`).
    """

    def __init__(self, loop: PollLoop, deadlines: Deadlines, contexts: TlsContexts, seconds: float) -> None:
        self.selector = loop.selector
        self.deadlines = deadlines
        self.contexts = contexts
        self.seconds = seconds
        self.firsts: dict[Watched, float] = {}
        deadlines.add_firsts(self.firsts)


class TlsHandshake:
    """The beginning of one connection, until TLS is agreed on.

    Args:
        shared: what it shares with the others of its listener.
        session: the connection's.
        sock: its socket. It is the caller's again when `ended` is called.
        peer: where the client is.
        ended: called once, with whether epoll watches the socket for reading, and with None when the handshake is done,
            else with why it failed.

    Attributes:
        due: as of `deadlines.Watched`.
        peer: as the argument.
    """

    __slots__ = ("_ended", "_fd", "_session", "_shared", "_sock", "_waits_for", "due", "peer")

    is_over = False  # while it is known to the loop

    def __init__(
        self,
        shared: TlsHandshakes,
        session: TlsSession,
        sock: socket.socket,
        peer: Any,
        ended: Callable[[bool, Ended | None], None],
    ) -> None:
        self.peer = peer
        self._shared = shared
        self._session = session
        self._sock = sock
        self._fd = sock.fileno()
        self._ended = ended
        self._waits_for = 0
        self.due = shared.firsts[self] = monotonic() + shared.seconds
        if self.due < shared.deadlines.timer_at:
            shared.deadlines.wake_at(self.due)
        shared.selector.served[self._fd] = self.ready
        self.ready(IN)  # most clients speak at once

    def ready(self, mask: int) -> None:
        """Goes on with it; called by the loop."""
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            self._wait(IN)
        except ssl.SSLWantWriteError:
            self._wait(OUT)
        except (OSError, ValueError) as error:
            self._end(HandshakeFailed(handshake_reason(error)))
        else:
            self._end(None)

    def _wait(self, waits_for: int) -> None:
        before, self._waits_for = self._waits_for, waits_for
        if not before:
            self._shared.selector.epoll.register(self._fd, waits_for)
        elif waits_for != before:
            self._shared.selector.epoll.modify(self._fd, waits_for)

    def check(self, now: float) -> float:
        """As `deadlines.Watched`."""
        self._end(HandshakeFailed(f"it took longer than {self._shared.seconds:g} s"))
        return 0.0

    def __lt__(self, other: object) -> bool:
        """As `deadlines.Watched`."""
        return id(self) < id(other)

    @property
    def cookie(self) -> int:
        """What the kernel calls the connection. Raises OSError."""
        return cookie_of(self._sock)

    def end(self, error: Ended) -> None:
        """Ends the connection, of forkd's own accord."""
        self._end(error)

    def _end(self, failure: Ended | None) -> None:
        shared = self._shared
        if shared.firsts.pop(self, 0.0) != self.due:
            shared.deadlines.forget(self)
        self.due = 0.0
        if self._waits_for == OUT:
            shared.selector.epoll.unregister(self._fd)
        del shared.selector.served[self._fd]
        self._ended(self._waits_for == IN, failure)

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket."""
        self._sock.close()


def handshake_reason(error: OSError | ValueError) -> str:
    """Why a handshake failed, in small letters as OpenSSL names it."""
    if isinstance(error, AT_END):
        return "the client has closed"
    if isinstance(error, ssl.SSLError):
        reason = _openssl_reason(error) or str(error)
        if reason == "CALLBACK_FAILED":
            return "the name that the client asks for is not in ASCII"
        return reason.replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else "") or str(error)
