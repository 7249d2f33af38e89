"""Users and groups by name or number, as the settings have them. Every function raises ValueError with a sentence."""

from __future__ import annotations

import grp
import pwd

#: The largest number of a user or group: (uid_t) -1 means "leave it" (setresuid(2), chown(2)).
LARGEST = 0xFFFFFFFE


def find_user(text: str) -> tuple[int, int | None]:
    """A user's number, and that of its primary group; None for a number that this machine has no user of."""
    number = _number(text)
    try:
        entry = pwd.getpwnam(text) if number is None else pwd.getpwuid(number)
    except (KeyError, UnicodeError):
        if number is None:
            raise ValueError(f"there is no user {text!r} on this machine") from None
        return number, None
    return entry.pw_uid, entry.pw_gid


def find_group(text: str) -> int:
    """A group's number."""
    number = _number(text)
    if number is not None:
        return number
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, UnicodeError):
        raise ValueError(f"there is no group {text!r} on this machine") from None


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > 10 or int(text) > LARGEST:
        raise ValueError(f"{text[:20]} is no user's or group's number; they end at {LARGEST}")
    return int(text)
