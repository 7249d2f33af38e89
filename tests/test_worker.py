"""What a handler can ask of its worker, where there is none. In a worker: `serve/test_hooks.py`."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from forkd import worker

print([worker.slot, worker.name, worker.generation], "asyncio" in sys.modules)
for name in ("loop", "slots"):
    try:
        getattr(worker, name)
    except AttributeError as error:
        print(error)
"""


def test_outside_of_a_worker_there_is_no_loop() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines() == [
        "[0, '', 0] False",
        "forkd.worker.loop: this process is no worker",
        "forkd.worker.slots: there is no such thing",
    ]
