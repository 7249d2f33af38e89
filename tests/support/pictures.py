"""The pictures of docs/pictures, of an example daemon, so that they are the same wherever they are made:

    python -m tests.support.pictures DIRECTORY

The status page is the daemon's own, in a real browser whose clock stands still. Of `forkd top` it is the lines, with a
page around them that looks as a terminal does.
"""

from __future__ import annotations

import base64
import html
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from forkd.cli.top import Snapshot, View, picture
from forkd.master.admin.page import BODY
from tests.support import example_daemon
from tests.support.browser import Browser, browser

_WIDTH = 960
_COLUMNS, _LINES = 104, 20  # of the terminal

_TERMINAL = """<!doctype html><meta charset="utf-8"><title>top</title><style>
body { margin: 0; padding: 14px; background: #12161c; color: #e4e9ef; font: 14px/19px "DejaVu Sans Mono", monospace }
pre { margin: 0; font: inherit }
.head { font-weight: bold } .good { color: #4cc38a } .bad { color: #ff7a7f; font-weight: bold }
.chosen { background: #e4e9ef; color: #12161c } .keys { color: #98a4b3 }
</style><pre>%s</pre>"""


def make(directory: Path) -> list[str]:
    """Makes all of them in a directory; what there is to be read on each."""
    pages = {
        "/": BODY,
        "/top": _terminal().encode(),
        "/status.json": json.dumps(example_daemon.status()).encode(),
        "/history.json": json.dumps(example_daemon.history()).encode(),
        "/clients.json": json.dumps(example_daemon.clients()).encode(),
    }
    with tempfile.TemporaryDirectory() as files, _served(pages) as where, browser(Path(files)) as tab:
        clock = f"Date.now = () => {example_daemon.NOW * 1000:.0f}"
        tab.tell("Page.addScriptToEvaluateOnNewDocument", source=clock)
        tab.tell("Emulation.setTimezoneOverride", timezoneId="UTC")
        tab.tell("Emulation.setLocaleOverride", locale="en-GB")
        texts = [_draw(tab, where, r"Clients by age .* established", directory / "page-light.png", dark=False)]
        texts.append(_draw(tab, where, r"Clients by age .* established", directory / "page-dark.png", dark=True))
        texts.append(_draw(tab, f"{where}top", "q quit", directory / "top.png", dark=True))
        assert tab.complaints == []
    return texts


def _draw(tab: Browser, address: str, awaited: str, file: Path, *, dark: bool) -> str:
    """Makes one, of the whole page, when this is to be read there; all that is."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    tab.tell("Emulation.setEmulatedMedia", features=[scheme])
    tab.tell("Emulation.setDeviceMetricsOverride", width=_WIDTH, height=300, deviceScaleFactor=1, mobile=False)
    tab.tell("Page.navigate", url=address)
    text = tab.wait_text(awaited)
    height = tab.run("document.documentElement.scrollHeight")
    tab.tell("Emulation.setDeviceMetricsOverride", width=_WIDTH, height=height, deviceScaleFactor=1, mobile=False)
    file.write_bytes(base64.b64decode(tab.tell("Page.captureScreenshot", format="png")["data"]))
    return text


def _terminal() -> str:
    status = example_daemon.status()
    rates = {one["pid"]: 7.0 + one["slot"] / 5 for one in status["workers"]}
    sample = Snapshot(example_daemon.NOW, status, {**rates, 0: sum(rates.values())})
    with _utc():
        lines = picture(sample, View(chosen=status["workers"][2]["pid"]), _COLUMNS, _LINES)
    return _TERMINAL % "\n".join(f'<span class="{one.look}">{html.escape(one.text)}</span>' for one in lines)


@contextmanager
def _utc() -> Iterator[None]:
    """Has local times be those of UTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@contextmanager
def _served(pages: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a server of these pages."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path, b"")
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if self.path.endswith(".json") else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """It says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
