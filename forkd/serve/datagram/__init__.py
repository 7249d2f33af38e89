"""Datagram sockets.

transport: one socket, as an `asyncio.DatagramTransport`; what is called for each datagram is also in _fast.pyx.
peers: the latest peers of a socket, with counts.
pktinfo: replies that leave from the address which their request came to.
server: all datagram sockets of a process, whose datagrams they take, and how they end.
"""
