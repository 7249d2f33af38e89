"""An echo for a process whose kernel has no socket filters: the option to attach one is none that it knows."""

from __future__ import annotations

from forkd.builtin import Echo
from forkd.serve.once import rendezvous

__all__ = ["Echo"]

rendezvous._ATTACH = 9999
