"""Connections.

server: from a handler to what serves accepted connections, and how they end with their process.
coroutine: streams handlers: asyncio's streams, with the plain case written out.
handed_over: a connection that something else reads and writes.
program: programs, one for each client.
threads: handlers that block, in threads.
tls: certificates, the handshake, and what a connection with TLS is read and written by.
whole_server: servers that accept by themselves.
transport: one connection, as an `asyncio.Transport`.
"""
