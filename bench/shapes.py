"""What `figures` measures and `report` tells of: which servers, and what their clients do."""

from __future__ import annotations

from dataclasses import dataclass

FORKD, PURE = "forkd", "forkd (pure Python)"
MAIN = ("C", FORKD, PURE, "uvloop", "asyncio")
OTHERS = ("uvloop + aiofastnet", "gevent", "tornado", "twisted", "socketserver", "socat", "Net::Server::PreFork")
#: What a Python peer needs beside the interpreter.
PACKAGES = {"uvloop": "uvloop", "uvloop + aiofastnet": "aiofastnet", "gevent": "gevent", "tornado": "tornado"}
PACKAGES["twisted"] = "twisted"

#: forkd with other settings: nothing that connections are watched for, all of it, and with metrics but nothing else.
BARE, WATCHED, METERED = "no deadline, no limit", "all deadlines and limits", "an admin endpoint"
VARIANTS = (BARE, WATCHED, METERED)

#: Connections at which memory is measured, and the spread over workers.
IDLE, STAYING = 1000, 1000


@dataclass(frozen=True)
class Shape:
    """Something that clients do."""

    title: str
    clients: int
    workers: int = 1
    load: str = "stay"
    kind: str = "stream"
    size: int = 40
    others: bool = False


SHAPES = {
    "few": Shape("echo, 1 worker, 4 connections", 4),
    "some": Shape("echo, 1 worker, 50 connections", 50, others=True),
    "many": Shape("echo, 4 workers, 200 connections", 200, workers=4, others=True),
    "churn": Shape("connect + echo + close, 4 workers, 20 at a time", 20, workers=4, load="churn", others=True),
    "udp": Shape("UDP echo, 4 workers, 50 sockets", 50, workers=4, load="udp", kind="datagram"),
    "coroutine": Shape("echo by a streams coroutine, 1 worker, 50 connections", 50, kind="coroutine"),
}
GROWTH = {
    "connections": [Shape(str(n), n) for n in (1, 10, 100, 1000, 9000)],
    "workers": [Shape(str(n), 100, workers=n) for n in (1, 2, 4, 8, 16)],
    "bytes": [Shape(str(n), 10, size=n) for n in (1, 64, 4096, 65536, 1 << 20)],
}
