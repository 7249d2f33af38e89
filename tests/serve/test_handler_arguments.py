"""Arguments and factories in running daemons, and of one client."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.clients import dial, echoes, read
from tests.support.daemon import Harness
from tests.support.once_process import OnceProcess

SETTINGS = """\
name: tested
listen:
  - {address: "tcp://127.0.0.1:0", handler: "forms:WithWord", args: {word: "5", prefix: os:sep}}
  - {address: "unix:@ADDRESS", handler: "forms:make_rooms", factory: true, args: {word: made}}
"""


def test_arguments_and_factories_reach_each_connection(harness: Harness) -> None:
    file = harness.directory / "tested.yaml"
    address = f"@{harness.directory}"
    file.write_text(SETTINGS.replace("@ADDRESS", address))
    daemon = harness.daemon(target=file, listen=()).start()
    for listener in daemon.status()["listeners"]:
        word = b"made\n" if listener["address"].startswith("unix:") else b"/5\n"
        client = harness.connect(str(listener["address"]))
        assert read(client, len(word)) == word
        assert echoes(client)
    file.write_text(file.read_text().replace("made", "new"))
    assert "listen" in (told := daemon.command("reload", "--diff").stdout)
    assert "args: {word: made} -> {word: new}" in told


def test_factory_that_fails_is_a_failed_start(harness: Harness) -> None:
    daemon = harness.daemon(target="forms:make_rooms", settings=("listen.factory=true",))
    daemon.expect("missing a required argument: 'word'")
    result = daemon.command("start")
    assert result.returncode == 1
    assert "forms:make_rooms: a factory is called with args and nothing else, but: missing a required" in result.stderr


def test_factory_makes_the_handler_of_one_client(single: Callable[..., OnceProcess]) -> None:
    options = ("--set", "listen.factory=true", "--set", "listen.args.word=once")
    one = single("forms:make_rooms", *options).start()
    with dial(one.address) as client:
        assert read(client, 5) == b"once\n"
        assert echoes(client)
    assert one.status() == 0
