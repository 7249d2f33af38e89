"""Listening sockets that are kept: described for another process and taken by it, matched with new settings, brought
in line with them, and borrowed, so that the one that gives it up leaves it to the other.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.errors import AddressInUse, ForkdError
from forkd.system.listeners import BoundListener, bind_all, bind_listener, match_listeners, update_listener

V4 = "tcp://127.0.0.1:0"


def listener(address: str, **settings: Any) -> Listener:
    return Listener(address=parse_address(address), handler="a:b", **settings)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


class Bound:
    """Binds listeners that are removed at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, address: str, **settings: Any) -> BoundListener:
        made = bind_listener(listener(address, **settings))
        self._stack.callback(made.remove)
        return made


@pytest.fixture
def bound() -> Iterator[Bound]:
    with ExitStack() as stack:
        yield Bound(stack)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def reached(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def passed_on(bound: BoundListener, to: Listener | None = None, *, borrowed: bool = False) -> BoundListener:
    """The listener as another process has it: by what stands in a message, and by copies of its sockets."""
    described = json.loads(json.dumps(bound.describe()))
    copies = [os.dup(sock.fileno()) for sock in bound.sockets]
    return BoundListener.from_description(described, to or bound.listener, copies, borrowed=borrowed)


def backlog_of(bound: BoundListener) -> int:
    info = bound.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    (found,) = struct.unpack_from("I", info, 28)  # tcpi_sacked, of a listener its longest queue
    return int(found)


@pytest.mark.parametrize("address", [V4, "tcp://localhost:0", "unix:@forkd-test-kept", "path"])
def test_a_listener_is_the_same_in_the_process_that_takes_it(bound: Bound, path: Path, address: str) -> None:
    one = bound(f"unix:{path}" if address == "path" else address)
    other = passed_on(one)
    try:
        assert (other.listener, other.address, other.inode) == (one.listener, one.address, one.inode)
        assert not other.borrowed
        assert [sock.getsockname() for sock in other.sockets] == [sock.getsockname() for sock in one.sockets]
        assert [sock.family for sock in other.sockets] == [sock.family for sock in one.sockets]
        assert one.describe()["wanted"] == str(one.listener.address)
    finally:
        other.close()


def test_listener_from_a_description_has_the_takers_settings(bound: Bound) -> None:
    one = bound(V4)
    wanted = listener(str(one.address), backlog=5)
    other = passed_on(one, wanted)
    assert (other.listener, other.address) == (wanted, one.address)
    other.close()


def test_each_takes_its_own_descriptors_and_leaves_the_rest(bound: Bound, path: Path) -> None:
    ones = [bound("tcp://localhost:0"), bound(f"unix:{path}"), bound(V4)]
    copies = [os.dup(sock.fileno()) for one in ones for sock in one.sockets]
    extra = os.open(os.devnull, os.O_RDONLY)
    copies.append(extra)
    others = [BoundListener.from_description(one.describe(), one.listener, copies) for one in ones]
    assert copies == [extra]
    os.close(extra)
    for one, other in zip(ones, others, strict=True):
        assert [sock.getsockname() for sock in other.sockets] == [sock.getsockname() for sock in one.sockets]
        other.close()


def test_sockets_of_a_host_name_stay_in_order(bound: Bound) -> None:
    parts = [bound(V4), bound("tcp://[::1]:0")]
    one = BoundListener(listener("tcp://localhost:0"), parts[0].address, [part.sockets[0] for part in parts])
    other = passed_on(one)
    assert [sock.family for sock in other.sockets] == [socket.AF_INET, socket.AF_INET6]
    other.close()


def test_listener_with_too_few_descriptors_takes_none(bound: Bound) -> None:
    described = bound(V4).describe() | {"sockets": 2}
    descriptor = os.open(os.devnull, os.O_RDONLY)
    descriptors = [descriptor]
    with pytest.raises(ValueError, match=f"^{V4} came without its sockets$"):
        BoundListener.from_description(described, listener(V4), descriptors)
    assert descriptors == [descriptor]
    os.close(descriptor)


@pytest.mark.parametrize("borrowed", [False, True])
def test_borrowed_listener_leaves_its_path_alone(bound: Bound, path: Path, borrowed: bool) -> None:
    one = bound(f"unix:{path}")
    other = passed_on(one, borrowed=borrowed)
    other.remove()
    assert other.sockets[0].fileno() == -1
    assert path.exists() == borrowed
    assert reached(path) == borrowed
    assert one.sockets[0].fileno() >= 0


def matched(wanted: list[Listener], held: list[BoundListener]) -> list[int | None]:
    """For each listener the place of the one among those held that was found for it."""
    found = match_listeners(wanted, held)
    sockets = [one.sockets for one in held]
    assert [one.listener for one in found if one is not None] == [
        one for one, match in zip(wanted, found, strict=True) if match is not None
    ]
    return [None if one is None else sockets.index(one.sockets) for one in found]


def test_listeners_are_matched_by_what_the_settings_say(bound: Bound, path: Path) -> None:
    name = "unix:@forkd-test-kept"
    held = [bound(V4), bound(f"unix:{path}"), bound(name)]
    assert matched([listener(name), listener("tcp://127.0.0.1:1"), listener(f"unix:{path}")], held) == [2, None, 1]
    assert matched([listener(V4)], []) == [None]
    assert matched([], held) == []


def test_free_port_is_kept_for_port_0_or_for_its_number(bound: Bound) -> None:
    held = [bound(V4), bound(V4)]
    first, second = (str(one.address) for one in held)
    assert matched([listener(V4), listener(V4)], held) == [0, 1]
    assert matched([listener(V4), listener(V4), listener(V4)], held) == [0, 1, None]
    assert matched([listener(second), listener(first)], held) == [1, 0]
    assert matched([listener(first), listener(first)], held) == [0, None]
    assert matched([listener("tcp://[::1]:0")], held) == [None]


def test_fixed_port_is_not_given_for_port_0(bound: Bound) -> None:
    fixed = str(bound(V4).address)
    parsed = parse_address(fixed)
    held = [BoundListener(listener(fixed), parsed, [])]
    assert matched([listener(V4)], held) == [None]
    assert matched([listener(fixed)], held) == [0]


def test_match_has_new_settings_and_the_held_one_its_own(bound: Bound) -> None:
    held = bound(V4, backlog=10)
    (found,) = match_listeners([listener(V4, backlog=20)], [held])
    assert found is not None
    assert (found.listener.backlog, held.listener.backlog) == (20, 10)
    assert (found.sockets, found.address, found.inode) == (held.sockets, held.address, held.inode)


def test_match_of_a_borrowed_listener_is_borrowed(bound: Bound, path: Path) -> None:
    one = bound(f"unix:{path}")
    other = passed_on(one, borrowed=True)
    (found,) = match_listeners([listener(f"unix:{path}")], [other])
    assert found is not None
    found.remove()
    assert path.exists()


def test_held_listener_is_not_bound_again(bound: Bound, path: Path) -> None:
    held = [bound(f"unix:{path}"), bound(V4)]
    wanted = (listener(V4), listener(V4), listener(f"unix:{path}"))
    made = bind_all(wanted, held)
    assert [made[0].sockets, made[2].sockets] == [held[1].sockets, held[0].sockets]
    assert made[1].address not in [one.address for one in held]
    assert tuple(one.listener for one in made) == wanted
    made[1].remove()


def test_held_listener_stays_when_another_can_not_be_bound(bound: Bound, path: Path) -> None:
    held, taken = bound(f"unix:{path}"), bound(V4)
    with pytest.raises(AddressInUse):
        bind_all((listener(f"unix:{path}"), listener(f"unix:{path}.new"), listener(str(taken.address))), [held])
    assert held.sockets[0].fileno() >= 0
    assert reached(path)
    assert not Path(f"{path}.new").exists()


def test_a_kept_listener_gets_the_backlog_of_its_new_settings(bound: Bound) -> None:
    held = bound(V4, backlog=7)
    (found,) = match_listeners([listener(V4, backlog=9)], [held])
    assert found is not None
    assert backlog_of(found) == 7
    update_listener(found)
    assert backlog_of(found) == 9


def test_kept_path_gets_the_mode_and_owner_of_new_settings(bound: Bound, path: Path) -> None:
    held = bound(f"unix:{path}", mode=0o600)
    uid, gid = (12345, 12346) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    held.listener = listener(f"unix:{path}", mode=0o660, owner=str(uid), group=str(gid))
    update_listener(held)
    found = path.stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o660, uid, gid)


def test_a_kept_path_without_a_mode_stays_as_it_is(bound: Bound, path: Path) -> None:
    held = bound(f"unix:{path}", mode=0o640)
    held.listener = listener(f"unix:{path}")
    update_listener(held)
    assert path.stat().st_mode & 0o777 == 0o640


def test_path_that_is_another_file_by_now_is_left_alone(bound: Bound, path: Path) -> None:
    held = bound(f"unix:{path}", mode=0o600)
    path.unlink()
    bound(f"unix:{path}", mode=0o600)
    held.listener = listener(f"unix:{path}", mode=0o666)
    update_listener(held)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_path_that_has_gone_is_told(bound: Bound, path: Path) -> None:
    held = bound(f"unix:{path}", mode=0o600)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        update_listener(held)


def test_missing_owner_is_told(bound: Bound, path: Path) -> None:
    held = bound(f"unix:{path}")
    held.listener = listener(f"unix:{path}", owner="no-such-user-here")
    with pytest.raises(ForkdError, match="no-such-user-here"):
        update_listener(held)
