"""The drain as handlers meet it: waiting for it, being told of it, and what a worker makes of those that heed it."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest
from clients import at_end, echoes, read
from harness import Harness

from forkd import drain
from forkd.drain import begin, draining, wait_draining

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a worker that does not drain yet."""
    monkeypatch.setattr(drain._Worker, "drains", False)


async def waiting(count: int) -> list[asyncio.Task[None]]:
    """Tasks that wait for the drain, each as far as it gets."""
    tasks = [asyncio.ensure_future(wait_draining()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_a_worker_drains_from_the_moment_it_begins_to() -> None:
    assert not draining()
    begin()
    assert draining()
    begin()
    assert draining()


def test_all_who_wait_wake_at_the_drain_and_not_before() -> None:
    async def wait() -> None:
        tasks = await waiting(100)
        assert not any(task.done() for task in tasks)
        begin()
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert drain._Worker.waiters == set()

    asyncio.run(wait())


def test_who_comes_later_does_not_wait() -> None:
    async def wait() -> None:
        begin()
        with pytest.raises(StopIteration):
            wait_draining().send(None)
        assert drain._Worker.waiters == set()

    asyncio.run(wait())


def test_who_waits_no_longer_leaves_nothing_behind_and_disturbs_nobody() -> None:
    async def wait() -> list[dict[str, Any]]:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        impatient, late, patient = await waiting(3)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert len(drain._Worker.waiters) == 2
        begin()
        late.cancel()
        await asyncio.wait_for(patient, PATIENCE)
        await asyncio.wait([late], timeout=PATIENCE)
        assert late.cancelled()
        assert drain._Worker.waiters == set()
        return reported

    assert asyncio.run(wait()) == []


def test_a_loop_of_another_thread_may_wait_too() -> None:
    waits, woken = threading.Event(), threading.Event()

    async def wait() -> None:
        [task] = await waiting(1)
        waits.set()
        await asyncio.wait_for(task, PATIENCE)
        woken.set()

    thread = threading.Thread(target=asyncio.run, args=(wait(),))
    thread.start()
    assert waits.wait(PATIENCE)
    begin()
    thread.join(PATIENCE)
    assert woken.is_set()


# The real daemon


@pytest.mark.parametrize("handler", ["polite:Polite", "polite:polite_streams"])
def test_a_handler_that_hears_of_the_drain_says_goodbye(harness: Harness, handler: str) -> None:
    daemon = harness.daemon(target=handler).run()
    clients = [harness.connect(daemon) for _ in range(6)]
    assert all(echoes(client) for client in clients)
    daemon.signal(signal.SIGTERM)
    for client in clients:
        assert read(client, 7) == b"goodbye"
        assert at_end(client)
    assert daemon.process is not None
    assert daemon.process.wait(PATIENCE) == 0


def test_a_shutdown_that_raises_loses_its_connection_and_no_other(harness: Harness) -> None:
    daemon = harness.daemon(target="polite:Polite", workers=1).run()
    daemon.expect(r"(?s)ERROR .* protocol\.shutdown\(\) call failed\..*\n  \| ValueError: in no mood to end")
    before, failing, after = (harness.connect(daemon) for _ in range(3))
    assert echoes(before, b"stay")
    assert echoes(failing, b"raise")
    assert echoes(after, b"stay")
    daemon.signal(signal.SIGTERM)
    assert at_end(failing)
    assert echoes(before, b"still here")
    assert echoes(after, b"still here")


def test_a_handler_can_see_whether_its_worker_drains(harness: Harness) -> None:
    daemon = harness.daemon(target="polite:Curious", workers=1).run()
    client = harness.connect(daemon)
    client.sendall(b"?")
    assert read(client, 2) == b"00"
    daemon.signal(signal.SIGTERM)
    daemon.wait_clients(1)
    assert daemon.workers("draining")
    while True:  # the worker may not have heard of it yet, but it will
        client.sendall(b"?")
        if (said := read(client, 2)) != b"00":
            break
    assert said == b"11"
