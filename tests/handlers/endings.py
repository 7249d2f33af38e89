"""A handler that leaves things to the interpreter's end: open files, atexit functions, threads."""

from __future__ import annotations

import atexit
import gc
import gzip
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forkd.builtin import Echo

HERE = Path(os.environ["ENDINGS"])
PID = os.getpid()

text = (HERE / f"{PID}.text").open("w")
binary = (HERE / f"{PID}.binary").open("wb")
packed = gzip.open(HERE / f"{PID}.gz", "wb")  # noqa: SIM115
pool = ThreadPoolExecutor(1)
stuck = threading.Event()
gc.set_threshold(1_000_000)  # so that nothing looks for garbage before the end


@atexit.register
def told() -> None:
    (HERE / f"{PID}.atexit").write_text("called")


def finish_slowly(leave: threading.Event) -> None:
    leave.wait(0.3)
    (HERE / f"{PID}.pool").write_text("done")


class Garbage:
    """An object that the interpreter's end alone finds, if it looks for garbage."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Path(HERE, f"{PID}.garbage").write_text("found")


class Leaves(Echo):
    """Writes what it hears to files that it does not flush, then echoes it. `stuck` leaves a thread that
    stays, `atexit` a function that does not return."""

    def data_received(self, data: bytes) -> None:
        Garbage()
        text.write(data.decode())
        binary.write(data)
        packed.write(data)
        pool.submit(finish_slowly, threading.Event())
        if data == b"stuck":
            threading.Thread(target=stuck.wait, name="stays").start()
        if data == b"atexit":
            atexit.register(stuck.wait)
        super().data_received(data)
