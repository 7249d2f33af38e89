"""The examples of docs/tls.md, run as they stand there, on other ports and with certificates of the tests' own."""

from __future__ import annotations

import re
import ssl

from tests.support.certificates import Authority
from tests.support.daemon import Harness
from tests.support.paths import CHECKOUT
from tests.support.tls_client import TlsClient


def said(harness: Harness, authority: Authority, address: str, words: bytes) -> bytes:
    """All that is answered to these words."""
    client = TlsClient(harness.connect(address), ssl.create_default_context(cafile=authority.cert))
    client.send(words)
    client.say_end()
    return client.rest()


def test_documented_listeners_serve_as_they_stand(harness: Harness) -> None:
    page = (CHECKOUT / "docs/tls.md").read_text()
    authority = Authority(harness.directory)
    authority.issue("shout", "localhost")
    (handler,) = re.findall(
        r"```python\n((?:# shout.py\n)?import.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL
    )
    (harness.directory / "shout.py").write_text(handler)
    listeners = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if text.startswith("listen:\n")]
    settings = "listen:\n" + "".join(text.removeprefix("listen:\n") for text in listeners)
    settings = re.sub(r"0\.0\.0\.0:\d+", "127.0.0.1:0", settings).replace("/etc/forkd/tls", str(harness.directory))
    file = harness.directory / "tested.yaml"
    file.write_text(settings)
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    shout, program = (str(one["address"]) for one in daemon.status()["listeners"])
    assert said(harness, authority, program, b"b\na\n") == b"TLSv1.3 to localhost\na\nb\n"
    assert said(harness, authority, shout, b"hello") == b"HELLO"
