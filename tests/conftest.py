"""Fixtures for the end-to-end tests; what they hand out is in `harness`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Harness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """Makes daemons and clients, and checks at the end that nothing of theirs is left."""
    with Harness(tmp_path).watch() as made:
        yield made
