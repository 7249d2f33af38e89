"""The page for people, at `/`: made by a browser of what `/status.json`, `/history.json` and `/clients.json` have.

It is one file, `page.html`, with its style and its script.
"""

from __future__ import annotations

from importlib.resources import files

HTML = "text/html; charset=utf-8"

#: It loads nothing but what this daemon itself tells.
POLICY = (
    b"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

BODY = files("forkd.master.admin").joinpath("page.html").read_bytes()
