"""The poll loop: asyncio works on it as on its own, whatever forkd's descriptors do meanwhile.

Timers, threads, subprocesses, watched descriptors and tasks, beside connections that are idle or busy all the time.
Each test runs on asyncio's own loop and transport too. What happens within one round is in the module beside this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest

from forkd.serve.loop import CONNECTION, PollLoop
from tests.support.processes import DEADLINE
from tests.support.transport_contract import AnyRecorder, Kit, Recorder, descriptors, forkd_only, kits, watched_pipe

kit = kits
pipe = watched_pipe


@pytest.fixture(params=["idle", "busy"])
def traffic(request: pytest.FixtureRequest, kit: Kit) -> Iterator[Any]:
    """Nothing, or two connections that never stop sending to each other through a peer in a thread."""
    if request.param == "idle":
        yield
        return
    _, peer = kit.connect(Recorder(kit, data_received=lambda p, data: p.transport.write(data)), first=b"x" * 1000)
    thread = threading.Thread(target=send_back, args=(peer,))
    thread.start()
    yield
    peer.shutdown(socket.SHUT_RDWR)
    thread.join(DEADLINE)
    assert not thread.is_alive()


def send_back(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the test is over
        while data := peer.recv(4096):
            peer.sendall(data)


def soon(kit: Kit) -> tuple[asyncio.Future[str], Callable[..., None]]:
    """A future, and a callback that gives it a result."""
    future: asyncio.Future[str] = kit.loop.create_future()

    def finish(*_: object) -> None:
        if not future.done():
            future.set_result("called")

    return future, finish


@pytest.mark.usefixtures("traffic")
def test_timers_fire_in_the_order_of_their_times(kit: Kit) -> None:
    fired: list[object] = []
    done, finish = soon(kit)
    now = kit.loop.time()  # of all: this test may be held up between two of them
    for delay in (0.03, 0.01, 0.02, 0):
        kit.loop.call_at(now + delay, fired.append, delay)
    kit.loop.call_at(now + 0.02, fired.append, "cancelled").cancel()
    kit.loop.call_at(now + 0.04, finish)
    kit.run(done)
    assert fired == [0, 0.01, 0.02, 0.03]


@pytest.mark.usefixtures("traffic")
def test_no_timer_fires_before_its_time(kit: Kit) -> None:
    due = kit.loop.time() + 0.02
    done, finish = soon(kit)
    seen: list[float] = []

    def fire() -> None:
        seen.append(kit.loop.time())
        finish()

    kit.loop.call_at(due, fire)
    kit.run(done)
    assert seen[0] >= due - 0.001  # asyncio's own clock resolution


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("delay", ["nan", "-inf", "-1e300"])
def test_a_timer_without_a_sound_time_fires_at_once(kit: Kit, delay: str) -> None:
    done, finish = soon(kit)
    kit.loop.call_later(float(delay), finish)
    assert kit.run(done) == "called"


@pytest.mark.usefixtures("traffic")
def test_a_thread_calls_into_the_loop(kit: Kit) -> None:
    done, finish = soon(kit)
    thread = threading.Thread(target=kit.loop.call_soon_threadsafe, args=(finish,))
    kit.loop.call_soon(thread.start)
    assert kit.run(done) == "called"
    thread.join(DEADLINE)


@pytest.mark.usefixtures("traffic")
def test_work_in_an_executor_comes_back(kit: Kit) -> None:
    async def work() -> Any:
        return await asyncio.gather(*(kit.loop.run_in_executor(None, pow, 2, number) for number in range(20)))

    assert kit.run(work()) == [2**number for number in range(20)]


@forkd_only
def test_a_thread_calls_into_the_loop_while_that_looks_at_what_is_scheduled(kit: Kit) -> None:
    called: list[str] = []

    def owner() -> None:
        """Has a thread call in the middle of the loop's look at the callbacks, when it asks whose this one is."""
        thread = threading.Thread(target=kit.loop.call_soon_threadsafe, args=(called.append, "by a thread"))
        thread.start()
        thread.join(DEADLINE)

    context = copy_context()
    context.run(CONNECTION.set, owner)

    async def look() -> None:
        for _ in range(3):
            send()
            for _ in range(2):
                kit.loop.call_soon(called.append, "of a connection", context=context)
            await asyncio.sleep(0)

    protocol, send = kit.on_byte(lambda: None)
    kit.run(look())
    kit.turn()
    assert protocol.received == b"xxx"
    assert called.count("of a connection") == 6
    assert "by a thread" in called


@pytest.mark.usefixtures("traffic")
def test_a_subprocess_is_talked_to_and_waited_for(kit: Kit) -> None:
    async def talk() -> Any:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sys; print(sys.stdin.read().upper()); sys.exit(3)",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate(b"hello")
        return output, process.returncode

    assert kit.run(talk()) == (b"HELLO\n", 3)


@pytest.mark.usefixtures("traffic")
def test_asyncios_own_connections_work_beside(kit: Kit) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(5))
        writer.close()

    async def talk() -> Any:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hello")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        return answer

    assert kit.run(talk()) == b"hello"


@pytest.mark.usefixtures("traffic")
def test_signals_are_handled(kit: Kit) -> None:
    done, finish = soon(kit)
    kit.loop.add_signal_handler(signal.SIGUSR1, finish)
    kit.loop.call_soon(os.kill, os.getpid(), signal.SIGUSR1)
    assert kit.run(done) == "called"
    assert kit.loop.remove_signal_handler(signal.SIGUSR1)


@pytest.mark.usefixtures("traffic")
def test_watched_descriptors_are_called_for(kit: Kit, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writable, write = soon(kit)
    kit.loop.add_writer(writing, write)
    kit.run(writable)
    assert kit.loop.remove_writer(writing)
    readable, read = soon(kit)
    kit.loop.add_reader(reading, read)
    os.write(writing, b"x")
    kit.run(readable)
    assert kit.loop.remove_reader(reading)
    assert not kit.loop.remove_reader(reading)


def test_a_watched_descriptor_learns_of_a_hang_up(kit: Kit) -> None:
    reading, writing = os.pipe()
    done, finish = soon(kit)
    kit.loop.add_reader(reading, finish)
    kit.loop.call_soon(os.close, writing)
    assert kit.run(done) == "called"
    kit.loop.remove_reader(reading)
    os.close(reading)


@pytest.mark.usefixtures("traffic")
def test_a_served_callback_sets_an_earlier_timer(kit: Kit) -> None:
    fired: list[object] = []
    done, finish = soon(kit)

    def set_timers() -> None:
        now = kit.loop.time()  # as above
        kit.loop.call_at(now + 0.03, finish)
        kit.loop.call_at(now + 0.02, fired.append, "second")
        kit.loop.call_at(now + 0.01, fired.append, "first")

    late = kit.loop.call_later(DEADLINE * 2, fired.append, "late")
    _, send = kit.on_byte(set_timers)
    send()
    kit.run(done)
    assert fired == ["first", "second"]
    late.cancel()


@pytest.mark.parametrize("how", ["call_soon", "call_later", "create_task", "call_soon_threadsafe", "set_result"])
def test_callbacks_scheduled_when_served_need_no_other_event(kit: Kit, how: str) -> None:
    future, finish = soon(kit)

    async def task() -> None:
        finish()

    tasks: list[asyncio.Task[None]] = []
    schedule: dict[str, Callable[[], object]] = {
        "call_soon": lambda: kit.loop.call_soon(finish),
        "call_later": lambda: kit.loop.call_later(0, finish),
        "create_task": lambda: tasks.append(kit.loop.create_task(task())),
        "call_soon_threadsafe": lambda: kit.loop.call_soon_threadsafe(finish),
        "set_result": finish,
    }

    peer: socket.socket

    def go_on(protocol: AnyRecorder, _: Any) -> None:
        # Some rounds later the loop waits for events and for nothing else.
        if len(protocol.received) < 5:
            peer.sendall(b"x")
        else:
            schedule[how]()

    _, peer = kit.connect(Recorder(kit, data_received=go_on))
    peer.sendall(b"x")
    alarm = threading.Timer(DEADLINE, kit.loop.call_soon_threadsafe, [future.cancel])
    alarm.start()
    # No deadline of the loop's own: its timer would wake the loop.
    assert kit.loop.run_until_complete(future) == "called"
    alarm.cancel()
    alarm.join()


def test_tasks_run_while_served_descriptors_are_busy(kit: Kit) -> None:
    """A connection's data is answered by a task, which awaits others."""
    answers = []
    done, finish = soon(kit)

    async def answer(data: bytes) -> None:
        await asyncio.sleep(0)
        answers.append(await asyncio.gather(*(asyncio.sleep(0, data) for _ in range(3))))
        if len(answers) == 50:
            finish()
        else:
            peer.sendall(b"x")

    tasks = []
    protocol = Recorder(kit, data_received=lambda _, data: tasks.append(kit.loop.create_task(answer(data))))
    _, peer = kit.connect(protocol)
    peer.sendall(b"x")
    kit.run(done)
    assert answers == [[b"x"] * 3] * 50


@pytest.mark.parametrize("where", ["data_received", "connection_lost", "task"])
def test_stop_leaves_the_loop_at_once(kit: Kit, where: str) -> None:
    """Stopped from a served callback too, with nothing else to wake the loop."""

    async def stop() -> None:
        kit.loop.stop()

    tasks: list[asyncio.Task[None]] = []
    hooks: dict[str, dict[str, Callable[..., object]]] = {
        "data_received": {"data_received": lambda *_: kit.loop.stop()},
        "connection_lost": {"connection_lost": lambda *_: kit.loop.stop()},
        "task": {"data_received": lambda *_: tasks.append(kit.loop.create_task(stop()))},
    }
    _, peer = kit.connect(Recorder(kit, **hooks[where]))
    peer.sendall(b"x")
    peer.shutdown(socket.SHUT_WR)
    stopped = threading.Event()

    def stop_late() -> None:
        stopped.set()
        kit.loop.stop()

    alarm = threading.Timer(DEADLINE / 4, kit.loop.call_soon_threadsafe, [stop_late])
    alarm.start()
    kit.loop.run_forever()
    alarm.cancel()
    alarm.join()
    assert not stopped.is_set()


def test_a_closed_loop_leaves_no_descriptors() -> None:
    before = descriptors()
    loop = PollLoop()
    assert descriptors() != before
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert descriptors() == before
    assert loop.is_closed()
    loop.close()


@pytest.mark.parametrize("schedule", ["call_later", "call_at"])
def test_debug_mode_tells_where_a_timer_was_set(kit: Kit, schedule: str) -> None:
    kit.loop.set_debug(True)
    timer: Any = getattr(kit.loop, schedule)(0, int)
    assert timer._source_traceback[-1].filename == __file__
    timer.cancel()
