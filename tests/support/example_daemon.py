"""A daemon that is not there, for pictures: what one would tell at a certain moment, the same each time.

Its addresses are those of documentation (RFC 5737, RFC 3849). `test_pictures` looks whether a real daemon tells the
same keys.
"""

from __future__ import annotations

from math import cos, exp, sin
from typing import Any

from forkd import __version__

#: The moment, since the epoch: 2026-07-01 12:00:00 UTC.
NOW = 1782907200.0

_SAMPLES, _STEP = 121, 5.0
_SINCE_RELOAD, _SINCE_DEATH = 187_000.0, 300.0
_LISTENERS: tuple[tuple[str, str, int, int | None, int, float], ...] = (
    # address, handler, connections, their limit, those that wait, new ones a second
    ("tcp://0.0.0.0:7007", "chat:Chat", 168, 200, 0, 21.6),
    ("tcp://[::]:7443", "chat:Chat", 96, 100, 12, 9.2),
    ("unix:/run/forkd/chat/local.sock", "chat:local", 3, None, 0, 0.2),
)
_CLIENTS = (
    # address, listener, age, idle, bytes in and out
    ("198.51.100.23:50514", 0, 93_784.0, 0.4, 48_233_411, 912_004_377),
    ("203.0.113.77:41236", 0, 71_022.0, 12.0, 6_120_530, 88_211_904),
    ("[2001:db8:40::19]:60122", 1, 52_310.0, 2.1, 1_904_110, 23_007_211),
    ("198.51.100.140:33870", 0, 31_877.0, 48.0, 733_904, 9_310_233),
    ("", 2, 18_004.0, 1.0, 90_112, 1_204_331),
    ("[2001:db8:7::a2]:44010", 1, 9_450.0, 31.0, 41_088, 802_117),
    ("203.0.113.9:58214", 0, 4_312.0, 0.2, 12_401, 99_120),
)


def status() -> dict[str, Any]:
    """As `/status.json`, and the clients of listeners as `forkd status` has them."""
    workers = [
        _worker(1, 4711, 68, _SINCE_RELOAD, 41_233, 16.2),
        _worker(2, 4712, 66, _SINCE_RELOAD, 40_967, 15.7),
        _worker(3, 5120, 67, _SINCE_DEATH, 2_310, 14.1),
        _worker(4, 4714, 66, _SINCE_RELOAD, 41_102, 16.0),
    ]
    return {
        "name": "chat",
        "pid": 4709,
        "version": __version__,
        "hot_path": "compiled",
        "state": "running",
        "reason": "",
        "not_ready": "",
        "drained": False,
        "change": "",
        "generation": 7,
        "started": NOW - 19 * 86_400,
        "wanted": 4,
        "serving": 4,
        "workers": workers,
        "listeners": [_listener(*one) for one in _LISTENERS],
        "totals": {
            "accepted": 1_204_377,
            "errors": 41,
            "refused": {"full": 212, "per_ip": 37, "rate": 0},
            "ended": {"first_byte": 845, "idle": 3_190, "write": 6, "lifetime": 0},
        },
        "deaths": [_death()],
        "last_failure": {
            "time": NOW - 95,
            "text": "reload failed: /etc/forkd/chat.yaml:11:16: drain_timeout: '30' has no unit; did you mean 30s?",
        },
        "last_success": {"time": NOW - _SINCE_RELOAD, "generation": 7},
        "change_counts": {"success": 6, "failure": 1},
    }


def history() -> dict[str, Any]:
    """As `/history.json`."""
    ages = [_STEP * (_SAMPLES - 1 - place) for place in range(_SAMPLES)]
    shape = [_wave(age) for age in ages]
    later = list(zip(ages[1:], shape[1:], strict=True))
    clients, rate = sum(one[2] for one in _LISTENERS), sum(one[5] for one in _LISTENERS)
    return {
        "ages": ages,
        "clients": [round(clients * one) for one in shape],
        "rates": {
            "accepted": [round(rate * one * (1 + 0.1 * cos(age / 7)), 2) for age, one in later],
            "refused": [round(max(0.0, 6 * exp(-((age - 60) ** 2) / 800) - 0.1), 2) for age, _ in later],
            "ended": [round(max(0.0, sin(age / 41)) * 0.8, 2) for age, _ in later],
            "errors": [0.2 if 400 < age < 411 else 0.0 for age, _ in later],
            "deaths": [0.2 if age == _SINCE_DEATH else 0.0 for age, _ in later],
        },
        "listeners": [
            {
                "address": address,
                "connections": [round(count * one) for one in shape],
                "queue": [round(waiting * exp(-age / 50)) for age in ages],
                "rate": [round(part * one * (1 + 0.1 * cos(age / 7)), 2) for age, one in later],
            }
            for address, _, count, _, waiting, part in _LISTENERS
        ],
    }


def clients() -> dict[str, Any]:
    """As `/clients.json`."""
    found = [
        {
            "worker": (1, 2, 4)[place % 3],  # the third is younger
            "listener": _LISTENERS[listener][0],
            "client": client or None,
            "age": age,
            "idle": idle,
            "in": came,
            "out": went,
            "state": "established",
        }
        for place, (client, listener, age, idle, came, went) in enumerate(_CLIENTS)
    ]
    return {"total": sum(one[2] for one in _LISTENERS), "clients": found, "why_none": ""}


def _wave(age: float) -> float:
    """How much there was so many seconds ago, where 1 is how much there is now."""
    return 1 - 0.25 * (1 - exp(-age / 150)) + 0.06 * sin(age / 70) * (1 - exp(-age / 30))


def _worker(slot: int, pid: int, count: int, age: float, accepted: int, megabytes: float) -> dict[str, Any]:
    return {
        "slot": slot,
        "pid": pid,
        "generation": 7,
        "state": "serving",
        "heartbeat_age": 0.2 * slot,
        "age": age,
        "lag": 0.0004 * slot,
        "clients": count,
        "accepted": accepted,
        "errors": 2 if slot == 3 else 0,
        "refused": {"full": 11 * slot, "per_ip": slot},
        "ended": {"first_byte": 6 * slot, "idle": 21 * slot},
        "pss": int(megabytes * (1 << 20)),
    }


def _listener(address: str, handler: str, count: int, limit: int | None, waiting: int, _rate: float) -> dict[str, Any]:
    expires = {"names": ["chat.example.net"], "expires": NOW + 61 * 86_400}
    return {
        "address": address,
        "handler": handler,
        "clients": count,
        "limit": limit,
        "queue": waiting,
        "queue_limit": 4096,
        "drops": 0,
        "certificates": [expires] if "7443" in address else [],
    }


def _death() -> dict[str, Any]:
    return {
        "time": NOW - _SINCE_DEATH,
        "slot": 3,
        "pid": 4713,
        "expected": False,
        "exit": "killed by SIGSEGV (core dumped)",
        "cause": "",
        "age": _SINCE_RELOAD - _SINCE_DEATH,
        "clients": 61,
        "words": ["Fatal Python error: Segmentation fault", '  File "/srv/chat/chat.py", line 88 in render'],
    }
