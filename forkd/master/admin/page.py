"""The page for people, at `/`: made by a browser of what `/status.json` has."""

from __future__ import annotations

HTML = "text/html; charset=utf-8"

#: It loads nothing but what this daemon itself tells.
POLICY = b"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

BODY = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>forkd</title>
<ul>
<li><a href="live">live</a>
<li><a href="ready">ready</a>
<li><a href="metrics">metrics</a>
<li><a href="status.json">status.json</a>
</ul>
"""
