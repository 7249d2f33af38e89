"""Accepting connections.

acceptor: one listening socket, and the counters of the connections that came by it.
listener_stats: the counters of one listener's connections, for metrics.
balance: whether this worker takes the next client, or leaves it to the others.
limits: a listener's limits: slots that are reserved before a client comes.
access: which clients may come in, and what becomes of those that are refused.
proxy_protocol: the header by which a proxy says where a client comes from, of connections and of datagrams.
"""
