"""A real browser, without a window: Debian's Chromium, told what to do by its DevTools protocol over a WebSocket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.needs import needs_package, needs_program
from tests.support.processes import DEADLINE, eventually

_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-breakpad", "--disable-crash-reporter",
    "--remote-debugging-port=0",
)  # fmt: skip


class Browser:
    """One tab of it.

    Attributes:
        asked: the addresses of what the tab has asked the network for.
        complaints: exceptions of scripts, and errors on the console.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._session, self._number = socket, "", 0
        self.asked: list[str] = []
        self.complaints: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Has something done; what it returns."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters, **session}))
        while True:
            message = json.loads(self._socket.recv(DEADLINE))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._take(message)

    def _take(self, event: dict[str, Any]) -> None:
        match event.get("method"), event.get("params"):
            case "Network.requestWillBeSent", {"request": {"url": url}}:
                self.asked.append(url)
            case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                self.complaints.append(str(details))
            case "Log.entryAdded", {"entry": {"level": "error", "text": text}}:
                self.complaints.append(text)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the tab."""
        return self.tell("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        """What a reader of the page sees, each run of white space as one space."""
        return re.sub(r"\s+", " ", self.run("document.body ? document.body.innerText : ''"))

    def wait_text(self, pattern: str) -> str:
        """Waits until there is this in the text; the text then."""
        eventually(lambda: re.search(pattern, self.text()), what=f"{pattern} on the page")
        return self.text()


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A browser whose files are in this directory."""
    needs_program("chromium")
    needs_package("websockets")
    from websockets.sync.client import connect  # noqa: PLC0415 (of the extra `interop`)

    log = directory / "chromium.log"
    command = ["chromium", *_ARGUMENTS, f"--user-data-dir={directory / 'chromium'}", "about:blank"]
    with log.open("wb") as errors:
        environment = {**os.environ, "TMPDIR": str(directory)}
        process = subprocess.Popen(command, stderr=errors, stdout=errors, env=environment, process_group=0)
    try:
        address = eventually(lambda: re.search(r"listening on (ws://\S+)", log.read_text()), what="the browser's start")
        with connect(address[1], max_size=None) as socket:
            tab = Browser(socket)
            yield tab
            tab._session = ""
            tab.tell("Browser.close")
        process.wait(DEADLINE)
    finally:
        # Also what it has started: its processes outlive it by a moment, and are this process's to reap then.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-process.pid, 0)
