"""Where the tests find the checkout's own files."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
HANDLERS = CHECKOUT / "tests" / "handlers"
