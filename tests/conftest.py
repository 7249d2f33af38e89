"""Fixtures for all tests, and the order in which they run."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.daemon import Harness
from tests.support.needs import needs_python_for_all
from tests.support.network_namespaces import leave_network
from tests.support.once_process import OnceProcess

#: Fixtures of tests that start a daemon: those wait more than they compute.
STARTING = {"harness", "open_harness", "container"}


# How long one example takes is the machine's matter, which may be busy.
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    max_examples=50,  # `make fuzz` tries more
)
hypothesis.settings.load_profile("any machine")


def pytest_configure() -> None:
    """Makes the process fit to start what is tested."""
    # A shell starts what runs in its background with INT ignored, and so would everything that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests choose ports by giving up ones that the kernel gave them: no other process of a parallel run may get those.
    if "PYTEST_XDIST_WORKER" in os.environ and os.geteuid() == 0:
        with contextlib.suppress(OSError):
            leave_network()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that start daemons, and puts them first: no long one is to be left alone at the end of a parallel
    run.
    """
    for item in items:
        if not STARTING.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("daemon")
    items.sort(key=lambda item: item.get_closest_marker("daemon") is None)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the test's own, whose path is short: that of a Unix socket has room for 107 bytes (unix(7)),
    and pytest's own fixture names the directory after the test, below one named after the process of a parallel run.
    No two directories of a run have the same name, since some addresses are made of it.
    """
    process = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    return tmp_path_factory.mktemp(f"t{process}x", numbered=True)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """Makes daemons and clients, and checks at the end that nothing of theirs is left."""
    with Harness(tmp_path).watch() as made:
        yield made


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory of root that every user can reach; pytest's own are root's alone."""
    needs_python_for_all()
    with tempfile.TemporaryDirectory(prefix="forkd-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def open_harness(open_directory: Path) -> Iterator[Harness]:
    """A harness in such a directory, for daemons whose workers are another user."""
    with Harness(open_directory).watch() as made:
        yield made


@pytest.fixture
def single(harness: Harness) -> Iterator[Callable[..., OnceProcess]]:
    """Makes processes for one client, to be started; checks at the end that nothing of theirs is left."""
    made: list[OnceProcess] = []

    def make(*arguments: object, **more: str | None) -> OnceProcess:
        made.append(OnceProcess(harness, *arguments, **more))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.stop()
    for one in made:
        one.check()
