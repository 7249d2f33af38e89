"""One client and no more (`forkd once`).

sources: where the client comes from: a listening socket, a datagram socket, or an accepted connection.
rendezvous: a source that connects by itself, to an end that does the same.
server: opens a source, serves its client, and returns the exit status.
"""
