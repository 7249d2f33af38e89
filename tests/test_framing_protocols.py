"""The framing bases on a transport, forkd's and asyncio's own: pausing, closing, handing over, and the end of file."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest
from contract import MUCH, Calls, Recorder, anonymous, kits, read_exactly, read_to_end, tcp_pair

from forkd.framing import FixedSizeProtocol, LengthPrefixProtocol, LineProtocol, MessageTooLong

kit = kits


class Recording(Calls):
    """Writes down what a framing base calls; its hooks are those of `contract.Calls`."""

    def __init__(self, kit, **hooks):
        super().__init__(kit, **hooks)
        self.messages = []
        self.unfinished = []

    def connection_made(self, transport):
        super().connection_made(transport)
        self.base.connection_made(self, transport)

    def message_received(self, message):
        self.messages.append(message)
        self.called("message_received", message)

    def message_too_long(self, error):
        self.called("message_too_long", error)

    def unfinished_received(self, rest):
        self.unfinished.append(rest)
        self.called("unfinished_received", rest)

    def messages_ended(self):
        return self.called("messages_ended")

    def eof_received(self):
        return self.base.eof_received(self)

    def pause_writing(self):
        self.base.pause_writing(self)
        self.called("pause_writing")

    def resume_writing(self):
        self.base.resume_writing(self)
        self.called("resume_writing")

    def connection_lost(self, error):
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


def heard(protocol, *messages):
    return lambda: protocol.messages == list(messages)


def lost(protocol):
    return lambda: protocol.lost


def on(message, action):
    """A hook that acts upon one message."""
    return lambda protocol, heard: action(protocol) if heard == message else None


@pytest.mark.parametrize(("made", "data"), [(Lines, b"ab\n\ncd\r\n"), (Frames, b"\0\2ab\0\0\0\2cd"), (Pairs, b"abcd")])
def test_messages_come_whole_however_they_were_sent(kit, made, data):
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


def test_a_message_is_sent_in_the_framing_that_it_comes_in(kit):
    protocol = Frames(kit)
    _, peer = kit.connect(protocol)
    protocol.send_message(b"hello")
    assert kit.in_thread(read_exactly, peer, 7) == b"\0\5hello"
    with pytest.raises(ValueError, match="at most 1000"):
        protocol.send_message(bytes(1001))


@pytest.mark.parametrize("end", ["close", "abort"])
def test_after_a_close_no_message_of_the_same_read_is_delivered(kit, end):
    protocol = Lines(kit, message_received=on(b"quit", lambda p: getattr(p.transport, end)()))
    kit.connect(protocol, first=b"one\nquit\ntwo\n")
    kit.until(lost(protocol))
    assert protocol.messages == [b"one", b"quit"]


def test_a_pause_holds_back_what_was_read_and_a_resumption_lets_it_come(kit):
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


def test_a_pause_and_a_resumption_within_one_message_lose_nothing(kit):
    protocol = Lines(kit, message_received=on(b"wait", lambda p: (p.pause_reading(), p.resume_reading())))
    _, peer = kit.connect(protocol, first=b"wait\ntwo\n")
    kit.until(heard(protocol, b"wait", b"two"))
    peer.sendall(b"three\n")
    kit.until(heard(protocol, b"wait", b"two", b"three"))
    assert protocol.transport.is_reading()


def test_the_end_of_file_waits_behind_messages_that_are_held_back(kit):
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
def test_an_end_of_file_that_comes_while_reading_is_paused_is_delivered_in_its_turn(kit, stays):
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


def test_a_client_that_does_not_read_its_answers_is_not_heard_meanwhile(kit):
    protocol = Lines(kit, message_received=on(b"much", lambda p: p.transport.write(bytes(MUCH))))
    _, peer = kit.connect(protocol, first=b"much\ntwo\n")
    kit.until(lambda: "pause_writing" in protocol.calls)
    kit.turn()
    assert protocol.messages == [b"much"]
    kit.in_thread(read_exactly, peer, MUCH)
    kit.until(heard(protocol, b"much", b"two"))
    peer.sendall(b"three\n")
    kit.until(heard(protocol, b"much", b"two", b"three"))


def test_a_client_that_reads_again_does_not_end_the_handlers_own_pause(kit):
    def answer(protocol):
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


def test_another_protocol_takes_over_with_what_is_unread(kit):
    def take_over(protocol):
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


def test_a_protocol_that_was_replaced_keeps_what_is_unread_until_it_is_taken(kit):
    new = Recorder(kit)
    old = Lines(kit, message_received=on(b"UPGRADE", lambda p: p.transport.set_protocol(new)))
    kit.connect(old, first=b"UPGRADE\nnot\nmine")
    kit.until(heard(old, b"UPGRADE"))
    kit.turn()
    assert old.messages == [b"UPGRADE"]
    assert old.take_unread() == b"not\nmine"


def test_too_long_a_message_aborts_the_connection_by_default_and_says_why(kit):
    protocol = Lines(kit)
    kit.connect(protocol, first=b"one\n" + b"x" * 102)
    kit.until(lost(protocol))
    assert protocol.messages == [b"one"]
    assert protocol.calls.count("message_too_long") == 1
    assert isinstance(protocol.lost[0], MessageTooLong)
    assert isinstance(protocol.lost[0], ConnectionAbortedError)
    assert protocol.lost[0].limit == 100


def test_a_client_with_too_long_a_message_can_be_told(kit):
    def say(protocol, error):
        protocol.send_message(b"at most %d" % error.limit)
        protocol.transport.close()

    protocol = Frames(kit, message_too_long=say)
    _, peer = kit.connect(protocol, first=b"\xff\xff")
    assert kit.in_thread(read_to_end, peer) == b"\0\x0cat most 1000"
    kit.until(lost(protocol))
    assert protocol.lost == [None]


def test_lines_go_on_under_tls(kit):
    async def upgrade(protocol):
        protocol.send_message(b"go ahead")
        over_tls = await kit.loop.start_tls(
            protocol.transport, protocol, anonymous(ssl.PROTOCOL_TLS_SERVER), server_side=True
        )
        protocol.transport = over_tls
        kit.transports.append(over_tls)
        protocol.resume_reading()

    def begin(protocol):
        protocol.pause_reading()
        assert protocol.take_unread() == b""
        tasks.append(kit.loop.create_task(upgrade(protocol)))

    def talk(peer):
        with anonymous(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(peer) as over_tls:
            over_tls.sendall(b"secret\nwords")
            over_tls.sendall(b"!\n" + b"x" * 200)
            return over_tls.recv(1)

    tasks = []
    protocol = Lines(kit, message_received=on(b"STARTTLS", begin))
    _, peer = kit.connect(protocol, tcp_pair, first=b"STARTTLS\n")
    assert kit.in_thread(read_exactly, peer, 9) == b"go ahead\n"
    assert kit.in_thread(talk, peer) == b""
    kit.until(lost(protocol))
    assert protocol.messages == [b"STARTTLS", b"secret", b"words!"]
    assert protocol.calls.count("message_too_long") == 1


def test_an_unfinished_message_does_not_cost_the_answers_before_it(kit):
    protocol = Lines(kit, message_received=lambda p, message: p.send_message(message))
    _, peer = kit.connect(protocol, first=b"one\nrest")
    peer.shutdown(socket.SHUT_WR)
    assert kit.in_thread(read_to_end, peer) == b"one\n"
    kit.until(lost(protocol))
    assert (protocol.unfinished, protocol.lost) == ([b"rest"], [None])


def test_a_handler_may_keep_its_side_open_after_the_clients_end(kit):
    protocol = Lines(kit, messages_ended=lambda _: True)
    _, peer = kit.connect(protocol, first=b"one\n")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "messages_ended" in protocol.calls)
    kit.turn()
    protocol.send_message(b"late")
    protocol.transport.close()
    assert kit.in_thread(read_to_end, peer) == b"late\n"
    kit.until(lost(protocol))


def test_a_handler_that_raises_on_what_was_held_back_loses_its_connection(kit):
    def fail(_):
        raise ValueError("oops")

    def hear(protocol, message):
        return {b"wait": protocol.pause_reading, b"fail": lambda: fail(protocol)}[message]()

    protocol = Lines(kit, message_received=hear)
    kit.connect(protocol, first=b"wait\nfail\nmore\n")
    kit.until(heard(protocol, b"wait"))
    protocol.resume_reading()
    kit.until(lost(protocol))
    assert isinstance(protocol.lost[0], ValueError)
    assert [str(context["exception"]) for context in kit.take_reported()] == ["oops"]
    assert protocol.messages == [b"wait", b"fail"]


def test_what_is_held_back_is_forgotten_with_the_connection(kit):
    protocol = Lines(kit, message_received=on(b"wait", lambda p: p.pause_reading()))
    kit.connect(protocol, first=b"wait\ntwo\n")
    kit.until(heard(protocol, b"wait"))
    protocol.transport.abort()
    protocol.resume_reading()
    kit.until(lost(protocol))
    kit.turn()
    assert protocol.messages == [b"wait"]
    assert protocol.take_unread() == b""


def test_a_subclass_need_not_call_the_bases_init(kit):
    class Counter(LineProtocol):
        def __init__(self):
            self.count = 0

        def message_received(self, message):
            self.count += 1
            self.send_message(b"%d" % self.count)

    _, peer = kit.connect(Counter(), first=b"a\nb\n")
    assert kit.in_thread(read_exactly, peer, 4) == b"1\n2\n"
    assert isinstance(Counter(), asyncio.Protocol)
