"""An echo whose import takes a byte from the named pipe `gate` in the working directory, and waits for it."""

from __future__ import annotations

import os

from forkd.builtin import Echo

__all__ = ["Echo"]

with open("gate", "rb", buffering=0) as gate:
    assert os.read(gate.fileno(), 1)
