"""The compiled twin by itself: what no test of the contract that both twins keep would come to."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd import compiled
from forkd.serve.loop import IN, PollLoop
from tests.support.needs import needs_compiled_twin
from tests.support.transport_contract import Kit, Recorder, twin

FAST: Any = compiled.load()[0].get("forkd.serve._fast")


@pytest.fixture(autouse=True)
def needs_it() -> None:
    needs_compiled_twin()


@pytest.fixture
def kit() -> Any:
    made = Kit("compiled")
    yield made
    made.close()


@given(st.lists(st.tuples(st.sampled_from(["set", "delete", "pop", "get", "clear"]), st.integers(0, 300)), max_size=60))
def test_table_is_as_a_dictionary(steps: list[tuple[str, int]]) -> None:
    loop = PollLoop(selector=twin("compiled")[0])
    table, expected = loop.selector.served, dict[int, Any]()
    for number, (step, key) in enumerate(steps):
        match step:
            case "set":
                table[key] = expected[key] = [number].append
            case "delete" if key in expected:
                del table[key], expected[key]
            case "delete":
                with pytest.raises(KeyError):
                    del table[key]
            case "pop":
                assert table.pop(key, None) == expected.pop(key, None)
            case "get":
                assert (table.get(key), key in table) == (expected.get(key), key in expected)
            case _:
                table.clear()
                expected.clear()
        assert (len(table), dict(table)) == (len(expected), expected)
    loop.close()


def test_table_has_no_descriptor_below_zero(kit: Kit) -> None:
    table = kit.poll_loop.selector.served
    with pytest.raises(KeyError):
        table[-1] = print
    assert -1 not in table
    assert table.get(-1) is None


def test_table_gives_back_the_method_that_reads(kit: Kit) -> None:
    transport, _ = kit.connect(Recorder(kit))
    ready: Any = kit.poll_loop.selector.served[transport.get_extra_info("socket").fileno()]
    assert ready.__self__ is transport
    ready(IN)  # there is nothing


def test_methods_refuse_what_is_no_connection(kit: Kit) -> None:
    for other in (object(), kit, None):
        with pytest.raises(TypeError, match="no connection"):
            FAST.data_ready(other, IN)
        with pytest.raises(TypeError, match="no connection"):
            FAST.write(other, b"x")


def test_connection_without_its_fields_raises_as_in_python(kit: Kit) -> None:
    _, transport_class = twin("compiled")
    empty = transport_class.__new__(transport_class)
    with pytest.raises(AttributeError):
        empty.write(b"x")
    with pytest.raises(AttributeError):
        FAST.data_ready(empty, IN)


def test_select_of_a_closed_selector_raises() -> None:
    loop = PollLoop(selector=twin("compiled")[0])
    loop.close()
    with pytest.raises(ValueError, match="closed"):
        loop.selector.rounds(0, 0.01, 4)  # type: ignore[attr-defined]


def test_wait_goes_on_after_a_signal_without_a_handler_that_raises(kit: Kit) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda signum, _: seen.append(signum))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        began = kit.loop.time()
        assert kit.poll_loop.selector.select(0.05) == []
        assert kit.loop.time() - began > 0.045
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [signal.SIGALRM]


def test_descriptor_that_the_handler_has_closed_is_not_read(kit: Kit) -> None:
    """Its number may be another's by now."""
    transport, peer = kit.connect(protocol := Recorder(kit))
    sock = transport._sock
    number, other = sock.fileno(), kit.pair()
    sock.close()
    os.dup2(other[0].fileno(), number)
    other[1].send(b"for another")
    try:
        FAST.data_ready(transport, IN)
        assert other[0].recv(100) == b"for another"
        transport.write(b"by another")
        with pytest.raises(BlockingIOError):
            other[1].recv(100)
    finally:
        os.close(number)
        kit.poll_loop.selector.served.clear()
        peer.close()
    assert [type(error) for error in protocol.lost] == [OSError]


@pytest.mark.parametrize("size", [1, 16_383, 16_384, 65_535, 65_536, 300_000])
def test_bytes_of_any_size_come_whole_and_stay(kit: Kit, size: int) -> None:
    """Those of one read are not changed by the next."""
    kept: list[bytes] = []
    protocol = Recorder(kit, data_received=lambda _, data: kept.append(data))
    _, peer = kit.connect(protocol)
    sent = [bytes([number]) * size for number in range(3)]
    for one in sent:
        peer.setblocking(False)
        kit.run(kit.loop.sock_sendall(peer, one))
        kit.until(lambda: len(protocol.received) % size == 0)
    assert b"".join(kept) == b"".join(sent)


def test_loop_that_is_dropped_with_connections_is_collected() -> None:
    """The table is seen by the garbage collector."""
    kit = Kit("compiled")
    kit.connect(Recorder(kit))
    found = ref(kit.transports[0])
    kit.loop.close()
    for sock in kit._sockets:
        sock.close()
    del kit
    gc.collect()
    assert found() is None
