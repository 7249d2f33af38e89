"""Groups of datagram sockets: which may join, where datagrams go, what is left of one that goes, what is dropped."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.errors import AddressInUse, ForkdError
from forkd.system.listeners import BoundListener, bind_listener, match_listeners, probe_listener
from forkd.system.socket_stats import accept_queue_of
from tests.support.clients import datagram_client

Bind = Callable[..., BoundListener]


@pytest.fixture
def bind() -> Iterator[Bind]:
    made: list[BoundListener] = []

    def do(address: str, slots: int = 1, **more: object) -> BoundListener:
        listener = Listener(address=parse_address(address), handler="a:b", **more)  # type: ignore[arg-type]
        made.append(bind_listener(listener, slots))
        return made[-1]

    yield do
    for bound in made:
        bound.remove()


def counts(bound: BoundListener) -> list[int]:
    """How many datagrams lie in each socket; they are read."""
    found = []
    for sock in bound.sockets:
        count = 0
        try:
            while sock.recv(100):
                count += 1
        except BlockingIOError:
            found.append(count)
    return found


def send(address: object, count: int) -> None:
    """As many datagrams, each from another client."""
    host = str(address).replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]").replace("localhost", "127.0.0.1")
    for _ in range(count):
        with datagram_client(host) as sock:
            sock.send(b"x")


HOSTS = ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"]


@pytest.mark.parametrize("host", HOSTS)
def test_slots_share_clients_and_keep_their_queues_when_going(bind: Bind, host: str) -> None:
    bound = bind(f"udp://{host}:0", 4)
    kept = [sock.dup() for sock in bound.sockets[2:]]  # as the workers of these slots have them
    send(bound.address, 200)
    bound.resize(2)
    send(bound.address, 200)
    going = BoundListener(bound.listener, bound.address, kept)
    staying = counts(bound)
    assert len(staying) == 2
    assert all(staying)
    assert all(counts(going))
    send(bound.address, 100)
    assert sum(counts(bound)) == 100
    assert counts(going) == [0, 0]
    going.close()


def test_nothing_is_lost_when_slots_come_and_go(bind: Bind) -> None:
    bound = bind("udp://127.0.0.1:0", 1)
    total = 0
    for slots in (3, 2, 5, 1):
        bound.resize(slots)
        assert len(bound.sockets) == slots
        send(bound.address, 50)
        total += sum(counts(bound))
    assert total == 200


@pytest.mark.parametrize("host", [*HOSTS, "localhost"])
def test_group_is_joined_by_no_other_daemon(bind: Bind, host: str) -> None:
    bound = bind(f"udp://{host}:0", 2)
    with pytest.raises(AddressInUse, match=rf"in use by .*pid {os.getpid()}"):
        bind(str(bound.address), 2)
    with pytest.raises(AddressInUse):
        probe_listener(Listener(address=bound.address, handler="a:b"))
    bound.remove()
    probe_listener(Listener(address=bound.address, handler="a:b"))
    family, name = socket.AF_INET, ("127.0.0.1", 0)
    with socket.socket(family, socket.SOCK_DGRAM) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(name)
        with pytest.raises(AddressInUse):
            bind(f"udp://127.0.0.1:{stranger.getsockname()[1]}")


def test_each_slot_has_a_socket_for_each_address_of_a_name(bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", 0, 0, 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
    bound = bind("udp://both.test:0", 3)
    assert len(bound.sockets) == 6
    for slot in (1, 2, 3):
        assert [sock.family for sock in bound.sockets_of_slot(slot)] == [socket.AF_INET, socket.AF_INET6]
    assert len({sock.getsockname()[1] for sock in bound.sockets}) == 1
    # However they come from another process, each slot has one of each.
    descriptors = [os.dup(sock.fileno()) for sock in sorted(bound.sockets, key=lambda one: one.family)]
    taken = BoundListener.from_description(bound.describe(), bound.listener, descriptors)
    for slot in (1, 2, 3):
        assert {sock.family for sock in taken.sockets_of_slot(slot)} == {socket.AF_INET, socket.AF_INET6}
    taken.close()


def test_a_worker_keeps_the_sockets_of_its_slot_alone(bind: Bind) -> None:
    bound = bind("udp://127.0.0.1:0", 3)
    first, second, third = bound.sockets
    bound.keep_slot(2)
    assert bound.sockets == [second]
    assert (first.fileno(), third.fileno()) == (-1, -1)


def test_all_generations_have_the_same_sockets(bind: Bind) -> None:
    bound = bind("udp://127.0.0.1:0", 1)
    (kept,) = match_listeners([bound.listener], [bound])
    assert kept is not None
    kept.resize(3)
    assert len(bound.sockets) == 3
    bound.resize(2)
    assert len(kept.sockets) == 2


def test_senders_get_an_error_at_the_end_of_the_daemon(bind: Bind) -> None:
    bound = bind("udp://127.0.0.1:0", 3)
    send(bound.address, 20)
    bound.stop_receiving()
    with datagram_client(str(bound.address)) as sock:
        sock.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
    assert sum(counts(bound)) == 20


def test_drops_of_the_kernel_are_counted_by_socket(bind: Bind) -> None:
    bound = bind("udp://127.0.0.1:0", 1)
    (sock,) = bound.sockets
    assert accept_queue_of(sock).drops == 0
    with datagram_client(str(bound.address)) as client:
        for _ in range(3000):
            client.send(b"x")
    dropped = accept_queue_of(sock).drops
    assert dropped is not None
    assert dropped > 0
    assert dropped + counts(bound)[0] == 3000


@pytest.mark.parametrize(
    ("address", "group", "said"),
    [
        ("udp://127.0.0.1:0", "ff02::1", "they are of two families"),
        ("udp://0.0.0.0:0", "239.1.2.3%nosuch", "there is no network interface nosuch"),
    ],
)
def test_a_group_that_can_not_be_joined_is_told(bind: Bind, address: str, group: str, said: str) -> None:
    with pytest.raises(ForkdError, match=rf"can't join {group} at {address}: .*{said}"):
        bind(address, multicast=(group,))


def test_unix_datagram_socket_takes_over_a_dead_owners_path(bind: Bind, tmp_path: object) -> None:
    path = f"{tmp_path}/d.sock"
    bound = bind(f"unix-dgram:{path}", 3, mode=0o600)
    assert len(bound.sockets) == 1
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(AddressInUse):
        bind(f"unix-dgram:{path}")
    bound.close()  # as by a death: the path stays
    second = bind(f"unix-dgram:{path}")
    second.remove()
    assert not os.path.exists(path)
