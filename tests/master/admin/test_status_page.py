"""The status page in a real browser: what it shows, that it follows, how it looks, and that it asks nobody else."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from tests.support.admin import service_of
from tests.support.browser import Browser, browser
from tests.support.clients import echoes
from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually

#: What a handler says of itself with its last words, and might do to a page.
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"

TALKER = f"""
import os, sys
from forkd.builtin import Echo

class Talker(Echo):
    def data_received(self, data):
        if data == b"die":
            print({HOSTILE!r}, file=sys.stderr, flush=True)
            os._exit(9)
        super().data_received(data)
"""


def shown(harness: Harness, directory: Path) -> Daemon:
    """A daemon that has a page, and room for four clients at a time."""
    (directory / "talker.py").write_text(TALKER)
    settings = ("admin.address=tcp://127.0.0.1:0", "listen.limits.connections=4")
    return harness.daemon(target="talker:Talker", settings=settings).start()


def page_of(daemon: Daemon) -> str:
    return f"http://{service_of(daemon).removeprefix('tcp://')}/"


def look(tab: Browser, *, width: int, dark: bool) -> tuple[str, int]:
    """The page's background on such a screen, and how many pixels it is wide."""
    tab.tell("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    tab.tell("Emulation.setEmulatedMedia", features=[scheme])
    return tab.run("getComputedStyle(document.body).backgroundColor"), tab.run("document.scrollingElement.scrollWidth")


def test_page_shows_the_daemon_and_follows_it(harness: Harness, tmp_path: Path) -> None:
    daemon = shown(harness, tmp_path)
    (listener,) = daemon.status()["listeners"]
    clients = [harness.connect(daemon) for _ in range(2)]
    assert all(map(echoes, clients))
    with browser(tmp_path) as tab:
        tab.tell("Page.navigate", url=page_of(daemon))
        text = tab.wait_text(r"connections 2 of 4 ")
        assert f"{listener['address']} talker:Talker" in text
        assert text.startswith("tested running · ready 2 of 2 workers")
        assert f"127.0.0.1:{clients[0].getsockname()[1]} {listener['address']}" in text
        assert "Refused and ended none Workers that have ended none" in text
        assert "Reloads and upgrades none since the start; generation 1 serves" in text
        # The memory of each worker: they are asked for it one after another, as far as there is time.
        eventually(lambda: len(re.findall(r" ms \d+\.\d MiB", tab.text())) == 2, what="each worker's memory")

        clients += [harness.connect(daemon) for _ in range(2)]
        assert all(map(echoes, clients))
        tab.wait_text(r"connections 4 of 4, full")
        assert tab.run("document.querySelector('.bar i.bad').style.width") == "100%"
        line = "document.querySelector('.listener svg.spark').getAttribute('aria-label')"
        eventually(lambda: tab.run(line) == "connections: 4, at most 4", what="the line of the last minutes")

        daemon.expect("has ended: exit status 9")
        clients[0].sendall(b"die")
        tab.wait_text(rf"unexpected worker \d \(pid \d+\) exit status 9 .*{HOSTILE}")
        assert tab.run("document.title").startswith("tested ")

        (tmp_path / "talker.py").write_text("nothing")
        daemon.expect("could not boot: talker:Talker", "reload: failed")
        assert daemon.command("reload").returncode == 1
        tab.wait_text(r"failed .*generation 1 serves on .*name 'nothing' is not defined .*0 succeeded, 1 failed")

        (tmp_path / "talker.py").write_text(TALKER)
        assert daemon.command("reload").returncode == 0
        text = tab.wait_text(
            r"Reloads and upgrades succeeded .*; generation 2 serves since 1 succeeded, 1 failed since"
        )
        assert "is not defined" not in text.partition("Reloads")[2]

        light, width = look(tab, width=1000, dark=False)
        dark, narrow = look(tab, width=375, dark=True)
        assert (width, narrow) == (1000, 375)
        assert light == "rgb(246, 247, 249)" != dark
        assert {url.rpartition("/")[0] + "/" for url in tab.asked if not url.startswith("data:")} == {page_of(daemon)}
        assert tab.complaints == []


def test_page_says_that_the_daemon_does_not_answer(harness: Harness, tmp_path: Path) -> None:
    daemon = shown(harness, tmp_path)
    pid = daemon.pid
    with browser(tmp_path) as tab:
        tab.tell("Page.navigate", url=page_of(daemon))
        tab.wait_text("2 of 2 workers")
        os.kill(pid, signal.SIGSTOP)
        try:
            assert "2 of 2 workers" in tab.wait_text(r"No answer for \d")
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: "No answer" not in tab.text(), what="its answer")


def test_page_of_a_drained_daemon_says_so(harness: Harness, tmp_path: Path) -> None:
    daemon = shown(harness, tmp_path)
    assert daemon.command("drain").returncode == 0
    with browser(tmp_path) as tab:
        tab.tell("Page.navigate", url=page_of(daemon))
        tab.wait_text("tested drained · not ready .* the daemon is drained, by forkd drain")
