"""The options of a listener's connections: as the settings say, after a reload too, on whatever kind of socket."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Keepalive, Listener, SocketOptions
from forkd.config.settings import Settings
from forkd.errors import ForkdError
from forkd.system.socket_options import QuickAckSocket, connection_tuner, option_warnings, tune
from tests.support.changing_daemon import Changing, listener
from tests.support.clients import dial, read
from tests.support.daemon import Harness
from tests.support.once_process import OnceProcess

V4, V6 = "tcp://127.0.0.1:0", "tcp://[::1]:0"
SETTINGS: dict[str, dict[str, str | int]] = {
    "keepalive": {"idle": "7s", "interval": "2500ms", "count": 4, "user_timeout": "1100ms"},
    "socket": {"nodelay": "false", "busy_poll": "0.05ms", "send_buffer": "20KiB", "receive_buffer": "30KiB"},
}
#: What the kernel has then: whole seconds, milliseconds, microseconds, and twice the bytes (socket(7)).
FOUND = {
    "keepalive": 1, "idle": 7, "interval": 3, "count": 4, "user_timeout": 1100,
    "nodelay": 0, "busy_poll": 50, "send_buffer": 40960, "receive_buffer": 61440,
}  # fmt: skip
DEFAULTS = {"keepalive": 1, "idle": 60, "interval": 10, "count": 6, "user_timeout": 120_000, "nodelay": 1}
FLAT = tuple(f"listen.{part}.{name}={value}" for part, of in SETTINGS.items() for name, value in of.items())


def told(client: socket.socket) -> dict[str, int]:
    """The connection's options, as its worker finds them."""
    client.sendall(b"?")
    line = b""
    while not line.endswith(b"\n") and (piece := read(client, 1)):
        line += piece
    return dict(json.loads(line))


def sizes(client: socket.socket) -> tuple[int, int]:
    found = told(client)
    return found["send_buffer"], found["receive_buffer"]


def a_listener(address: str = V4, **more: Any) -> Listener:
    return Listener(address=parse_address(address), handler="a:b", **more)


@pytest.mark.parametrize("address", [V4, V6])
def test_a_connection_has_the_options_of_its_listeners_settings(harness: Harness, address: str) -> None:
    daemon = harness.daemon(target="sockopts:Told", listen=(address,), workers=1, settings=FLAT).run()
    found = told(harness.connect(daemon))
    assert {name: found[name] for name in FOUND} == FOUND


def test_default_is_keepalive_and_else_the_systems_options(harness: Harness) -> None:
    found = told(harness.connect(harness.daemon(target="sockopts:Told", workers=1).run()))
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS
    with socket.socket() as fresh:
        assert found["busy_poll"] == fresh.getsockopt(socket.SOL_SOCKET, 46)


def test_off_is_off(harness: Harness) -> None:
    off = ("listen.keepalive.idle=off", "listen.keepalive.user_timeout=0")
    found = told(harness.connect(harness.daemon(target="sockopts:Told", workers=1, settings=off).run()))
    assert (found["keepalive"], found["user_timeout"]) == (0, 0)


def test_an_inherited_listeners_connections_follow_them_too(harness: Harness) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where, number = server.getsockname(), server.fileno()
        daemon = harness.daemon(target="sockopts:Told", listen=(f"fd:{number}",), workers=1, settings=FLAT)
        daemon.run(pass_fds=[number])
        server.close()
        found = told(harness.connect(f"tcp://127.0.0.1:{where[1]}"))
        assert {name: found[name] for name in FOUND} == FOUND
        daemon.stop()


def test_an_inherited_connection_follows_them_too(single: Callable[..., OnceProcess], tmp_path: Path) -> None:
    more = [part for setting in FLAT for part in ("--set", setting)]
    one = single("sockopts:Told", "--log", tmp_path / "once.log", *more, listen="fd:0")
    with socket.create_server(("127.0.0.1", 0)) as server, dial(f"tcp://127.0.0.1:{server.getsockname()[1]}") as client:
        connection, _ = server.accept()
        one.open(stdin=connection)
        connection.close()
        found = told(client)
        assert {name: found[name] for name in FOUND} == FOUND
    assert one.status() == 0


def test_reload_sets_and_restores_options_of_kept_listeners(harness: Harness) -> None:
    site = Changing(harness, workers=1)
    plain = listener(V4, handler="sockopts:Told")
    site.write(listen=[plain])
    daemon = site.daemon.start()
    address = daemon.address
    first, before = told(harness.connect(address)), sizes(harness.connect(address))
    site.write(listen=[{**plain, **SETTINGS}])
    assert daemon.command("reload").returncode == 0
    found = told(harness.connect(address))
    assert {name: found[name] for name in FOUND} == FOUND
    site.write(listen=[plain])
    assert daemon.command("reload").returncode == 0
    again = told(harness.connect(address))
    for name in (*DEFAULTS, "busy_poll"):
        assert again[name] == first[name], name
    assert sizes(harness.connect(address)) == before


@pytest.mark.parametrize("name", ["send_buffer", "receive_buffer"])
def test_one_buffer_goes_back_and_the_other_stays(name: str) -> None:
    option = {"send_buffer": socket.SO_SNDBUF, "receive_buffer": socket.SO_RCVBUF}
    other = next(one for one in option if one != name)
    with socket.socket() as sock, socket.socket() as fresh:
        tune(sock, a_listener(socket=SocketOptions(send_buffer=20000, receive_buffer=30000)))
        held = sock.getsockopt(socket.SOL_SOCKET, option[other])
        half: dict[str, Any] = {other: held // 2}
        tune(sock, a_listener(socket=SocketOptions(**half)))
        assert sock.getsockopt(socket.SOL_SOCKET, option[other]) == held
        back = sock.getsockopt(socket.SOL_SOCKET, option[name])
        assert back == fresh.getsockopt(socket.SOL_SOCKET, option[name])
        assert sock.getsockopt(socket.SOL_SOCKET, 72) == {"send_buffer": 2, "receive_buffer": 1}[name]  # SO_BUF_LOCK


def test_an_inherited_sockets_own_buffers_are_left_alone() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20000)
        tune(sock, a_listener("fd:3"))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 40000


def test_a_unix_sockets_connections_have_their_send_buffer(harness: Harness, tmp_path: Path) -> None:
    daemon = harness.daemon(
        target="sockopts:Told", listen=(f"unix:{tmp_path}/s",), workers=1, settings=("listen.socket.send_buffer=20KiB",)
    ).run()
    assert told(harness.connect(daemon)) == {"send_buffer": 40960}


@pytest.mark.parametrize("handler", ["Told", "ToldBuffered"])
def test_quickack_holds_over_any_number_of_reads(harness: Harness, handler: str) -> None:
    """An answer to each request is what makes the kernel delay acknowledgements, and so it does without."""
    for quick, stay in (("true", {1}), ("false", {0, 1})):
        settings = (f"listen.socket.quickack={quick}",)
        daemon = harness.daemon(f"q-{quick}", target=f"sockopts:{handler}", workers=1, settings=settings).run()
        client = harness.connect(daemon)
        assert {told(client)["quickack"] for _ in range(50)} == stay


def test_connection_without_options_of_its_own_costs_nothing() -> None:
    assert connection_tuner(a_listener()) is None
    assert connection_tuner(a_listener(socket=SocketOptions(send_buffer=20000))) is None
    assert connection_tuner(a_listener("unix:@x", socket=SocketOptions(quickack=True))) is None
    assert connection_tuner(a_listener("unix:@x", socket=SocketOptions(receive_buffer=20000))) is None
    fit = connection_tuner(a_listener("fd:3", socket=SocketOptions(quickack=True)))
    one, other = socket.socketpair()
    with one, other:
        assert fit is not None
        assert fit(one) is one
    with socket.socket() as sock:
        sock.setblocking(False)
        with fit(sock) as quick:
            assert isinstance(quick, QuickAckSocket)
            assert not quick.getblocking()


def test_a_buffer_that_the_kernel_caps_is_told_once(harness: Harness) -> None:
    settings = ("listen.socket.send_buffer=1GiB",)
    daemon = harness.daemon(workers=2, settings=settings).run()
    harness.connect(daemon)
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    record = daemon.wait_log(r"WARNING .*listen\[0\]\.socket\.send_buffer: wanted 1GiB, there is ")
    assert record.endswith("the sysctl net.core.wmem_max allows no more")
    assert sum("send_buffer" in one for one in daemon.records()) == 1
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2 == most


def test_keepalive_that_the_kernel_overrules_is_told() -> None:
    """TCP_USER_TIMEOUT overrules TCP_KEEPCNT."""
    quick = Keepalive(idle=1, interval=1, count=2, user_timeout=120)
    lists = (
        a_listener(keepalive=quick),
        a_listener("unix:@x", keepalive=quick),
        a_listener(),
        a_listener(keepalive=replace(quick, user_timeout=3)),
        a_listener(keepalive=replace(quick, idle=0.0)),
        a_listener(keepalive=replace(quick, user_timeout=None)),
    )
    assert list(option_warnings(Settings(listen=lists))) == [
        "listen[0].keepalive: a client that has vanished would be noticed after 3s, but user_timeout overrules count "
        "(tcp(7)), and it is 2m"
    ]


def test_user_timeout_is_by_default_as_long_as_keepalive() -> None:
    assert Keepalive().effective_user_timeout == 120
    assert Keepalive(idle=10, interval=5, count=3).effective_user_timeout == 25
    assert Keepalive(idle=0).effective_user_timeout == 120
    assert Keepalive(idle=10, user_timeout=0).effective_user_timeout == 0


def test_only_what_is_capped_is_told() -> None:
    small = SocketOptions(send_buffer=1, receive_buffer=20000)
    huge = SocketOptions(receive_buffer=1 << 30)
    lists = (a_listener(socket=small), a_listener(socket=huge), a_listener("unix:@x", socket=huge), a_listener())
    assert [re.match(r"\S+", text)[0] for text in option_warnings(Settings(listen=lists))] == [  # type: ignore[index]
        "listen[1].socket.receive_buffer:"
    ]


class Refusing(socket.socket):
    """Has no means for some options."""

    def __init__(self, option: int, error: OSError) -> None:
        super().__init__()
        self.option, self.error = option, error

    def setsockopt(self, level: int, option: int, value: Any) -> None:  # type: ignore[override]
        if option == self.option:
            raise self.error
        super().setsockopt(level, option, value)


@pytest.mark.parametrize(
    ("option", "setting", "error", "said"),
    [
        (46, "socket.busy_poll", PermissionError(1, "Not permitted"), "Not permitted; it is for root, or needs"),
        (socket.TCP_KEEPINTVL, "keepalive.interval", OSError(22, "Invalid argument"), "Invalid argument"),
        (socket.TCP_USER_TIMEOUT, "keepalive.user_timeout", OSError(92, "Protocol not available"), "not available"),
        (socket.SO_RCVBUF, "socket.receive_buffer", OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
    ],
)
def test_option_that_the_kernel_refuses_is_named(option: int, setting: str, error: OSError, said: str) -> None:
    wanted = a_listener(socket=SocketOptions(busy_poll=0.00005, receive_buffer=20000))
    with Refusing(option, error) as sock, pytest.raises(ForkdError) as caught:
        tune(sock, wanted)
    assert f"tcp://127.0.0.1:0: {setting} can't be had: " in str(caught.value)
    assert said in str(caught.value)


def test_option_that_the_kernel_lacks_may_be_off() -> None:
    with Refusing(socket.TCP_USER_TIMEOUT, OSError(92, "Protocol not available")) as sock:
        tune(sock, replace(a_listener(), keepalive=Keepalive(user_timeout=0.0)))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("keepalive.idle=10h", "10h is not from off to 32767s"),
        ("keepalive.interval=0", "0 is not from 1ms to 32767s"),
        ("keepalive.user_timeout=25d", "25d is not from off to 2147483647ms"),
        ("socket.busy_poll=1h", "1h is not from 0s to 2147483.647ms"),
        ("socket.send_buffer=2GiB", "2GiB is not from 0B to 2147483647B"),
    ],
)
def test_more_than_the_kernel_can_be_told_is_a_mistake(harness: Harness, setting: str, said: str) -> None:
    result = harness.daemon(settings=(f"listen.{setting}",)).command("check")
    assert result.returncode == 78
    assert said in result.stderr
