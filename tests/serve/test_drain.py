"""The drain as handlers meet it: waiting for it, being told of it, and how a worker ends those that react to it."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest

from forkd import drain
from forkd.drain import begin, draining, wait_draining
from tests.support.clients import at_end, echoes, read
from tests.support.daemon import Harness
from tests.support.processes import DEADLINE, eventually


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a worker that does not drain yet."""
    monkeypatch.setattr(drain._Worker, "drains", False)


async def waiting(count: int) -> list[asyncio.Task[None]]:
    """Tasks that wait for the drain, each as far as it gets."""
    tasks = [asyncio.ensure_future(wait_draining()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_draining_is_true_from_the_beginning_on() -> None:
    assert not draining()
    begin()
    assert draining()
    begin()
    assert draining()


def test_all_waiters_wake_at_the_drain_and_not_before() -> None:
    async def wait() -> None:
        tasks = await waiting(100)
        assert not any(task.done() for task in tasks)
        begin()
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE)
        assert drain._Worker.waiters == set()

    asyncio.run(wait())


def test_a_later_waiter_does_not_wait() -> None:
    async def wait() -> None:
        begin()
        with pytest.raises(StopIteration):
            wait_draining().send(None)
        assert drain._Worker.waiters == set()

    asyncio.run(wait())


def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
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
        await asyncio.wait_for(patient, DEADLINE)
        await asyncio.wait([late], timeout=DEADLINE)
        assert late.cancelled()
        assert drain._Worker.waiters == set()
        return reported

    assert asyncio.run(wait()) == []


def test_a_loop_of_another_thread_may_wait_too() -> None:
    waits, woken = threading.Event(), threading.Event()

    async def wait() -> None:
        [task] = await waiting(1)
        waits.set()
        await asyncio.wait_for(task, DEADLINE)
        woken.set()

    thread = threading.Thread(target=asyncio.run, args=(wait(),))
    thread.start()
    assert waits.wait(DEADLINE)
    begin()
    thread.join(DEADLINE)
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
    assert daemon.process.wait(DEADLINE) == 0


def test_a_shutdown_that_raises_loses_its_connection_alone(harness: Harness) -> None:
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


@pytest.mark.parametrize("take", [b"ignore", b"default", b"own", b"stop"])
def test_a_signal_that_is_taken_does_not_stop_the_drain(harness: Harness, take: bytes) -> None:
    daemon = harness.daemon(target="outliving:Taking", workers=1).run()
    client = harness.connect(daemon)
    assert echoes(client, take)
    daemon.signal(signal.SIGTERM)
    eventually(lambda: daemon.workers("draining"), what="a worker that drains")
    assert echoes(client)
    client.close()
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0


def test_a_drain_waits_for_tasks_that_outlive_their_clients(harness: Harness) -> None:
    daemon = harness.daemon(target="outliving:Storing", workers=1).run()
    harness.connect(daemon).close()
    daemon.wait_log("begun")
    daemon.signal(signal.SIGTERM)
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0
    daemon.wait_log("stored")


def test_a_task_that_runs_for_ever_is_named(harness: Harness) -> None:
    daemon = harness.daemon(target="outliving:Storing", workers=1, settings=("drain_timeout=1500ms",)).run()
    with harness.connect(daemon) as client:
        client.sendall(b"ever")
    daemon.wait_log("begun")
    daemon.signal(signal.SIGTERM)
    where = r"tasks that have outlived their connections: 1 \(Storing\.store at .*outliving\.py:\d+\)"
    daemon.wait_log(f"waiting for {where}")
    daemon.wait_log(f"ending {where}")
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0
