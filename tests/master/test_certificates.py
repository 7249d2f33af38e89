"""The certificates of a generation: when their files are tried, what is kept of it, and when it is told."""

from __future__ import annotations

import os
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener, Tls
from forkd.master.certificates import PATIENCE, Certificates, Refused, Renewal, due_warnings
from forkd.messages import CertificatesEvent
from forkd.system.tls_files import EXPIRES_SOON, pack, read_files, unpack

DAY = 86_400.0


class Watched:
    """Two files of a listener, and those who look at them; as workers do, the test answers."""

    def __init__(self, directory: Path) -> None:
        self.cert, self.key = directory / "cert", directory / "key"
        self.write("1", "1")
        plain = Listener(address=parse_address("tcp://127.0.0.1:1"), handler="a:b")
        listener = Listener(address=plain.address, handler="a:b", tls=Tls(cert=self.cert, key=self.key))
        self.certificates = Certificates([plain, listener, listener])
        self.now = 100.0

    def write(self, cert: str | None = None, key: str | None = None) -> None:
        for file, text in ((self.cert, cert), (self.key, key)):
            if text is not None:  # another file each time: two writes may have the same time of change
                new = file.with_suffix(".new")
                new.write_text(text)
                new.replace(file)

    def look(self, later: float = 1.0) -> list[Renewal | Refused]:
        self.now += later
        return list(self.certificates.look(self.now))

    def tries(self) -> Renewal:
        (found,) = self.look()
        assert isinstance(found, Renewal)
        return found

    def answer(self, number: int, refusal: str = "", **says: Any) -> float | None:
        told = [] if refusal else [{"file": str(self.cert), "names": ["a.org"], "expires": 5.0, **says}]
        return self.certificates.take_event(CertificatesEvent(1, told, number, refusal), self.now)

    @property
    def held(self) -> tuple[str, str]:
        contents = self.certificates.contents
        return contents[str(self.cert)].decode(), contents[str(self.key)].decode()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_changed_files_are_tried_and_kept_when_they_are_taken(watched: Watched) -> None:
    watched.answer(0)
    assert watched.look() == []
    watched.write("2", "2")
    tried = watched.tries()
    assert (tried.place, unpack(pack(tried.contents))) == (1, {str(watched.cert): b"2", str(watched.key): b"2"})
    assert watched.held == ("1", "1")
    assert watched.look() == []
    assert watched.answer(tried.number, names=["b.org", 7]) == watched.now - 1
    assert watched.held == ("2", "2")
    told = [{"file": str(watched.cert), "names": ["b.org"], "expires": 5.0}]
    assert [watched.certificates.told_of(place) for place in range(3)] == [[], told, told]
    assert watched.answer(tried.number) is None  # of the other workers
    assert watched.answer(0) is None  # of one that begins
    assert watched.certificates.told_of(1) == told


@pytest.mark.parametrize("expires", [nan, inf, 1e300, 10**400, -(10**400), "5", None], ids=lambda one: str(one)[:5])
def test_claim_of_an_end_that_cannot_be_is_not_kept(watched: Watched, expires: object) -> None:
    watched.answer(0, expires=expires)
    assert watched.certificates.told_of(1) == []


def test_refusal_is_told_once_and_changes_nothing(watched: Watched) -> None:
    watched.answer(0)
    watched.write("broken")
    tried = watched.tries()
    assert watched.answer(tried.number, "it is broken") is None
    assert watched.answer(tried.number, "says the other worker") is None
    assert watched.look() == []
    assert watched.look(PATIENCE) == [Refused(1, "it is broken")]
    assert watched.look(1000) == []
    assert watched.held == ("1", "1")
    assert len(watched.certificates.told_of(1)) == 1
    os.utime(watched.cert)  # it is tried again, whatever has changed
    assert watched.answer(watched.tries().number) is not None
    assert watched.held == ("broken", "1")


def test_pair_that_is_half_written_is_tried_again_untold(watched: Watched) -> None:
    watched.write(cert="2")
    watched.answer(watched.tries().number, "the key is another certificate's")
    watched.write(key="2")
    assert watched.answer(watched.tries().number) is not None
    assert watched.look(PATIENCE) == []
    assert watched.held == ("2", "2")


def test_file_that_is_gone_for_a_moment_is_not_told(watched: Watched) -> None:
    watched.cert.unlink()
    assert watched.look() == []
    watched.write("1")
    assert watched.look() == []  # it is as before
    watched.cert.unlink()
    assert watched.look() == []
    assert watched.look(PATIENCE) == [Refused(1, f"{watched.cert}: No such file or directory")]


def test_renewal_that_no_worker_answers_is_tried_again(watched: Watched) -> None:
    watched.write("2", "2")
    first = watched.tries()
    assert watched.look(20) == []
    second = watched.tries()
    assert second.number == first.number + 1
    assert watched.answer(first.number) is None
    assert watched.answer(second.number) is not None


def test_next_image_asks_what_the_workers_have(watched: Watched) -> None:
    watched.certificates.ask_again()
    assert watched.answer(watched.tries().number) is not None
    assert len(watched.certificates.told_of(1)) == 1


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_files([tmp_path / "pipe"]) == {}


def test_expiry_is_warned_of_once_a_day(watched: Watched) -> None:
    warned, end = dict[str, float](), 1_000 * DAY
    watched.answer(0, expires=end)

    def due(now: float) -> list[str]:
        return [warning for _, warning in due_warnings(watched.certificates, warned, now)]

    soon = end - EXPIRES_SOON
    assert due(soon - 1) == []
    assert due(soon + 1) == [f"certificate {watched.cert} ends in 21 days"]
    assert due(soon + DAY) == []
    assert due(soon + DAY + 1) == [f"certificate {watched.cert} ends in 20 days"]
    assert due(end + 2 * DAY) == [f"certificate {watched.cert} has ended 2 days ago"]
    watched.write("2", "2")
    watched.answer(watched.tries().number, expires=end + 90 * DAY)
    assert due(end + 4 * DAY) == []
    assert due(end + 80 * DAY) == [f"certificate {watched.cert} ends in 10 days"]
