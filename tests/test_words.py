"""Words of earlier versions of forkd, which a newcomer would have to look up: none of them comes back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

#: Each first letter in brackets, so that this file has none of them. They are looked for inside of words too.
WORDS = re.compile(
    r"[w]hom|[w]hoever|[a]new|[h]eed|[f]orsak|\b[h]eir|[h]erald|[v]igil|[o]bituar|\b[b]ury|[l]uck", re.IGNORECASE
)
FILES = sorted(
    [
        CHECKOUT / "README.md",
        *(CHECKOUT / "docs").rglob("*.md"),
        *(path for name in ("forkd", "tests") for path in (CHECKOUT / name).rglob("*.py")),
    ]
)


@pytest.mark.parametrize("path", [str(path.relative_to(CHECKOUT)) for path in FILES])
def test_file_has_no_word_that_is_not_used_any_more(path: str) -> None:
    lines = (CHECKOUT / Path(path)).read_text().splitlines()
    assert [line for line in lines if WORDS.search(line)] == []
