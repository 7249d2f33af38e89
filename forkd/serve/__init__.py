"""The serving side: what runs in a worker, and in `forkd once`. It never imports the master's side, nor that this one.

boot: every step of a worker after the fork, in order.
worker: a running worker: its listeners, its heartbeat, its drain and its end.
queries: what a worker answers to the master.
handlers: imports the user's handlers, and recognizes their form.
hooks: what a worker calls of the user's before its first client, and after its last one.
handler_forks: what processes that handlers fork keep of their worker.
import_paths: becomes the workers' user, and checks what can be imported then.
loop: asyncio's event loop, over a selector that serves forkd's own descriptors.
deadlines: when a connection is checked, and whether it was silent for too long.
lingering: connections that have had their last word.
accept: listeners of connections: accepting, fairness between workers, limits, access.
stream: connections: transport, protocols and streams handlers.
datagram: datagram sockets.
once: one client and no more.
"""
