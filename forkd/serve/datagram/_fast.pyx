# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The compiled twin of `transport.DatagramTransport._ready` and `.sendto`, for UDP sockets that many peers send to.

It receives and sends one datagram at a time, as the twin does: of what a killed worker had taken, one is lost. Batches
(recvmmsg(2), sendmmsg(2)) would save 2 % of the time of the two system calls, and lose all that is in them.

What is rare is the transport's: errors, datagrams that are kept, peers that have sent nothing.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from os import strerror

cdef extern from *:
    const char *FORKD_SOURCE

cdef extern from "Python.h":
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    ctypedef ssize_t ssize "ssize_t"
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    void *CMSG_DATA(cmsghdr *)
    size_t CMSG_LEN(size_t)
    size_t CMSG_SPACE(size_t)
    struct sockaddr:
        pass
    ssize recvfrom(int, void *, size_t, int, sockaddr *, socklen_t *)
    ssize recvmsg(int, msghdr *, int)
    ssize c_sendto "sendto"(int, const void *, size_t, int, const sockaddr *, socklen_t)
    ssize sendmsg(int, const msghdr *, int)
    enum: AF_INET, MSG_DONTWAIT

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN

cdef extern from "<arpa/inet.h>" nogil:
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        unsigned short sin_family
        unsigned short sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        unsigned short sin6_port
        unsigned int sin6_flowinfo
        in6_addr sin6_addr
        unsigned int sin6_scope_id
    const char *inet_ntop(int, const void *, char *, socklen_t)
    unsigned short ntohs(unsigned short)
    unsigned int ntohl(unsigned int)
    enum: INET6_ADDRSTRLEN

cdef extern from *:
    """
    /* The head of socketmodule.h's PySocketSockObject. The descriptor is read there, so that it is seen when the socket
       is closed: its number may be another file's by then. `UdpSocket` checks that it is there. */
    typedef struct { PyObject_HEAD int fd; } forkd_socket;
    #define FORKD_FD(sock) (((forkd_socket *)(sock))->fd)
    """
    int FORKD_FD(object)

#: What it was built from; `forkd.compiled` compares it.
SOURCE = FORKD_SOURCE.decode()

cdef enum:
    LONGEST = 65536  # no datagram of UDP is longer
    SLOTS = 4096  # of the table of peers by their address in the kernel's form; a power of 2
    NAME = 28  # bytes of the longest address, sockaddr_in6
    PKTINFO = 20  # bytes of the larger of in_pktinfo and in6_pktinfo

#: Where each datagram is received. Pages of it that no datagram has reached take no memory.
cdef char buffer[LONGEST]


cdef class Peer:
    """A sender: its address in Python's form and the kernel's, and how its answers leave."""

    cdef object addr
    cdef char name[NAME]
    cdef socklen_t length
    cdef char came_to[PKTINFO]  # the control message of its last datagram, if the socket is bound to every address
    cdef size_t came_to_size
    cdef char control[64]  # that of its answers
    cdef size_t control_size
    cdef unsigned long received, sent  # since they were counted last


cdef class UdpSocket:
    """The hot half of a transport.

    Args:
        transport: the other half.
        sock: its socket, which is not connected.
        context: the contextvars.Context that the protocol runs in.
        admit: as `DatagramContext.admit`.
        reply: as `pktinfo.reply`; None where the socket is bound to one address.
        bounds: datagrams that one wake-up takes at most, and seconds; peers with uncounted datagrams, after which they
            are counted; peers that are known.
    """

    cdef object transport, sock, context, admit, reply
    cdef int batch
    cdef double slice
    cdef Py_ssize_t count_after, most_peers
    cdef list slots, touched
    cdef dict peers
    cdef Peer last
    #: The protocol's `datagram_received`.
    cdef public object deliver
    #: Whether `sendto` may send: nothing waits to be sent, and the transport is open.
    cdef public bint direct
    #: Whether nothing is received any more.
    cdef public bint closing

    def __init__(self, transport, sock, context, admit, reply, bounds):
        if FORKD_FD(sock) != sock.fileno():
            raise ImportError("this Python's sockets have another layout")
        self.transport, self.sock, self.context, self.admit, self.reply = transport, sock, context, admit, reply
        self.batch, self.slice, self.count_after, self.most_peers = bounds
        self.slots, self.touched, self.peers = [None] * SLOTS, [], {}
        self.last = Peer()
        self.last.addr = object()  # which no address is
        self.direct = True

    def ready(self, unsigned int mask):
        """Receives a batch and hands it to the protocol; whether the queue is empty then."""
        PyContext_Enter(self.context)
        try:
            if mask != EPOLLIN and not self.transport._is_readable(mask):
                return False
            emptied = self.receive()
            if len(self.touched) > self.count_after:
                self.transport._count()
            return emptied
        finally:
            PyContext_Exit(self.context)

    cdef bint receive(self) except -1:
        cdef iovec part
        cdef msghdr message
        cdef char name[NAME]
        cdef char control[64]
        cdef ssize size
        cdef double now, late = 0
        cdef Peer peer
        part.iov_base, part.iov_len = buffer, LONGEST
        message.msg_name, message.msg_iov, message.msg_iovlen = name, &part, 1
        for _ in range(self.batch):
            message.msg_namelen = sizeof(name)
            if self.reply is None:  # recvmsg(2) takes a third longer
                size = recvfrom(
                    FORKD_FD(self.sock), buffer, LONGEST, MSG_DONTWAIT, <sockaddr *>name, &message.msg_namelen
                )
            else:
                message.msg_control, message.msg_controllen = control, sizeof(control)
                size = recvmsg(FORKD_FD(self.sock), &message, MSG_DONTWAIT)
            if size < 0:
                if errno == EAGAIN or errno == EINTR:
                    return True
                self.transport._failed(os_error())
                continue
            peer = self.sender(name, message.msg_namelen)
            if peer is None:
                continue
            if self.reply is not None:
                self.note_origin(peer, &message)
            self.last = peer
            if not peer.received and not peer.sent:
                self.touched.append(peer)
            peer.received += 1
            try:
                self.deliver(PyBytes_FromStringAndSize(buffer, size), peer.addr)
            except BaseException as error:  # the handler's border
                self.transport._complain(error, "protocol.datagram_received() call failed.")
            if self.closing:
                break
            now = monotonic()
            if late == 0:
                late = now + self.slice
            elif now > late:
                break
        return False

    cdef Peer sender(self, const char *name, socklen_t length):
        """The peer of this address; None if its datagrams are not taken."""
        cdef Py_ssize_t slot = hashed(name, length) & (SLOTS - 1)
        found = self.slots[slot]
        cdef Peer peer
        if found is not None:
            peer = <Peer>found
            if peer.length == length and memcmp(peer.name, name, length) == 0:
                return peer if self.admit is None or self.admit(peer.addr) else None
        addr = address(name)
        if self.admit is not None and not self.admit(addr):
            return None  # nor remembered: strangers push out no peer
        peer = self.peers.get(addr)
        if peer is None:
            peer = Peer()
            peer.addr, peer.length = addr, length
            memcpy(peer.name, name, length)
            self.peers[addr] = peer
            if len(self.peers) > self.most_peers:
                del self.peers[next(iter(self.peers))]
        self.slots[slot] = peer
        return peer

    cdef int note_origin(self, Peer peer, msghdr *message) except -1:
        """Has answers to a peer leave from the address that its datagram came to."""
        cdef cmsghdr *head = CMSG_FIRSTHDR(message)
        cdef size_t size = 0 if head == NULL else min(head.cmsg_len - CMSG_LEN(0), <size_t>PKTINFO)
        if size == peer.came_to_size and (size == 0 or memcmp(peer.came_to, CMSG_DATA(head), size) == 0):
            return 0
        peer.came_to_size, peer.control_size = size, 0
        if size == 0:
            return 0
        memcpy(peer.came_to, CMSG_DATA(head), size)
        for level, kind, pktinfo in self.reply(head.cmsg_level, head.cmsg_type, peer.came_to[:size]):
            memset(peer.control, 0, sizeof(peer.control))
            head = <cmsghdr *>peer.control
            head.cmsg_level, head.cmsg_type, head.cmsg_len = level, kind, CMSG_LEN(len(pktinfo))
            memcpy(CMSG_DATA(head), PyBytes_AS_STRING(pktinfo), len(pktinfo))
            peer.control_size = CMSG_SPACE(len(pktinfo))
        return 0

    def sendto(self, data, addr=None):
        """As `DatagramTransport.sendto`."""
        cdef Peer peer
        if self.direct and type(data) is bytes:
            peer = self.last if addr is self.last.addr else self.peers.get(addr)
            if peer is not None:
                if send(FORKD_FD(self.sock), peer, <bytes>data) < 0:
                    if errno == EAGAIN or errno == EINTR:
                        self.transport._keep(data, addr)
                    else:
                        self.transport._refused(os_error())
                    return
                if not peer.received and not peer.sent:
                    self.touched.append(peer)
                peer.sent += 1
                return
        self.transport._send_otherwise(data, addr)

    def send(self, data, addr):
        """Sends to a peer, from the address that its latest datagram came to; whether it is known. Raises OSError."""
        cdef Peer peer = self.peers.get(addr)
        if peer is not None and send(FORKD_FD(self.sock), peer, bytes(data)) < 0:
            raise os_error()
        return peer is not None

    def take_counts(self):
        """Each peer that datagrams came from or went to since the last time, with how many came, and went."""
        cdef Peer peer
        counts = []
        for peer in self.touched:
            counts.append((peer.addr, peer.received, peer.sent))
            peer.received = peer.sent = 0
        self.touched = []
        return counts


cdef ssize send(int fd, Peer peer, bytes data):
    cdef iovec part
    cdef msghdr message
    part.iov_base, part.iov_len = PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)
    if not peer.control_size:
        return c_sendto(fd, part.iov_base, part.iov_len, MSG_DONTWAIT, <sockaddr *>peer.name, peer.length)
    message.msg_name, message.msg_namelen = peer.name, peer.length
    message.msg_iov, message.msg_iovlen = &part, 1
    message.msg_control, message.msg_controllen = peer.control, peer.control_size
    message.msg_flags = 0
    return sendmsg(fd, &message, MSG_DONTWAIT)


cdef os_error():
    return OSError(errno, strerror(errno))


cdef double monotonic():
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef unsigned long hashed(const char *name, socklen_t length):
    """A hash of an address in the kernel's form. Its last four bytes in IPv6, the interface, are left out."""
    cdef unsigned long mixed = 0, word
    cdef socklen_t at
    for at in range(0, 8 if length < 28 else 24, 8):
        memcpy(&word, name + at, 8)
        mixed = (mixed ^ word) * <unsigned long>0x9E3779B97F4A7C15
    return mixed >> 40


cdef address(const char *name):
    """An address as Python's sockets have it."""
    cdef char text[INET6_ADDRSTRLEN]
    cdef sockaddr_in *v4 = <sockaddr_in *>name
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *>name
    if v4.sin_family == AF_INET:
        inet_ntop(v4.sin_family, &v4.sin_addr, text, sizeof(text))
        return text.decode("ascii"), ntohs(v4.sin_port)
    inet_ntop(v4.sin_family, &v6.sin6_addr, text, sizeof(text))
    return text.decode("ascii"), ntohs(v6.sin6_port), ntohl(v6.sin6_flowinfo), v6.sin6_scope_id
