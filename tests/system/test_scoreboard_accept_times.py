"""The accept times of connections and their clients, as a worker writes and another process reads them."""

from __future__ import annotations

import os
from time import monotonic_ns

import pytest

from forkd.system import scoreboard
from forkd.system.scoreboard import (
    ACCEPT_TIMES_SIZE,
    ADDRESSES_SIZE,
    REGION_SIZE,
    AcceptTimes,
    ClientAddresses,
    Regions,
    read_accept_times,
    read_client_addresses,
)


@pytest.fixture
def regions() -> Regions:
    made = Regions(3)
    made.confine(1)
    return made


def test_a_descriptor_has_the_time_of_its_latest_connection(regions: Regions) -> None:
    times = AcceptTimes(regions.view(1))
    before = monotonic_ns()
    times.record(7)
    between = monotonic_ns()
    times.record(7)
    times.record(9)
    cells = read_accept_times(regions.descriptor, 1, 10)
    assert before <= between <= cells[7] <= cells[9] <= monotonic_ns()
    assert [number for number, began in enumerate(cells) if began] == [7, 9]
    assert set(read_accept_times(regions.descriptor, 0, 10)) == {0}
    os.close(regions.descriptor)


def test_descriptor_beyond_the_last_cell_writes_nothing(regions: Regions) -> None:
    times = AcceptTimes(regions.view(1))
    last = ACCEPT_TIMES_SIZE // 8 - 1
    for descriptor in (last, last + 1, 1 << 30):
        times.record(descriptor)
    cells = read_accept_times(regions.descriptor, 1, 1 << 30)
    assert (len(cells), cells[last] > 0) == (last + 1, True)
    counters = bytes(REGION_SIZE - ACCEPT_TIMES_SIZE)
    assert os.pread(regions.descriptor, REGION_SIZE - ACCEPT_TIMES_SIZE, REGION_SIZE + ACCEPT_TIMES_SIZE) == counters
    os.close(regions.descriptor)


def test_accept_times_without_a_region_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([7])
    monkeypatch.setattr(scoreboard, "monotonic_ns", lambda: next(times))
    for descriptor in (0, 3):
        AcceptTimes().record(descriptor)
    region = memoryview(bytearray(REGION_SIZE))
    AcceptTimes(region).record(3)  # the first that reads the clock
    assert region.cast("q")[3] == 7


def test_descriptor_has_the_client_that_its_proxy_named_last(regions: Regions) -> None:
    addresses = ClientAddresses(regions.view(1))
    for descriptor, cookie in ((3, 70), (5, 71), (3, 72), (ADDRESSES_SIZE // 32 - 1, 73), (ADDRESSES_SIZE // 32, 74)):
        addresses.record(descriptor, cookie, bytes(15) + bytes([cookie]), 4711)
    found = read_client_addresses(regions.descriptor, 1, 1 << 30)
    assert found == {cookie: (bytes(15) + bytes([cookie]), 4711) for cookie in (72, 71, 73)}
    assert [*read_client_addresses(regions.descriptor, 1, 5)] == [72]
    assert read_client_addresses(regions.descriptor, 0, 1 << 30) == {}
    assert not any(os.pread(regions.descriptor, REGION_SIZE, 2 * REGION_SIZE))
    os.close(regions.descriptor)
