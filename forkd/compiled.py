"""Which twin of the hot path runs: the compiled one, or the one in plain Python.

What is called for every request is there twice: in Python, complete, and in extension modules (`EXTENSIONS`), which are
compiled when forkd is installed where there are a C compiler and Python's headers. Both do the same. A process has one
twin for all of it, chosen when it is first asked for; workers have that of their master.

`setup.py` has the stamp of an extension's source compiled into it, as SOURCE. One that was built from other sources
than those that run beside it is not used, and `describe` says so.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from forkd import __version__

#: The extension modules, each beside its twin. On import they load nothing of forkd, nor asyncio: the command line and
#: the master import them too.
EXTENSIONS = ("forkd.serve._fast", "forkd.serve.datagram._fast", "forkd.system._fast")

#: The environment variable that chooses Python's twin, if it is set to anything but 0.
PURE = "FORKD_PURE"


def extension(name: str) -> Any:
    """One of `EXTENSIONS`; None where the twin in Python is to be used."""
    return _chosen()[0].get(name)


def hot_path() -> str:
    """`compiled` or `pure`."""
    return "compiled" if _chosen()[0] else "pure"


def describe() -> str:
    """The same for people, and why it is not compiled."""
    found, reason = _chosen()
    return "compiled" if found else f"pure Python: {reason}"


def stamp(source: Path) -> str:
    """What tells one source of an extension from another: forkd's version, and a checksum."""
    return f"{__version__}-{crc32(source.read_bytes()):08x}"


@cache
def _chosen() -> tuple[dict[str, ModuleType], str]:
    return ({}, f"{PURE} is set") if os.environ.get(PURE, "0") not in ("", "0") else load()


def load() -> tuple[dict[str, ModuleType], str]:
    """The extensions, whatever was chosen: all of them or none, and why there are none."""
    found = {}
    for name in EXTENSIONS:
        try:
            module = found[name] = import_module(name)
        except ModuleNotFoundError as error:
            return {}, "it was installed without a C compiler" if error.name == name else str(error)
        except ImportError as error:
            return {}, str(error)
        if not _fits(module):
            return {}, f"{Path(str(module.__file__)).name} was built from other sources; install forkd again"
    return found, ""


def _fits(module: ModuleType) -> bool:
    """Whether an extension was built from the source that is beside it, as in a checkout, or from this version."""
    source = Path(str(module.__file__)).with_name("_fast.pyx")
    built_from = str(module.SOURCE)
    return built_from == stamp(source) if source.exists() else built_from.startswith(f"{__version__}-")
