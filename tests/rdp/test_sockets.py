"""Reliable requests over real sockets: on a clean path, through a relay that loses packets, and without a server."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import pytest

from forkd.rdp import AsyncRdpClient, Busy, Failed, GaveUp, Limits, RdpClient, ReliableDatagram, Timers, TooLarge
from forkd.rdp.packets import AHEAD, ANSWER, PART, REQUEST, Data, decode, encode
from tests.handlers.reliable import TIMERS
from tests.support.daemon import Daemon, Harness, forkd
from tests.support.paths import HANDLERS

PATIENT = Timers(ack_timeout=0.2, max_retransmit=8)


@contextmanager
def program(*arguments: object) -> Iterator[tuple[int, list[str]]]:
    """Runs a program that prints its port first, until its input is closed; gives what else it printed afterwards."""
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        rest: list[str] = []
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), rest
            rest += process.communicate(timeout=20)[0].splitlines()
        finally:
            process.kill()
    assert process.returncode == 0, rest


@pytest.fixture
def daemon(harness: Harness) -> Daemon:
    """One that serves `handlers.reliable:service`, by one worker, which counts."""
    return harness.daemon(target="reliable:service", listen=("udp://127.0.0.1:0",), workers=1).start()


@pytest.fixture
def server(daemon: Daemon) -> int:
    """Its port."""
    return int(daemon.address.rpartition(":")[2])


@pytest.fixture
def relay(server: int) -> Iterator[int]:
    """The port of a bad path to the server."""
    with program(HANDLERS / "udp_relay.py", server, 20) as (port, rest):
        yield port
    assert rest == []


def right(payload: bytes, answer: bytes) -> bool:
    return answer == hashlib.sha256(payload).digest() + payload


def counts(port: int) -> tuple[int, int]:
    """How many requests the server ran, and how often at most."""
    with RdpClient("127.0.0.1", port, timers=PATIENT) as client:
        ran, most = json.loads(client.request(b"count"))
    return ran, most


async def many(port: int, number: int, *, clients: int = 8, at_once: int = 160) -> list[float]:
    """Sends that many requests through several sockets; the times of those that were given up."""
    random = Random(4)
    payloads = iter([bytes([n % 10]) + random.randbytes(random.choice([8, 40, 400, 3000])) for n in range(number)])
    given_up: list[float] = []

    async def one_after_the_other(client: AsyncRdpClient) -> None:
        for payload in payloads:
            begun = monotonic()
            try:
                assert right(payload, await client.request(payload))
            except GaveUp:
                given_up.append(monotonic() - begun)

    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        ends = [AsyncRdpClient("127.0.0.1", port, timers=TIMERS) for _ in range(clients)]
        tasks = [group.create_task(one_after_the_other(ends[n % clients])) for n in range(at_once)]
        await asyncio.wait(tasks)
        for end in ends:
            end.close()
    return given_up


@pytest.mark.parametrize("number", [2_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_requests_over_a_bad_path_run_at_most_once(server: int, relay: int, number: int) -> None:
    given_up = asyncio.run(many(relay, number))
    assert len(given_up) <= number / 100
    assert max(given_up, default=0) < TIMERS.bound + 5
    ran, most = counts(server)
    assert most == 1
    assert number - len(given_up) <= ran <= number


@pytest.mark.parametrize("way", ["clean", "bad"])
def test_a_megabyte_comes_through_whole_both_ways(server: int, relay: int, way: str) -> None:
    payload = Random(1).randbytes(1 << 20)
    with RdpClient("127.0.0.1", server if way == "clean" else relay, timers=TIMERS) as client:
        assert right(payload, client.request(payload))
    assert counts(server) == (1, 1)


@pytest.mark.parametrize(
    "payload", [b"", b"hello", b"\0 slow", bytes(PART), bytes(PART + 1), b"x" * PART * (AHEAD + 3)]
)
def test_payloads_of_every_size_by_both_clients(server: int, payload: bytes) -> None:
    with RdpClient("localhost", server, timers=PATIENT) as client:
        assert right(payload, client.request(payload))

    async def asynchronous() -> None:
        async with AsyncRdpClient("127.0.0.1", server, timers=PATIENT) as client:
            both = await asyncio.gather(client.request(payload), client.request(payload + b"!"))
            assert right(payload, both[0])
            assert right(payload + b"!", both[1])

    asyncio.run(asynchronous())
    assert counts(server) == (3, 1)


def test_a_handler_that_fails_is_told_at_once(server: int, daemon: Daemon) -> None:
    daemon.expect("as it was asked to")
    with RdpClient("127.0.0.1", server, timers=PATIENT) as client, pytest.raises(Failed, match="handler failed"):
        client.request(b"fail")
    assert counts(server) == (1, 1)


def test_error_tells_tries_and_time_when_no_server_listens() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unbound:
        unbound.bind(("127.0.0.1", 0))
        port = unbound.getsockname()[1]
        begun = monotonic()
        with RdpClient("127.0.0.1", port, timeout=0.02, retries=3) as client, pytest.raises(GaveUp) as silent:
            client.request(b"hello")
        assert silent.value.tries == 4
        assert 0.3 <= silent.value.seconds <= monotonic() - begun
        assert str(silent.value) == f"no answer from 127.0.0.1:{port} after 4 tries in {silent.value.seconds:.1f} s"
    with (
        RdpClient("127.0.0.1", port, timeout=0.02, retries=3) as client,
        pytest.raises(GaveUp, match="listens") as gone,
    ):
        client.request(b"hello")
    assert gone.value.tries == 4

    async def asynchronous() -> None:
        async with AsyncRdpClient("127.0.0.1", port, timeout=0.02, retries=1) as client:
            with pytest.raises(GaveUp, match=r"after 2 tries .*listens"):
                await client.request(b"hello")

    asyncio.run(asynchronous())


async def serve(
    handler: Callable[..., object], **more: object
) -> tuple[asyncio.DatagramTransport, ReliableDatagram, int]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: ReliableDatagram(handler, **more),  # type: ignore[arg-type]
        local_addr=("127.0.0.1", 0),
    )
    return transport, protocol, transport.get_extra_info("sockname")[1]


def test_refusals_have_errors_of_their_own() -> None:
    async def run() -> None:
        transport, _, port = await serve(lambda payload, peer: payload * 10, limits=Limits(request=10, exchanges=0))
        async with AsyncRdpClient("127.0.0.1", port, timers=PATIENT) as client:
            with pytest.raises(TooLarge, match=f"127.0.0.1:{port}"):
                await client.request(bytes(11))
            with pytest.raises(Busy):
                await client.request(bytes(10))
        transport.close()
        transport, _, port = await serve(lambda payload, peer: payload * 10)
        async with AsyncRdpClient("127.0.0.1", port, timers=PATIENT, limit=99) as client:
            with pytest.raises(TooLarge):
                await client.request(bytes(10))
            assert await client.request(bytes(9)) == bytes(90)
        transport.close()

    asyncio.run(run())


def test_flood_from_many_addresses_keeps_no_client_out() -> None:
    ran: Counter[str] = Counter()

    def handler(payload: bytes, peer: Any) -> bytes:
        ran[peer[0]] += 1
        return payload

    def flood(port: int) -> None:
        for number in range(600):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((f"127.1.{number // 200}.{number % 200}", 0))  # as one that forges them would send
                for id in range(3):
                    sock.sendto(encode(Data(REQUEST, id, 0, 5, 0, b"hello")), ("127.0.0.1", port))

    async def run() -> None:
        transport, protocol, port = await serve(handler, limits=Limits(unproven=50))
        async with AsyncRdpClient("127.0.0.1", port, timers=PATIENT) as client:
            flooding = asyncio.get_running_loop().run_in_executor(None, flood, port)
            while not flooding.done():
                assert await client.request(b"good") == b"good"
        assert ran.pop("127.0.0.1") >= 1
        assert 0 < ran.total() <= 50
        strangers = [one for one in protocol._responder._exchanges.values() if one.peer[0] != "127.0.0.1"]
        assert len(strangers) <= 50
        transport.close()

    asyncio.run(run())


@pytest.mark.parametrize("answer", ["text", None, bytes(100)])
def test_wrong_answer_is_reported_and_the_client_told(answer: object) -> None:
    reports: list[str] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(str(context["exception"])))
        transport, _, port = await serve(lambda payload, peer: answer, limits=Limits(answer=99))
        async with AsyncRdpClient("127.0.0.1", port, timers=PATIENT) as client:
            with pytest.raises(Failed):
                await client.request(b"hello")
        transport.close()

    asyncio.run(run())
    (report,) = reports
    assert "bytes" in report


def test_draining_server_answers_and_then_its_task_ends() -> None:
    async def run() -> None:
        go, begun = asyncio.Event(), asyncio.Event()

        async def handler(payload: bytes, _peer: object) -> bytes:
            begun.set()
            await go.wait()
            return payload

        before = asyncio.all_tasks()
        transport, protocol, port = await serve(handler)
        client = AsyncRdpClient("127.0.0.1", port, timeout=0.02, retries=2)
        old = asyncio.create_task(client.request(b"old"))
        await begun.wait()
        protocol.shutdown()
        with pytest.raises(GaveUp):
            await client.request(b"new")
        lasting = asyncio.all_tasks() - before - {old}
        assert lasting
        go.set()
        assert await old == b"old"
        async with asyncio.timeout(20):
            await asyncio.wait(lasting)
        client.close()
        with pytest.raises(ConnectionAbortedError):
            await client.request(b"closed")
        transport.close()

    asyncio.run(run())


def test_closing_the_client_ends_its_requests() -> None:
    async def run() -> None:
        transport, _, port = await serve(lambda payload, peer: asyncio.sleep(1000))
        client = AsyncRdpClient("127.0.0.1", port, timers=PATIENT)
        waiting = asyncio.create_task(client.request(b"hello"))
        await client.__aenter__()
        client.close()
        with pytest.raises(ConnectionAbortedError):
            await waiting
        transport.close()

    asyncio.run(run())
    gc.collect()


def test_repeated_answer_is_acknowledged_again_at_the_close() -> None:
    """The test is the server, and sends its answer again as if the acknowledgement was lost."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as played:
        played.bind(("127.0.0.1", 0))
        played.settimeout(20)
        with RdpClient("127.0.0.1", played.getsockname()[1], timeout=5) as client, ThreadPoolExecutor(1) as pool:
            asking = pool.submit(client.request, b"hello")
            request, peer = played.recvfrom(2048)
            answer = encode(Data(ANSWER, decode(request).id, 9, 2, 0, b"hi"))
            played.sendto(answer, peer)
            assert asking.result(20) == b"hi"
            taken = played.recv(2048)
            played.sendto(answer, peer)
        assert played.recv(2048) == taken


def test_the_command_line_makes_reliable_requests(server: int, daemon: Daemon) -> None:
    done = forkd("call", f"udp://127.0.0.1:{server}", "hello", "--rdp", "--hex", cwd=daemon.directory)
    assert done.returncode == 64  # hello is no hexadecimal number
    payload = b"hello".hex()
    done = forkd("call", f"udp://127.0.0.1:{server}", payload, "--rdp", "--hex", cwd=daemon.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert right(b"hello", bytes.fromhex(done.stdout.strip()))
    daemon.expect("as it was asked to")
    done = forkd("call", f"udp://127.0.0.1:{server}", "fail", "--rdp", cwd=daemon.directory)
    assert done.returncode == 1
    assert "its handler failed" in done.stderr


def test_command_line_gives_up_on_a_silent_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"udp://127.0.0.1:{silent.getsockname()[1]}"
        done = forkd("call", address, "hello", "--rdp", "--timeout", "50ms", "--retries", "2", cwd=tmp_path)
    assert done.returncode == 1
    found = re.fullmatch(rf"forkd: gave up on {address} after 3 tries in (\d+\.\d) s: no answer\n", done.stderr)
    assert found
    assert float(found[1]) >= 0.3
    done = forkd("call", address, "hello", "--rdp", "--retries", "99", cwd=tmp_path)
    assert done.returncode == 64
    assert "max_retransmit is to be from 0 to 30" in done.stderr
