"""The tests' own helper that skips what a machine can't do, and fails in CI instead."""

from __future__ import annotations

import pytest

from tests.support.needs import needs_program


def test_missing_program_skips_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs the program nobody-has-this"):
        needs_program("nobody-has-this")


def test_missing_program_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI has to have the program nobody-has-this"):
        needs_program("nobody-has-this")
