"""What README and docs/operating.md tell a newcomer to type works: handlers, settings file, clients, signals."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from forkd import signals
from tests.support.daemon import Harness
from tests.support.paths import CHECKOUT

README = (CHECKOUT / "README.md").read_text()
OPERATING = (CHECKOUT / "docs" / "operating.md").read_text()


def block(language: str, first: str) -> str:
    """The README's code block that has this in it."""
    return str(next(text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if first in text))


@pytest.fixture
def shout(harness: Harness) -> Harness:
    """A directory with the README's handlers in `shout.py`."""
    module = block("python", "class Shout") + block("python", "async def greet")
    (harness.directory / "shout.py").write_text(module)
    return harness


@pytest.mark.parametrize(
    ("handler", "said", "heard"),
    [("shout:Shout", b"hello\n", b"HELLO\n"), ("shout:greet", b"world\n", b"Hello world\n")],
)
@pytest.mark.parametrize("client", [["nc", "-N"], ["socat", "-t", "5", "-"]], ids=["nc", "socat"])
def test_readme_handlers_answer_clients_of_other_makers(
    shout: Harness, handler: str, said: bytes, heard: bytes, client: list[str]
) -> None:
    daemon = shout.daemon(target=handler).run()
    host, port = daemon.address.removeprefix("tcp://").split(":")
    where = [f"tcp:{host}:{port}"] if client[0] == "socat" else [host, port]
    answer = subprocess.run([*client, *where], input=said, capture_output=True, timeout=30, check=True)
    assert answer.stdout == heard


def test_readme_settings_file_is_right(shout: Harness) -> None:
    settings = yaml.safe_load(block("yaml", "workers: 4"))
    file = shout.directory / "shout.yaml"
    daemon = shout.daemon(target=file, listen=(), workers=None)
    for listener in settings["listen"]:
        listener["address"] = re.sub(r":7007$", ":0", listener["address"])
        listener["address"] = listener["address"].replace("/run/forkd/shout/", f"{daemon.run_directory}/")
    settings["python_path"] = [str(shout.directory)]
    file.write_text(yaml.safe_dump(settings))
    for _ in range(2):  # before the run directory is there, and while it serves
        result = daemon.command("check")
        assert (result.returncode, result.stderr) == (0, "")
        daemon.start()
    with shout.connect(f"unix:{daemon.run_directory}/greet.sock") as client:
        client.sendall(b"world\n")
        assert client.recv(20) == b"Hello world\n"


def test_readme_shows_mistakes_as_they_are_told(harness: Harness) -> None:
    file = harness.directory / "shout.yaml"
    file.write_text(block("yaml", "workers: 4").replace("workers", "wokers").replace("30s  ", "30   "))
    result = harness.daemon(target=file, listen=(), workers=None).command("check")
    shown = re.findall(r"/etc/forkd/shout.yaml:.*", README + OPERATING)
    assert len(shown) == 3  # one of them twice: for a check, and for a reload
    for line in shown:
        assert line.replace("/etc/forkd/shout.yaml", str(file)) in result.stderr


def test_readme_shows_what_a_failed_reload_says(shout: Harness) -> None:
    file = shout.directory / "shout.yaml"
    daemon = shout.daemon("shout", target=file, listen=(), workers=None)
    file.write_text("workers: 1\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'shout:Shout'}]\n")
    daemon.start()
    file.write_text(file.read_text().replace("workers", "wokers"))
    daemon.expect("reload: failed, and nothing has changed: ")
    result = daemon.command("reload")
    shown = re.findall(r"^    (forkd: the reload failed.*)$", OPERATING, re.MULTILINE)
    assert [line.replace("/etc/forkd/shout.yaml", str(file)) for line in shown] == result.stderr.splitlines()
    assert result.returncode == 1


def test_readme_lists_every_signal_and_no_other() -> None:
    table = OPERATING.partition("| signal to the master |")[2].partition("\n\n")[0]
    told = {
        name.strip() for names in re.findall(r"^\| ([A-Z0-9, ]+) \|", table, re.MULTILINE) for name in names.split(",")
    }
    assert told | {"CHLD"} == {row.signal.name.removeprefix("SIG") for row in signals.MASTER}
