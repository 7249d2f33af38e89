"""Many scrapes and slow readers: the master sees to its workers all the same."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import CHECKOUT

#: Milliseconds within which a dead worker is reaped; on a machine that is busy with other things, twice as long as it
#: takes without a scrape.
MOST = 50.0


@pytest.mark.soak
def test_scrapes_and_slow_readers_do_not_hold_up_the_master() -> None:
    command = [sys.executable, str(CHECKOUT / "bench/admin.py"), "--seconds=10", "--connections=0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    print(result.stdout)
    alone, beside = (float(one) for one in re.findall(r" max +([\d.]+) ms", result.stdout))
    assert beside < max(MOST, 2 * alone)
