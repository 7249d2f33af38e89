"""The certificate of a worker's death: what is kept of it for `forkd status`, and what the log says."""

from __future__ import annotations

import time
from typing import Any

from forkd.master.spawn import Exit, Worker

#: Characters of a line that are kept: all certificates together have to fit into one message.
_WIDTH = 300


def certificate(worker: Worker, ended: Exit, now: float, *, expected: bool) -> dict[str, Any]:
    """What is kept of a worker that has ended: `clients` are those that were cut, `words` its last on stderr."""
    return {
        "time": time.time(),
        "slot": worker.slot,
        "pid": worker.pid,
        "generation": worker.generation,
        "expected": expected,
        "exit": str(ended),
        "code": ended.code,
        "cause": worker.cause,
        "age": round(now - worker.born, 3),
        "clients": max(0, worker.row.active),
        "peak_memory": ended.peak_memory,
        "words": [line[:_WIDTH] for line in worker.words],
    }


def obituary(worker: Worker, ended: Exit) -> str:
    """What the log says of a worker that has ended; the traceback that it could not boot for stands below it."""
    words = f"worker {worker.slot} (pid {worker.pid}) has ended: {ended}"
    words += f", {worker.cause}" if worker.cause else ""
    details = worker.failure.details.rstrip() if worker.failure is not None else ""
    return words + (f"\n{details}" if details else "")


def words_of(value: object, most: int) -> str:
    """What a worker says, where it should be text: so many characters of it, that can be printed in any encoding."""
    return value[:most].encode(errors="backslashreplace").decode() if isinstance(value, str) else ""
