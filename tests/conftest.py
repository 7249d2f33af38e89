"""Fixtures for the end-to-end tests; what they hand out is in `harness` and `single`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Harness
from single import Single


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """Makes daemons and clients, and checks at the end that nothing of theirs is left."""
    with Harness(tmp_path).watch() as made:
        yield made


@pytest.fixture
def single(harness: Harness) -> Iterator[Callable[..., Single]]:
    """Makes processes for one client, to be started; checks at the end that nothing of theirs is left."""
    made: list[Single] = []

    def make(*arguments: object, **more: str | None) -> Single:
        made.append(Single(harness, *arguments, **more))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.stop()
    for one in made:
        one.check()
