# cython: language_level=3, binding=True, auto_pickle=False, boundscheck=False, wraparound=False, initializedcheck=False
"""The compiled twin of what each event and each request costs. It is optional: `loop` and `stream.transport` are complete
without it, and all that is rare is theirs.

`Rounds` is the inner loop of `PollSelector`, and `Table` what it looks descriptors up in. `data_ready` and `write` are
methods of `StreamTransport`'s twin. They use the fields of that class where they are: a slot is a pointer in the object,
and its descriptor says at which offset (`use_transport`). What is not the plain case they leave to the method that they
stand in for.

"Not now" of the kernel is a number here and no exception, and recv and send keep the GIL: they never wait.
"""

from cpython.exc cimport PyErr_CheckSignals
from cpython.list cimport PyList_GET_ITEM
from cpython.long cimport PyLong_AsLong
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF, Py_XDECREF, Py_XINCREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.limits cimport INT_MAX
from libc.math cimport ceil
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from _socket import socketpair
from os import strerror
from types import MemberDescriptorType, MethodType

cdef extern from *:
    const char *FORKD_SOURCE

#: What it was built from; `forkd.compiled` compares it.
SOURCE = FORKD_SOURCE.decode()

cdef extern from * nogil:
    """
    #include <arpa/inet.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>

    /* Where accept4 puts the peer; no address of another family is taken by it. */
    typedef union { struct sockaddr any; struct sockaddr_in in; struct sockaddr_in6 in6; } forkd_address;

    /* How _socket.socket begins; `_know_sockets` makes sure of it. */
    typedef struct { PyObject_HEAD int fd; } forkd_socket;

    static double forkd_monotonic(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    }
    """
    ctypedef struct forkd_socket:
        int fd
    double forkd_monotonic()
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_wait(int, epoll_event *, int, int)
    int epoll_ctl(int, int, int, epoll_event *)
    enum: EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLHUP, EPOLLERR, EPOLLET, EPOLLEXCLUSIVE, EPOLL_CTL_ADD, EPOLL_CTL_DEL
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    enum: MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, AF_INET, AF_INET6
    ctypedef struct sockaddr:
        unsigned short sa_family
    ctypedef struct sockaddr_in:
        unsigned short sin_port
        unsigned int sin_addr
    ctypedef struct sockaddr_in6:
        unsigned short sin6_port
        unsigned int sin6_flowinfo, sin6_addr, sin6_scope_id
    ctypedef union forkd_address:
        sockaddr any
        sockaddr_in in4 "in"
        sockaddr_in6 in6
    int accept4(int, sockaddr *, unsigned int *, int)
    int getsockopt(int, int, int, void *, unsigned int *)
    int close(int)
    const char *inet_ntop(int, const void *, char *, unsigned int)
    unsigned short ntohs(unsigned short)
    unsigned int ntohl(unsigned int)

cdef extern from *:
    object PyContext_CopyCurrent()
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1
    object PyContextVar_Set(object, object)
    object PyType_GenericAlloc(PyTypeObject *, Py_ssize_t)
    Py_ssize_t Py_REFCNT(PyObject *)
    int _PyBytes_Resize(PyObject **, Py_ssize_t) except -1
    PyObject *PyBytes_FromStringAndSize(const char *, Py_ssize_t) except NULL
    char *PyBytes_AS_STRING(PyObject *)
    Py_ssize_t PyBytes_GET_SIZE(PyObject *)
    ctypedef PyObject *(*PyCFunction)(PyObject *, PyObject *)
    bint PyCFunction_CheckExact(PyObject *)
    PyCFunction PyCFunction_GET_FUNCTION(PyObject *)
    PyObject *PyCFunction_GET_SELF(PyObject *)
    ctypedef struct PyMemberDef:
        Py_ssize_t offset
    ctypedef struct PyMemberDescrObject:
        PyMemberDef *d_member

cdef enum:
    #: Events that a round takes from the kernel at most. Those that another has left come to them.
    MOST_EVENTS = 1024
    #: Bytes beyond which what was read is handed on in the block that it was read into, not as a copy.
    LARGE = 16384

cdef enum:
    NOT_PLAIN = -2

# What is told of a connection that can be read to its end.
cdef unsigned int GONE = EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR

# What an entry of a table is: nothing, what is to be called, a connection whose `data_ready` is.
cdef enum:
    FREE, CALLED, CONNECTION


# Poll

cdef class Table:
    """What to call for each descriptor, as a dictionary has it; of a connection that is read the connection itself."""

    cdef list _entries  # by descriptor; a list, so that the garbage collector sees them
    cdef char *_kinds
    cdef Py_ssize_t _size, _used

    def __cinit__(self):
        self._entries = []

    def __dealloc__(self):
        free(self._kinds)

    def __setitem__(self, Py_ssize_t fd, ready):
        if type(ready) is MethodType and ready.__func__ is data_ready:
            _put(self, fd, CONNECTION, ready.__self__)
        else:
            _put(self, fd, CALLED, ready)

    cdef int _grow(self, Py_ssize_t least) except -1:
        cdef Py_ssize_t size = max(64, 2 * self._size, least)
        cdef char *kinds = <char *>realloc(self._kinds, size)
        if kinds == NULL:
            raise MemoryError
        memset(kinds + self._size, FREE, size - self._size)
        self._kinds = kinds
        self._entries.extend([None] * (size - self._size))
        self._size = size
        return 0

    def __getitem__(self, Py_ssize_t fd):
        cdef int kind = _kind(self, fd)
        if kind == FREE:
            raise KeyError(fd)
        entry = self._entries[fd]
        return MethodType(data_ready, entry) if kind == CONNECTION else entry

    def __delitem__(self, Py_ssize_t fd):
        if _kind(self, fd) == FREE:
            raise KeyError(fd)
        _take_out(self, fd)

    def __contains__(self, Py_ssize_t fd):
        return _kind(self, fd) != FREE

    def __len__(self):
        return self._used

    def __iter__(self):
        return iter([fd for fd in range(self._size) if self._kinds[fd] != FREE])

    def clear(self):
        """Takes all out."""
        for fd in self:
            del self[fd]


cdef inline int _kind(Table table, Py_ssize_t fd) noexcept:
    return table._kinds[fd] if 0 <= fd < table._size else FREE


cdef int _put(Table table, Py_ssize_t fd, int kind, entry) except -1:
    if fd < 0:
        raise KeyError(fd)
    if fd >= table._size:
        table._grow(fd + 1)
    table._used += table._kinds[fd] == FREE
    table._kinds[fd] = kind
    table._entries[fd] = entry
    return 0


cdef void _take_out(Table table, Py_ssize_t fd) noexcept:
    if _kind(table, fd) != FREE:
        table._kinds[fd] = FREE
        table._used -= 1
        table._entries[fd] = None


cdef class Rounds:
    """The inner loop of `PollSelector`, of whose twin this is a base.

    Attributes:
        served, left: as of `PollSelector`.
        descriptor: epoll's; -1 when it is closed.
    """

    cdef public Table served
    cdef public list left
    cdef public int descriptor
    cdef bint _woken
    cdef epoll_event *_events
    cdef Py_ssize_t _room

    def __cinit__(self):
        self.left = []
        self.descriptor = -1
        self._make_room(MOST_EVENTS)

    def __dealloc__(self):
        free(self._events)

    cdef int _make_room(self, Py_ssize_t count) except -1:
        cdef epoll_event *events
        if count > self._room:
            events = <epoll_event *>realloc(self._events, count * sizeof(epoll_event))
            if events == NULL:
                raise MemoryError
            self._events, self._room = events, count
        return 0

    def wake(self):
        """As of `PollSelector`."""
        self._woken = True

    def requeue(self, int fd):
        """As of `PollSelector`."""
        self._control(EPOLL_CTL_DEL, fd, 0)
        self._control(EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLEXCLUSIVE)

    cdef int _control(self, int what, int fd, unsigned int interest) except -1:
        cdef epoll_event event
        event.data.fd, event.events = fd, interest
        if epoll_ctl(self.descriptor, what, fd, &event) < 0:
            raise OSError(errno, strerror(errno))
        return 0

    def rounds(self, timeout, double slice, int at_once):
        """As `PollSelector.select`, with SLICE and AT_ONCE of `loop`."""
        cdef int count
        cdef double until, wait = -1.0
        cdef list for_asyncio = []
        scheduled, get_key = self._scheduled, self._fd_to_key.get
        if self.left:
            wait = 0.0
        elif timeout is not None:
            wait = max(<double>timeout, 0.0)
        until = forkd_monotonic() + wait
        while True:
            count = self._wait(wait)
            if self.left:
                count = self._take(self._in_turn(self._list(0, count)))
            if count and (scheduled or self._awaited):
                count = self._take(self._callbacks_first(self._list(0, count)))
            self._serve_others(count, for_asyncio)
            self._serve(count, slice, at_once)
            if for_asyncio or scheduled or self._woken or not count or wait == 0 or self.left:
                self._woken = False
                return [(key, mask) for key, mask in for_asyncio if get_key(key.fd) is key]
            if timeout is not None:
                wait = until - forkd_monotonic()
                if wait <= 0:
                    return []

    cdef int _wait(self, double seconds) except -1:
        """Takes events from the kernel, after that time at most; how many."""
        cdef int count, number, epoll = self.descriptor
        cdef double left = seconds, until = forkd_monotonic() + seconds if seconds > 0 else 0.0
        cdef epoll_event *events = self._events
        if epoll < 0:
            raise ValueError("I/O operation on closed epoll object")
        while True:
            with nogil:
                count = epoll_wait(epoll, events, MOST_EVENTS, -1 if left < 0 else <int>min(ceil(left * 1000), INT_MAX))
                number = errno
            if count >= 0:
                return count
            if number != EINTR:
                raise OSError(number, strerror(number))
            PyErr_CheckSignals()
            if seconds > 0:
                left = max(until - forkd_monotonic(), 0.0)

    cdef int _serve_others(self, int count, list for_asyncio) except -1:
        """As `PollSelector._serve_others`; what is ready of asyncio's comes into that list."""
        cdef list listening = None
        cdef unsigned int mask
        for i in range(count):
            if _kind(self.served, self._events[i].data.fd) != FREE:
                continue
            fd, mask = self._events[i].data.fd, self._events[i].events
            if (key := self._fd_to_key.get(fd)) is not None:
                # What is neither plain reading nor plain writing is both.
                for_asyncio.append((key, ((mask & ~EPOLLOUT != 0) | (mask & ~EPOLLIN != 0) << 1) & key.events))
            elif listening is None:
                listening = [(fd, mask)]
            else:
                listening.append((fd, mask))
        if listening is not None:
            for fd, mask in listening:
                if (ready := self.listeners.get(fd)) is not None:
                    ready(mask)
        return 0

    cdef int _serve(self, int count, double slice, int at_once) except -1:
        """Serves these events for a slice of time; what is left is in `left`."""
        cdef Table served = self.served
        cdef int i, fd, kind
        cdef unsigned int mask
        cdef double late = forkd_monotonic() + slice if count > at_once else 0.0
        for i in range(count):
            if late and i and i % at_once == 0 and forkd_monotonic() > late:
                self.left += self._list(i, count)
                return 0
            fd, mask = self._events[i].data.fd, self._events[i].events
            kind = _kind(served, fd)
            if kind == FREE:
                continue
            ready = <object>PyList_GET_ITEM(served._entries, fd)
            if kind == CONNECTION:
                _data_ready(<PyObject *>ready, mask)
            else:
                ready(mask)
        return 0

    cdef list _list(self, int start, int stop):
        return [(self._events[i].data.fd, self._events[i].events) for i in range(start, stop)]

    cdef int _take(self, list events) except -1:
        """Puts these in the place of those that came; how many they are."""
        cdef int i = 0
        self._make_room(len(events))
        for fd, mask in events:
            self._events[i].data.fd, self._events[i].events = fd, mask
            i += 1
        return i


# A connection

cdef enum:  # its fields that are used here, in the order of _FIELDS
    SOCK, FD, PROTOCOL, DELIVER, CONTEXT, OPENED, RECV, SEND, PEER, READER, UNSENT, SPARE, INTEREST, PAUSED, CLOSING
    CONN_LOST, EOF_ANSWER, ERROR, LINGER, SOCKNAME, STAMPS, TLS, LOOP, OBSERVER, DUE, FILE, FIELDS

cdef tuple _FIELDS = tuple(
    "_sock _fd _protocol _deliver _context _opened _recv _send _peer _reader _unsent _spare_writes _interest _paused _closing"
    " _conn_lost _eof_answer _error _linger _sockname _stamps _tls _loop _observer due _file".split()
)
# Those of one connection alone; none of it is in the fields of a template.
cdef tuple _OWN = ("_sock", "_fd", "_protocol", "_deliver", "_context", "_opened")
# Those that the twin has when they are asked for; None until then.
cdef tuple _LAZY = ("_recv", "_send", "_peer", "_reader")

cdef Py_ssize_t _offsets[FIELDS]
cdef dict _all_offsets  # of all fields, by name
cdef object _transport_class, _twin_class  # StreamTransport, and its twin
cdef object _receive, _write, _connection_lost  # the methods of the one
cdef object _streams_protocol, _draining, _connection, _no_direct_writes
cdef object _writes_at_once
cdef Py_ssize_t _read_size
cdef PyCFunction _socket_recv, _socket_send  # what a socket's recv and send are, as bound methods
cdef PyObject *_block = NULL  # what the next read goes to: bytes that nothing else knows of
cdef object NOTHING = object()
cdef object _ZERO = 0, _ONE = 1, _READ = EPOLLIN


cdef int _know_sockets() except -1:
    """Looks how sockets are laid out, before any is used so."""
    global _socket_recv, _socket_send
    for sock in socketpair():
        receive, send = sock.recv, sock.send
        _socket_recv = PyCFunction_GET_FUNCTION(<PyObject *>receive)
        _socket_send = PyCFunction_GET_FUNCTION(<PyObject *>send)
        known = (<forkd_socket *>sock).fd == sock.fileno()
        sock.close()
        if not known or (<forkd_socket *>sock).fd != -1:
            raise ImportError("the sockets of this Python are not laid out as those of CPython")
    return 0


_know_sockets()


def use_transport(transport, twin, names):
    """Tells of the class whose methods have twins here.

    Args:
        transport: StreamTransport.
        twin: the class that has the twins.
        names: those of its module.
    """
    global _transport_class, _twin_class, _receive, _write, _connection_lost, _all_offsets, _writes_at_once, _read_size
    global _streams_protocol, _draining, _connection, _no_direct_writes
    _transport_class, _twin_class = transport, twin
    _receive, _write, _connection_lost = transport._data_ready, transport.write, transport._connection_lost
    _all_offsets = {
        name: (<PyMemberDescrObject *>field).d_member.offset
        for one in transport.__mro__
        for name, field in vars(one).items()
        if type(field) is MemberDescriptorType
    }
    for i in range(FIELDS):
        _offsets[i] = _all_offsets[_FIELDS[i]]
    _read_size, _writes_at_once = names["READ_SIZE"], names["WRITES_AT_ONCE"]
    _streams_protocol, _draining, _connection = names["StreamsProtocol"], names["draining"], names["CONNECTION"]
    _no_direct_writes = names["_NO_DIRECT_WRITES"]


cdef inline PyObject **_slot(PyObject *transport, int field) noexcept:
    return <PyObject **>(<char *>transport + _offsets[field])


cdef inline object _get(transport, int field):
    """A field's value; raises AttributeError where it has none."""
    cdef PyObject *value = _slot(<PyObject *>transport, field)[0]
    if value == NULL:
        raise AttributeError(_FIELDS[field])
    return <object>value


cdef inline void _set(PyObject *transport, int field, object value) noexcept:
    cdef PyObject *before = _slot(transport, field)[0]
    Py_INCREF(value)
    _slot(transport, field)[0] = <PyObject *>value
    Py_XDECREF(before)


cdef inline int _is(PyObject *transport, int field, object value) noexcept:
    return _slot(transport, field)[0] == <PyObject *>value


cdef inline int _descriptor(PyObject *transport, int field, PyCFunction function) noexcept:
    """What the connection is read or written by, if that is the kernel's own recv or send: the descriptor, -1 when it is
    closed; NOT_PLAIN where TLS, stamps or something of another class come between.
    """
    cdef PyObject *call = _slot(transport, field)[0]
    cdef PyObject *sock
    if call == <PyObject *>None:
        sock = _slot(transport, SOCK)[0]
        return (<Socket>sock).descriptor() if sock != NULL and type(<object>sock) is Socket else NOT_PLAIN
    if call != NULL and PyCFunction_CheckExact(call) and PyCFunction_GET_FUNCTION(call) == function:
        return (<forkd_socket *>PyCFunction_GET_SELF(call)).fd
    return NOT_PLAIN


cdef inline int _check(transport) except -1:
    if not isinstance(transport, _transport_class):
        raise TypeError(f"{transport!r} is no connection")
    return 0


def data_ready(self, unsigned int mask):
    """As `StreamTransport._data_ready`."""
    _check(self)
    _data_ready(<PyObject *>self, mask)


cdef int _data_ready(PyObject *transport, unsigned int mask) except -1:
    cdef int fd = _descriptor(transport, RECV, _socket_recv)
    cdef PyObject *data = NULL
    cdef Py_ssize_t count
    # Of a client that is gone, or has reset the connection, recv tells: first what it has sent, then the error.
    if fd == NOT_PLAIN or mask != EPOLLIN and (mask & ~GONE or not (mask & EPOLLIN and _is(transport, INTEREST, _READ))):
        _receive(<object>transport, mask)
        return 0
    count = _read(fd, &data)
    if count > 0:
        _set(transport, SPARE, _writes_at_once)
        try:
            _deliver(transport, data)
        finally:
            Py_XDECREF(data)
    elif count == 0:
        _end_of_file(<object>transport)
    elif errno != EAGAIN and errno != EINTR:
        (<object>transport)._read_failed(OSError(errno, strerror(errno)))
    return 0


cdef Py_ssize_t _read(int fd, PyObject **data) except -2:
    """Reads once; what came is in `data`, as a new reference. How much it is; -1 where recv(2) says why."""
    global _block
    cdef Py_ssize_t count
    if _block == NULL:
        _block = PyBytes_FromStringAndSize(NULL, _read_size)
    count = recv(fd, PyBytes_AS_STRING(_block), _read_size, MSG_DONTWAIT)
    if 0 < count < LARGE:
        data[0] = PyBytes_FromStringAndSize(PyBytes_AS_STRING(_block), count)
    elif count > 0:
        data[0], _block = _block, NULL
        if count != _read_size:
            _PyBytes_Resize(data, count)
    return count


cdef int _deliver(PyObject *transport, PyObject *data) except -1:
    try:
        _run(<object>transport, _get(<object>transport, DELIVER), <object>data)
    except BaseException as error:
        (<object>transport).handler_failed(error, "Fatal error: protocol.data_received() call failed.")
    return 0


cdef object _run(transport, called, argument=NOTHING):
    """Calls the handler in the connection's context."""
    context = _get(transport, CONTEXT)
    PyContext_Enter(context)
    try:
        return called() if argument is NOTHING else called(argument)
    finally:
        PyContext_Exit(context)


def write(self, data):
    """As `StreamTransport.write`."""
    cdef PyObject *transport = <PyObject *>self
    cdef Py_ssize_t size, sent = 0
    cdef int number, fd
    cdef long spare
    _check(self)
    if type(data) is not bytes or not _is(transport, UNSENT, None):
        _write(self, data)
        return
    fd = _descriptor(transport, SEND, _socket_send)
    if fd == NOT_PLAIN:
        _write(self, data)
        return
    spare = PyLong_AsLong(_get(self, SPARE)) - 1
    _set(transport, SPARE, spare)
    size = PyBytes_GET_SIZE(<PyObject *>data)
    if spare >= 0:
        sent = send(fd, PyBytes_AS_STRING(<PyObject *>data), size, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent < 0:
            number, sent = errno, 0
            if number != EAGAIN and number != EINTR:
                self._write_failed(OSError(number, strerror(number)))
                return
    if sent != size:
        self._keep(data, sent)


cdef int _end_of_file(transport) except -1:
    """As `StreamTransport._end_of_file`."""
    cdef PyObject *me = <PyObject *>transport
    cdef Py_ssize_t before
    if (
        type(_get(transport, SOCK)) is not Socket
        or not (_is(me, CONN_LOST, _ZERO) and _is(me, ERROR, None) and _is(me, CLOSING, False) and _is(me, UNSENT, None))
    ):
        transport._end_of_file()
        return 0
    scheduled = (<Server>_get(transport, OBSERVER))._scheduled
    before = len(scheduled)
    _set(me, EOF_ANSWER, True)
    try:
        answer = bool(_run(transport, _get(transport, PROTOCOL).eof_received))
    except BaseException as error:
        transport.handler_failed(error, "Fatal error: protocol.eof_received() call failed.")
        return 0
    _set(me, EOF_ANSWER, answer)
    if answer:
        if not _get(transport, CLOSING):
            transport._watch(transport._interest & ~EPOLLIN | EPOLLET)
    elif _get(transport, UNSENT) or _get(transport, CLOSING) or len(scheduled) > before:
        transport.close()
    else:
        _set(me, CLOSING, True)
        _set(me, CONN_LOST, _ONE)
        _lost(transport, None)
    return 0


def connection_lost(self, error):
    """As `StreamTransport._connection_lost`."""
    _check(self)
    _lost(self, error)


cdef int _lost(transport, error) except -1:
    cdef PyObject *me = <PyObject *>transport
    cdef Server server
    cdef Socket sock
    cdef int fd
    if type(_get(transport, SOCK)) is not Socket:
        _connection_lost(transport, error)
        return 0
    sock, server = <Socket>_get(transport, SOCK), <Server>_get(transport, OBSERVER)
    fd = sock.descriptor()
    if server._is_logged or _get(transport, LINGER) or not _is(me, FILE, None) or fd < 0 or fd != PyLong_AsLong(_get(transport, FD)):
        _connection_lost(transport, error)
        return 0
    if _get(transport, INTEREST):
        epoll_ctl(server._rounds.descriptor, EPOLL_CTL_DEL, fd, NULL)
    _set(me, INTEREST, _ZERO)
    _set(me, UNSENT, _no_direct_writes)
    if server._timeouts is not None:
        if server._timeouts.firsts.pop(transport, 0.0) != _get(transport, DUE):
            server._timeouts.deadlines.forget(transport)
        _set(me, DUE, 0.0)
    if server._measure is not None:
        server._measure(sock, _get(transport, OPENED), _get(transport, STAMPS))
    try:
        _run(transport, _get(transport, PROTOCOL).connection_lost, error)
    except BaseException as raised:
        transport._report_failure(raised, "protocol.connection_lost() call failed.")
    finally:
        _take_out(server._rounds.served, fd)
        _set(me, PROTOCOL, None)
        _set(me, DELIVER, None)
        _set(me, READER, None)
        sock.owner = None
        if _is(me, SOCKNAME, None) and Py_REFCNT(me) > 1:  # else nothing is left that could ask
            transport._ask_sockname()
        sock.close()
        server._closed()
    return 0


# Accepting

cdef class Socket:
    """An accepted connection's descriptor, which becomes a `socket.socket` when more is asked of it.

    Attributes:
        owner: the transport, until the connection is over; called, this gives it, as `loop.CONNECTION` has it.
    """

    cdef int _fd, _proto
    cdef forkd_address _address
    cdef object _kind, _real, _release
    cdef object owner

    def __call__(self):
        return self.owner

    cdef inline int descriptor(self) noexcept:
        return self._fd if self._real is None else (<forkd_socket *><PyObject *>self._real).fd

    def fileno(self):
        """As a socket's."""
        return self.descriptor()

    def real(self):
        """The socket, which owns the descriptor from now on."""
        if self._real is None:
            real = self._kind(self._address.any.sa_family, SOCK_STREAM, self._proto, None if self._fd < 0 else self._fd)
            if self._fd < 0:
                real.close()
            else:
                real.setblocking(False)
                if self._release is not None:
                    real.on_close(self._release)
            self._real, self._fd, self._release = real, -1, None
        return self._real

    def __getattr__(self, name):
        if name.startswith("proxy_"):  # it came by none
            raise AttributeError(name)
        return getattr(self.real(), name)

    def peername(self):
        """The peer's address, as accept(2) gave it."""
        cdef char text[64]
        cdef forkd_address *one = &self._address
        if one.any.sa_family == AF_INET:
            return inet_ntop(AF_INET, &one.in4.sin_addr, text, 64).decode(), ntohs(one.in4.sin_port)
        host = inet_ntop(AF_INET6, &one.in6.sin6_addr, text, 64).decode()
        return host, ntohs(one.in6.sin6_port), ntohl(one.in6.sin6_flowinfo), one.in6.sin6_scope_id

    def getsockopt(self, int level, int option, unsigned int size=0):
        """As a socket's."""
        cdef char value[1024]
        cdef int number = 0
        cdef void *found = <void *>value if size else <void *>&number
        cdef unsigned int length = size or sizeof(int)
        if self._real is not None or length > sizeof(value):
            return self.real().getsockopt(level, option, size) if size else self.real().getsockopt(level, option)
        if getsockopt(self._fd, level, option, found, &length) < 0:
            raise OSError(errno, strerror(errno))
        return value[:length] if size else number

    def close(self):
        """As a socket's."""
        self.owner = None
        if self._real is not None:
            self._real.close()
        elif self._fd >= 0:
            fd, self._fd = self._fd, -1
            close(fd)
            if self._release is not None:
                release, self._release = self._release, None
                release()

    def __dealloc__(self):
        if self._fd >= 0:
            close(self._fd)


cdef class Accept:
    """What serves a listener that clients come by themselves: it accepts one, as `Acceptor.ready`.

    Args:
        acceptor: whose listener it is.
        fd, proto: the listener's.
        server: what serves the clients.
        accepted: told of each before it is served.
        kind: the class of a socket that is more than a descriptor.
        admit: takes each, as `ConnectionLimiter.admit`; None where there are no limits.
    """

    cdef object _acceptor, _accepted, _kind, _admit
    cdef Server _server
    cdef int _fd, _proto

    def __init__(self, acceptor, int fd, int proto, Server server not None, accepted, kind, admit=None):
        self._acceptor, self._server, self._accepted, self._fd, self._proto = acceptor, server, accepted, fd, proto
        self._kind, self._admit = kind, admit

    def __call__(self, mask):
        cdef Socket sock
        cdef unsigned int length = sizeof(forkd_address)
        if not self._acceptor.queued:
            return
        sock = Socket.__new__(Socket)
        sock._proto, sock._kind = self._proto, self._kind
        sock._fd = accept4(self._fd, &sock._address.any, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if sock._fd >= 0:
            if self._admit is not None:
                peer = sock.peername()
                reason, release = self._admit(peer)
                if reason:
                    self._acceptor.refuse(sock.real(), peer, reason)
                    return
                sock._release = release
            self._accepted(self._acceptor)
            self._server._serve(sock)
        elif errno != EAGAIN and errno != EINTR:
            self._acceptor.accept_failed(OSError(errno, strerror(errno)))


cdef class Server:
    """The base of `ProtocolServer`'s twin: it makes transports as copies of the first one, which is made by
    `StreamTransport` itself. But for what is the connection's own (`_OWN`) they all begin alike.
    """

    cdef object _template, _kind, _scheduled, _timeouts, _closed, _measure
    cdef Rounds _rounds
    cdef double _first_check
    cdef bint _is_logged

    cdef int _serve(self, Socket sock) except -1:
        """As `ProtocolServer.__call__`."""
        self._began(sock._fd)
        try:
            protocol = self._factory()
            made = self._make(sock, protocol) if type(protocol) is self._kind else self._first(sock, protocol)
        except BaseException as error:
            self.failed(sock, error)
            return 0
        if type(_get(made, SOCK)) is Socket:
            self._start(made)
        else:
            made.start()
        return 0

    cdef object _first(self, Socket sock, protocol):
        """The first transport, or that of another protocol."""
        self._kind = None
        made = self.transport(protocol, sock.real(), sock.peername())
        timeouts = self.timeouts
        if _get(made, DELIVER) is not None and _get(made, STAMPS) is None and isinstance(_get(made, LOOP).selector, Rounds):
            self._template = _template_of(made, (self, _get(made, LOOP), _get(made, SOCKNAME)))
            self._first_check = 0.0 if timeouts is None else timeouts.first_check
            self._rounds, self._scheduled = _get(made, LOOP).selector, _get(made, LOOP).scheduled
            self._timeouts, self._closed = timeouts, self.closed
            self._is_logged, self._measure = self.access_log, self.measure
            self._kind = type(protocol)
        return made

    cdef object _make(self, Socket sock, protocol):
        cdef PyObject *me
        cdef PyObject *value
        cdef double now = forkd_monotonic()
        deliver = protocol.data_received
        made = PyType_GenericAlloc(<PyTypeObject *>_twin_class, 0)
        me = <PyObject *>made
        for i in range(_copied_count):
            value = (<PyObject **>(<char *><PyObject *>self._template + _copied[i]))[0]
            Py_XINCREF(value)
            (<PyObject **>(<char *>me + _copied[i]))[0] = value
        _set(me, SOCK, sock)
        _set(me, FD, sock._fd)
        _set(me, PROTOCOL, protocol)
        _set(me, DELIVER, deliver)
        _set(me, OPENED, now)
        context = PyContext_CopyCurrent()
        _set(me, CONTEXT, context)
        sock.owner = made
        PyContext_Enter(context)
        try:
            PyContextVar_Set(_connection, sock)
        finally:
            PyContext_Exit(context)
        if self._first_check:
            due = self._timeouts.firsts[made] = now + self._first_check
            _set(me, DUE, due)
            if due < self._timeouts.deadlines.timer_at:
                self._timeouts.deadlines.wake_at(due)
        return made

    cdef int _start(self, transport) except -1:
        """As `StreamTransport.start`."""
        cdef PyObject *me = <PyObject *>transport
        cdef PyObject *data = NULL
        cdef Socket sock = _get(transport, SOCK)
        cdef int fd = sock._fd
        cdef Py_ssize_t count
        cdef Py_ssize_t before = len(self._scheduled)
        try:
            _run(transport, _get(transport, PROTOCOL).connection_made, transport)
        except BaseException as error:
            transport.handler_failed(error, "protocol.connection_made() call failed.")
            return 0
        at_once = len(self._scheduled) == before
        if not (_get(transport, PAUSED) or _get(transport, CLOSING)):
            if _is(me, INTEREST, _ZERO) and sock._real is None and _get(transport, DELIVER) is not None:
                _set(me, INTEREST, _READ)
                _put(self._rounds.served, fd, CONNECTION, transport)
                self._rounds._control(EPOLL_CTL_ADD, fd, EPOLLIN)
            else:
                transport._watch(transport._interest | EPOLLIN)
            if at_once and not _is(me, DELIVER, None):
                _data_ready(me, EPOLLIN)
            elif type(_get(transport, PROTOCOL)) is _streams_protocol:
                count = _read(sock.descriptor(), &data)
                if count > 0:
                    try:
                        _run(transport, _get(transport, DELIVER), <object>data)
                    finally:
                        Py_XDECREF(data)
                elif count < 0 and errno != EAGAIN and errno != EINTR:
                    transport._error = OSError(errno, strerror(errno))
        if _draining():
            if at_once:
                transport.notify_drain()
            else:
                self._loop.call_soon(transport._notify_late_drain)
        return 0


cdef Py_ssize_t _copied[64]  # where the fields of a template are
cdef int _copied_count = 0


cdef object _template_of(transport, tuple shared):
    """A transport that has what others have in common with this one, which has just been made."""
    global _copied_count
    template = PyType_GenericAlloc(<PyTypeObject *>_twin_class, 0)
    _copied_count = 0
    for name, offset in _all_offsets.items():
        value = getattr(transport, name, NOTHING)
        if name in _LAZY:
            value = None
        elif name == "due":
            value = 0.0
        elif name in _OWN or value is NOTHING:
            continue
        elif value is not None and type(value) not in (bool, int, float) and not any(value is one for one in shared):
            raise TypeError(f"{name}={value!r} of a new transport can't be that of others")
        getattr(_transport_class, name).__set__(template, value)
        _copied[_copied_count] = offset
        _copied_count += 1
    return template
