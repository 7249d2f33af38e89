"""The framing bases on a transport, forkd's and asyncio's own: pausing, closing, handing over, and the end of file."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from forkd.framing import FixedSizeProtocol, LengthPrefixProtocol, LineProtocol, MessageTooLong
from tests.support.transport_contract import (
    MUCH,
    Calls,
    Kit,
    Recorder,
    anonymous,
    kits,
    read_exactly,
    read_to_end,
    tcp_pair,
)

kit = kits


class Recording(Calls):
    """Writes down what a framing base calls; its hooks are those of `contract.Calls`."""

    base: Any  # the framing base, beside this one, of each class below

    def __init__(self, kit: Kit, **hooks: Callable[..., Any]) -> None:
        super().__init__(kit, **hooks)
        self.messages: list[bytes] = []
        self.unfinished: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.base.connection_made(self, transport)

    def message_received(self, message: bytes) -> None:
        self.messages.append(message)
        self.called("message_received", message)

    def message_too_long(self, error: MessageTooLong) -> None:
        self.called("message_too_long", error)

    def unfinished_received(self, rest: bytes) -> None:
        self.unfinished.append(rest)
        self.called("unfinished_received", rest)

    def messages_ended(self) -> Any:
        return self.called("messages_ended")

    def eof_received(self) -> Any:
        return self.base.eof_received(self)

    def pause_writing(self) -> None:
        self.base.pause_writing(self)
        self.called("pause_writing")

    def resume_writing(self) -> None:
        self.base.resume_writing(self)
        self.called("resume_writing")

    def connection_lost(self, error: BaseException | None) -> None:
        self.base.connection_lost(self, error)
        super().connection_lost(error)


class Lines(Recording, LineProtocol):
    base = LineProtocol
    limit = 100


class Frames(Recording, LengthPrefixProtocol):
    base = LengthPrefixProtocol
    prefix_size = 2
    limit = 1000


class Pairs(Recording, FixedSizeProtocol):
    base = FixedSizeProtocol
    size = 2


def heard(protocol: Recording, *messages: bytes) -> Callable[[], bool]:
    return lambda: protocol.messages == list(messages)


def lost(protocol: Recording) -> Callable[[], bool]:
    return lambda: bool(protocol.lost)


def on(message: bytes, action: Callable[[Any], object]) -> Callable[[Any, bytes], object]:
    """A hook that acts upon one message."""
    return lambda protocol, heard: action(protocol) if heard == message else None


@pytest.mark.parametrize(("made", "data"), [(Lines, b"ab\n\ncd\r\n"), (Frames, b"\0\2ab\0\0\0\2cd"), (Pairs, b"abcd")])
def test_messages_come_whole_however_they_were_sent(kit: Kit, made: type[Recording], data: bytes) -> None:
    several, by_bytes = made(kit), made(kit)
    wanted = [b"ab", b"cd"] if made is Pairs else [b"ab", b"", b"cd"]
    kit.connect(several, first=data)
    kit.until(heard(several, *wanted))
    _, peer = kit.connect(by_bytes)
    for byte in data:
        peer.sendall(bytes([byte]))
        kit.turn()
    kit.until(heard(by_bytes, *wanted))
    assert several.messages == by_bytes.messages == wanted


def test_a_message_is_sent_in_the_framing_that_it_comes_in(kit: Kit) -> None:
    protocol = Frames(kit)
    _, peer = kit.connect(protocol)
    protocol.send_message(b"hello")
    assert kit.in_thread(read_exactly, peer, 7) == b"\0\5hello"
    with pytest.raises(ValueError, match="at most 1000"):
        protocol.send_message(bytes(1001))


@pytest.mark.parametrize("end", ["close", "abort"])
def test_close_stops_messages_of_the_same_read(kit: Kit, end: str) -> None:
    protocol = Lines(kit, message_received=on(b"quit", lambda p: getattr(p.transport, end)()))
    kit.connect(protocol, first=b"one\nquit\ntwo\n")
    kit.until(lost(protocol))
    assert protocol.messages == [b"one", b"quit"]


def test_pause_holds_back_what_was_read_until_a_resume(kit: Kit) -> None:
    protocol = Lines(kit, message_received=on(b"wait", lambda p: p.pause_reading()))
    _, peer = kit.connect(protocol, first=b"one\nwait\ntwo\nwait\nthree\nfo")
    kit.until(heard(protocol, b"one", b"wait"))
    peer.sendall(b"ur\n")
    kit.turn()
    assert protocol.messages == [b"one", b"wait"]
    protocol.resume_reading()
    assert protocol.messages == [b"one", b"wait"], "nothing comes from within the call"
    kit.until(heard(protocol, b"one", b"wait", b"two", b"wait"))
    kit.turn()
    assert len(protocol.messages) == 4
    protocol.resume_reading()
    kit.until(lambda: protocol.messages[4:] == [b"three", b"four"])


def test_pause_and_resume_within_one_message_lose_nothing(kit: Kit) -> None:
    protocol = Lines(kit, message_received=on(b"wait", lambda p: (p.pause_reading(), p.resume_reading())))
    _, peer = kit.connect(protocol, first=b"wait\ntwo\n")
    kit.until(heard(protocol, b"wait", b"two"))
    peer.sendall(b"three\n")
    kit.until(heard(protocol, b"wait", b"two", b"three"))
    assert protocol.transport.is_reading()


def test_end_of_file_waits_behind_messages_held_back(kit: Kit) -> None:
    protocol = Lines(kit, message_received=on(b"wait", lambda p: p.pause_reading()))
    _, peer = kit.connect(protocol, first=b"wait\ntwo\nrest")
    kit.until(heard(protocol, b"wait"))
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    assert protocol.calls == ["connection_made", "message_received"]
    protocol.resume_reading()
    kit.until(lost(protocol))
    assert protocol.calls[2:] == ["message_received", "unfinished_received", "messages_ended", "connection_lost"]
    assert (protocol.messages[1:], protocol.unfinished, protocol.lost) == ([b"two"], [b"rest"], [None])


@pytest.mark.parametrize("stays", [True, False])
def test_end_of_file_while_paused_is_delivered_in_its_turn(kit: Kit, stays: bool) -> None:
    """A transport may tell of the end although nothing is read: what was read before it still comes first."""
    protocol = Lines(kit, message_received=on(b"wait", lambda p: p.pause_reading()), messages_ended=lambda _: stays)
    transport, _ = kit.connect(protocol, first=b"wait\ntwo\n")
    kit.until(heard(protocol, b"wait"))
    assert protocol.eof_received() is True
    protocol.resume_reading()
    kit.until(lambda: "messages_ended" in protocol.calls)
    assert protocol.messages == [b"wait", b"two"]
    kit.turn()
    assert transport.is_closing() is not stays
    if stays:
        transport.abort()
    kit.until(lost(protocol))


def test_client_that_does_not_read_answers_is_not_read_from(kit: Kit) -> None:
    protocol = Lines(kit, message_received=on(b"much", lambda p: p.transport.write(bytes(MUCH))))
    _, peer = kit.connect(protocol, first=b"much\ntwo\n")
    kit.until(lambda: "pause_writing" in protocol.calls)
    kit.turn()
    assert protocol.messages == [b"much"]
    kit.in_thread(read_exactly, peer, MUCH)
    kit.until(heard(protocol, b"much", b"two"))
    peer.sendall(b"three\n")
    kit.until(heard(protocol, b"much", b"two", b"three"))


def test_client_that_reads_again_does_not_end_own_pause(kit: Kit) -> None:
    def answer(protocol: Any) -> None:
        protocol.pause_reading()
        protocol.transport.write(bytes(MUCH))

    protocol = Lines(kit, message_received=on(b"much", answer))
    _, peer = kit.connect(protocol, first=b"much\ntwo\n")
    kit.until(lambda: "pause_writing" in protocol.calls)
    kit.in_thread(read_exactly, peer, MUCH)
    kit.until(lambda: "resume_writing" in protocol.calls)
    kit.turn()
    assert protocol.messages == [b"much"]
    protocol.resume_reading()
    kit.until(heard(protocol, b"much", b"two"))


def test_another_protocol_takes_over_with_what_is_unread(kit: Kit) -> None:
    def take_over(protocol: Any) -> None:
        rest = protocol.take_unread()
        protocol.transport.set_protocol(new)
        new.connection_made(protocol.transport)
        new.data_received(rest)

    new = Frames(kit)
    old = Lines(kit, message_received=on(b"UPGRADE", take_over))
    _, peer = kit.connect(old, first=b"one\nUPGRADE\n\0\2ab\0\5he")
    kit.until(heard(new, b"ab"))
    peer.sendall(b"llo")
    kit.until(heard(new, b"ab", b"hello"))
    assert old.messages == [b"one", b"UPGRADE"]


def test_replaced_protocol_keeps_unread_bytes_until_taken(kit: Kit) -> None:
    new = Recorder(kit)
    old = Lines(kit, message_received=on(b"UPGRADE", lambda p: p.transport.set_protocol(new)))
    kit.connect(old, first=b"UPGRADE\nnot\nmine")
    kit.until(heard(old, b"UPGRADE"))
    kit.turn()
    assert old.messages == [b"UPGRADE"]
    assert old.take_unread() == b"not\nmine"


def test_message_too_long_aborts_the_connection_and_says_why(kit: Kit) -> None:
    protocol = Lines(kit)
    kit.connect(protocol, first=b"one\n" + b"x" * 102)
    kit.until(lost(protocol))
    assert protocol.messages == [b"one"]
    assert protocol.calls.count("message_too_long") == 1
    assert isinstance(protocol.lost[0], MessageTooLong)
    assert isinstance(protocol.lost[0], ConnectionAbortedError)
    assert protocol.lost[0].limit == 100


def test_a_client_with_too_long_a_message_can_be_told(kit: Kit) -> None:
    def say(protocol: Any, error: MessageTooLong) -> None:
        protocol.send_message(b"at most %d" % error.limit)
        protocol.transport.close()

    protocol = Frames(kit, message_too_long=say)
    _, peer = kit.connect(protocol, first=b"\xff\xff")
    assert kit.in_thread(read_to_end, peer) == b"\0\x0cat most 1000"
    kit.until(lost(protocol))
    assert protocol.lost == [None]


def test_lines_go_on_under_tls(kit: Kit) -> None:
    async def upgrade(protocol: Any) -> None:
        protocol.send_message(b"go ahead")
        over_tls = await kit.loop.start_tls(
            protocol.transport, protocol, anonymous(ssl.PROTOCOL_TLS_SERVER), server_side=True
        )
        protocol.transport = over_tls
        kit.transports.append(over_tls)
        protocol.resume_reading()

    def begin(protocol: Any) -> None:
        protocol.pause_reading()
        assert protocol.take_unread() == b""
        tasks.append(kit.loop.create_task(upgrade(protocol)))

    def talk(peer: socket.socket) -> bytes:
        with anonymous(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(peer) as over_tls:
            over_tls.sendall(b"secret\nwords")
            over_tls.sendall(b"!\n" + b"x" * 200)
            return over_tls.recv(1)

    tasks: list[asyncio.Task[None]] = []
    protocol = Lines(kit, message_received=on(b"STARTTLS", begin))
    _, peer = kit.connect(protocol, tcp_pair, first=b"STARTTLS\n")
    assert kit.in_thread(read_exactly, peer, 9) == b"go ahead\n"
    assert kit.in_thread(talk, peer) == b""
    kit.until(lost(protocol))
    assert protocol.messages == [b"STARTTLS", b"secret", b"words!"]
    assert protocol.calls.count("message_too_long") == 1


def test_unfinished_message_does_not_lose_answers_before_it(kit: Kit) -> None:
    protocol = Lines(kit, message_received=lambda p, message: p.send_message(message))
    _, peer = kit.connect(protocol, first=b"one\nrest")
    peer.shutdown(socket.SHUT_WR)
    assert kit.in_thread(read_to_end, peer) == b"one\n"
    kit.until(lost(protocol))
    assert (protocol.unfinished, protocol.lost) == ([b"rest"], [None])


def test_a_handler_may_keep_its_side_open_after_the_clients_end(kit: Kit) -> None:
    protocol = Lines(kit, messages_ended=lambda _: True)
    _, peer = kit.connect(protocol, first=b"one\n")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "messages_ended" in protocol.calls)
    kit.turn()
    protocol.send_message(b"late")
    protocol.transport.close()
    assert kit.in_thread(read_to_end, peer) == b"late\n"
    kit.until(lost(protocol))


def test_handler_raising_on_held_back_data_is_disconnected(kit: Kit) -> None:
    def fail(_: object) -> None:
        raise ValueError("oops")

    def hear(protocol: Any, message: bytes) -> object:
        return {b"wait": protocol.pause_reading, b"fail": lambda: fail(protocol)}[message]()

    protocol = Lines(kit, message_received=hear)
    kit.connect(protocol, first=b"wait\nfail\nmore\n")
    kit.until(heard(protocol, b"wait"))
    protocol.resume_reading()
    kit.until(lost(protocol))
    assert isinstance(protocol.lost[0], ValueError)
    assert [str(context["exception"]) for context in kit.take_reported()] == ["oops"]
    assert protocol.messages == [b"wait", b"fail"]


def test_held_back_data_is_forgotten_with_the_connection(kit: Kit) -> None:
    protocol = Lines(kit, message_received=on(b"wait", lambda p: p.pause_reading()))
    kit.connect(protocol, first=b"wait\ntwo\n")
    kit.until(heard(protocol, b"wait"))
    protocol.transport.abort()
    protocol.resume_reading()
    kit.until(lost(protocol))
    kit.turn()
    assert protocol.messages == [b"wait"]
    assert protocol.take_unread() == b""


def test_a_subclass_need_not_call_the_bases_init(kit: Kit) -> None:
    class Counter(LineProtocol):
        def __init__(self) -> None:
            self.count = 0

        def message_received(self, message: bytes) -> None:
            self.count += 1
            self.send_message(b"%d" % self.count)

    _, peer = kit.connect(Counter(), first=b"a\nb\n")
    assert kit.in_thread(read_exactly, peer, 4) == b"1\n2\n"
    assert isinstance(Counter(), asyncio.Protocol)


def lines(count: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(count))


def test_many_messages_of_one_read_let_others_have_their_turn(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.framing.protocols.TURN", 0.0)
    heard_of: list[str] = []
    many = Lines(kit, message_received=lambda *_: heard_of.append("many"))
    one = Lines(kit, message_received=lambda *_: heard_of.append("one"))
    _, peer = kit.connect(one)
    kit.connect(many, first=lines(1000))
    peer.sendall(b"line\n")
    kit.until(lambda: len(many.messages) == 1000)
    assert heard_of.index("one") < 100
    assert many.messages == lines(1000).split()
    assert many.transport.is_reading()


@pytest.mark.parametrize("end", ["close", "abort", "pause_reading"])
def test_many_messages_stop_when_told_to(kit: Kit, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("forkd.framing.protocols.TURN", 0.0)
    protocol = Lines(
        kit, message_received=on(b"50", lambda p: getattr(p.transport if end != "pause_reading" else p, end)())
    )
    kit.connect(protocol, first=lines(100))
    kit.until(lambda: len(protocol.messages) == 51)
    kit.turn()
    assert protocol.messages == lines(51).split()
    if end == "pause_reading":
        protocol.resume_reading()
        kit.until(lambda: len(protocol.messages) == 100)


def test_end_of_file_comes_behind_many_messages(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.framing.protocols.TURN", 0.0)
    protocol = Lines(kit)
    _, peer = kit.connect(protocol, first=lines(100) + b"rest")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lost(protocol))
    assert protocol.messages == lines(100).split()
    assert (protocol.unfinished, protocol.lost) == ([b"rest"], [None])


def test_protocol_that_takes_over_amid_many_messages_reads_on(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.framing.protocols.TURN", 0.0)
    successor = Recorder(kit)
    protocol = Lines(kit, message_received=on(b"50", lambda p: p.transport.set_protocol(successor)))
    _, peer = kit.connect(protocol, first=lines(100))
    kit.until(lambda: len(protocol.messages) == 51)
    assert protocol.take_unread().split() == lines(100).split()[51:]
    peer.sendall(b"more")
    kit.until(lambda: successor.received == b"more")
    kit.turn()
    assert len(protocol.messages) == 51


def test_handlers_own_pause_of_its_transport_outlasts_a_turn(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.framing.protocols.TURN", 0.0)
    protocol = Lines(kit, message_received=on(b"0", lambda p: p.transport.pause_reading()))
    _, peer = kit.connect(protocol, first=lines(100))
    kit.until(lambda: len(protocol.messages) == 100)
    peer.sendall(b"more\n")
    kit.turn()
    assert not protocol.transport.is_reading()
    protocol.transport.resume_reading()
    kit.until(lambda: protocol.messages[-1] == b"more")
