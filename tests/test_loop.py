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

import pytest
from contract import DEADLINE, Recorder, descriptors, kits, watched_pipe

from forkd.serve.loop import PollLoop

kit = kits
pipe = watched_pipe


@pytest.fixture(params=["idle", "busy"])
def traffic(request, kit):
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


def send_back(peer):
    with contextlib.suppress(OSError):  # the test is over
        while data := peer.recv(4096):
            peer.sendall(data)


def soon(kit, name="called"):
    """A future, and a callback that gives it a result."""
    future = kit.loop.create_future()
    return future, lambda *_: future.done() or future.set_result(name)


@pytest.mark.usefixtures("traffic")
def test_timers_fire_in_the_order_of_their_times(kit):
    fired = []
    done, finish = soon(kit)
    for delay in (0.03, 0.01, 0.02, 0):
        kit.loop.call_later(delay, fired.append, delay)
    kit.loop.call_later(0.02, fired.append, "cancelled").cancel()
    kit.loop.call_later(0.04, finish)
    kit.run(done)
    assert fired == [0, 0.01, 0.02, 0.03]


@pytest.mark.usefixtures("traffic")
def test_no_timer_fires_before_its_time(kit):
    due = kit.loop.time() + 0.02
    done, finish = soon(kit)
    seen = []
    kit.loop.call_at(due, lambda: (seen.append(kit.loop.time()), finish()))
    kit.run(done)
    assert seen[0] >= due - 0.001  # asyncio's own clock resolution


@pytest.mark.usefixtures("traffic")
def test_a_thread_calls_into_the_loop(kit):
    done, finish = soon(kit)
    thread = threading.Thread(target=kit.loop.call_soon_threadsafe, args=(finish,))
    kit.loop.call_soon(thread.start)
    assert kit.run(done) == "called"
    thread.join(DEADLINE)


@pytest.mark.usefixtures("traffic")
def test_work_in_an_executor_comes_back(kit):
    async def work():
        return await asyncio.gather(*(kit.loop.run_in_executor(None, pow, 2, number) for number in range(20)))

    assert kit.run(work()) == [2**number for number in range(20)]


@pytest.mark.usefixtures("traffic")
def test_a_subprocess_is_talked_to_and_waited_for(kit):
    async def talk():
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
def test_asyncios_own_connections_work_beside(kit):
    async def handle(reader, writer):
        writer.write(await reader.readexactly(5))
        writer.close()

    async def talk():
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
def test_signals_are_handled(kit):
    done, finish = soon(kit)
    kit.loop.add_signal_handler(signal.SIGUSR1, finish)
    kit.loop.call_soon(os.kill, os.getpid(), signal.SIGUSR1)
    assert kit.run(done) == "called"
    assert kit.loop.remove_signal_handler(signal.SIGUSR1)


@pytest.mark.usefixtures("traffic")
def test_watched_descriptors_are_called_for(kit, pipe):
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


def test_a_watched_descriptor_learns_of_a_hang_up(kit):
    reading, writing = os.pipe()
    done, finish = soon(kit)
    kit.loop.add_reader(reading, finish)
    kit.loop.call_soon(os.close, writing)
    assert kit.run(done) == "called"
    kit.loop.remove_reader(reading)
    os.close(reading)


@pytest.mark.usefixtures("traffic")
def test_a_served_callback_sets_a_timer_ahead_of_the_one_that_the_loop_waits_for(kit):
    fired = []
    done, finish = soon(kit)

    def set_timers():
        kit.loop.call_later(0.03, finish)
        kit.loop.call_later(0.02, fired.append, "second")
        kit.loop.call_later(0.01, fired.append, "first")

    late = kit.loop.call_later(DEADLINE * 2, fired.append, "late")
    _, send = kit.on_byte(set_timers)
    send()
    kit.run(done)
    assert fired == ["first", "second"]
    late.cancel()


@pytest.mark.parametrize("how", ["call_soon", "call_later", "create_task", "call_soon_threadsafe", "set_result"])
def test_what_a_served_callback_schedules_is_run_without_another_event(kit, how):
    future, finish = soon(kit)

    async def task():
        finish()

    schedule = {
        "call_soon": lambda: kit.loop.call_soon(finish),
        "call_later": lambda: kit.loop.call_later(0, finish),
        "create_task": lambda: tasks.append(kit.loop.create_task(task())),
        "call_soon_threadsafe": lambda: kit.loop.call_soon_threadsafe(finish),
        "set_result": finish,
    }
    tasks = []

    def go_on(protocol, _):
        # Some rounds later the loop waits for events and for nothing else.
        peer.sendall(b"x") if len(protocol.received) < 5 else schedule[how]()

    _, peer = kit.connect(Recorder(kit, data_received=go_on))
    peer.sendall(b"x")
    alarm = threading.Timer(DEADLINE, kit.loop.call_soon_threadsafe, [future.cancel])
    alarm.start()
    # No deadline of the loop's own: its timer would wake the loop.
    assert kit.loop.run_until_complete(future) == "called"
    alarm.cancel()
    alarm.join()


def test_tasks_run_while_served_descriptors_are_busy_all_the_time(kit):
    """A connection's data is answered by a task, which awaits others."""
    answers = []
    done, finish = soon(kit)

    async def answer(data):
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
def test_stop_leaves_the_loop_at_once(kit, where):
    """Stopped from a served callback too, with nothing else to wake the loop."""

    async def stop():
        kit.loop.stop()

    hooks = {
        "data_received": {"data_received": lambda *_: kit.loop.stop()},
        "connection_lost": {"connection_lost": lambda *_: kit.loop.stop()},
        "task": {"data_received": lambda *_: tasks.append(kit.loop.create_task(stop()))},
    }
    tasks = []
    _, peer = kit.connect(Recorder(kit, **hooks[where]))
    peer.sendall(b"x")
    peer.shutdown(socket.SHUT_WR)
    stopped = threading.Event()
    alarm = threading.Timer(DEADLINE / 4, kit.loop.call_soon_threadsafe, [lambda: (stopped.set(), kit.loop.stop())])
    alarm.start()
    kit.loop.run_forever()
    alarm.cancel()
    alarm.join()
    assert not stopped.is_set()


def test_a_closed_loop_leaves_no_descriptors():
    before = descriptors()
    loop = PollLoop()
    assert descriptors() != before
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert descriptors() == before
    assert loop.is_closed()
    loop.close()
