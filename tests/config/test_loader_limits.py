"""Files that are small and stand for much: what they are read in, and what is said of them."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from forkd.config.loader import MAX_FILE_SIZE, read_settings
from tests.support.forked import run_in_child

MANY = 3000
NETWORKS = f"x-n: &n [{','.join(['10.0.0.0/8'] * MANY)}]\n"
WRONG = f"x-n: &n [{','.join(['x'] * MANY)}]\n"
KEYS = f"x-n: &n {{{', '.join(f'a{number}: 1' for number in range(MANY))}}}\n"
LISTENERS = "listen:\n" + "- {{address: 'tcp://127.0.0.1:0', handler: 'a:b', {}: *n}}\n" * MANY


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NETWORKS + LISTENERS.format(*["allow"] * MANY), "there are over 100000 values, those of aliases counted"),
        (WRONG + LISTENERS.format(*["allow"] * MANY), "there are over 1000 mistakes before this"),
        (KEYS + LISTENERS.format(*["limits"] * MANY), "there are over 1000 mistakes before this"),
        ("".join(f"a{number}: 1\n" for number in range(MANY)), "there are over 1000 mistakes before this"),
    ],
    ids=["values", "wrong values", "wrong keys", "no aliases"],
)
def test_file_that_stands_for_much_is_told_soon(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    before = time.process_time()
    assert any(said in str(problem) for problem in read_settings(path).problems)
    assert time.process_time() - before < 20


LAUGHS = "x-0: &a0 [x]\n" + "".join(f"x-{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen: !!python/object/apply:os.system ['exit']\n", "have no meaning here"),
        (LAUGHS + "listen: *a29\n", "expected settings as `key: value`"),
        ("#" * (10 << 20), f"is over {MAX_FILE_SIZE} bytes"),
        ("[" * (MAX_FILE_SIZE - 1), "is nested too deeply"),
        ("listen: " + "{a: " * 200_000, "is nested too deeply"),
    ],
    ids=["tag", "laughs", "size", "sequences", "mappings"],
)
def test_hostile_file_is_read_in_bounded_memory(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)

    def read() -> list[object]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problems = [str(problem) for problem in read_settings(path).problems]
        return [problems, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]

    problems, kibibytes = run_in_child(read)
    assert any(said in problem for problem in problems)
    assert kibibytes < 64 << 10
