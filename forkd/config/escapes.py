r"""Text with escapes that stands for octets: \r, \n, \t, \0, \\ and \xHH, which is one octet. All else is UTF-8, or
what a command line had that is none.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|[rnt0\\]|.?)", re.DOTALL)
_PLAIN = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}


def parse_escaped(text: str) -> str:
    """The text itself, its escapes checked. Raises ValueError for one that is none, with its place."""
    for found in _ESCAPE.finditer(text):
        if found[1] not in _PLAIN and len(found[1]) < 3:
            raise ValueError(
                f"{text[:80]!r} has no escape {found[0]} (character {found.start() + 1}); there are \\r, \\n, \\t, "
                "\\0, \\\\ and \\xHH with two hexadecimal digits"
            )
    return text


def octets(text: str) -> bytes:
    """What a text that was so checked stands for."""
    data, end = b"", 0
    for found in _ESCAPE.finditer(text):
        data += _plain(text[end : found.start()])
        data += _PLAIN.get(found[1]) or bytes.fromhex(found[1][1:])
        end = found.end()
    return data + _plain(text[end:])


def _plain(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
