"""The files of certificates and keys: read by who may, and handed to who may not any more.

A key is often root's alone, and a worker becomes another user before it serves. So the master reads the files, and a
worker has what is in them from the master: at its fork, and when they change in sealed memory behind a descriptor.
OpenSSL reads files by their names, so there what was read has a name of its own for a moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from forkd.config.listener import Tls

#: Bytes of a file at most; a larger one is read by OpenSSL alone.
LARGEST_FILE = 1 << 20

_DAY = 86_400

#: Seconds before its end from which on a certificate is warned of.
EXPIRES_SOON = 21 * _DAY

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

#: What files hold, by their paths.
Contents = Mapping[str, bytes]


def expiry_warning(file: str, left: float) -> str:
    """The sentence about a certificate with so many seconds left; empty where those are enough."""
    if left < 0:
        return f"certificate {file} has ended {-left / _DAY:.0f} days ago"
    return f"certificate {file} ends in {left / _DAY:.0f} days" if left < EXPIRES_SOON else ""


def files_of(tls: Tls) -> list[Path]:
    """The files that the settings name, in their order."""
    found = [tls.cert, tls.key, *(file for one in tls.names for file in (one.cert, one.key)), tls.client_ca]
    return [file for file in found if file is not None]


def signature_of(files: Iterable[Path]) -> tuple[object, ...]:
    """What is another one when a file has been written, or replaced."""
    return tuple(_state_of(file) for file in files)


def _state_of(file: Path) -> object:
    try:
        found = os.stat(file)
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_files(files: Iterable[Path]) -> dict[str, bytes]:
    """What is in the files, without those that are not regular or too large. Raises OSError."""
    found = {}
    for file in files:
        # What waits for a writer, as a pipe would, is not to hold up the reader.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            state = os.fstat(descriptor)
            if stat.S_ISREG(state.st_mode) and state.st_size <= LARGEST_FILE:
                found[str(file)] = opened.read(LARGEST_FILE)
    return found


def pack(contents: Contents) -> int:
    """A descriptor of sealed memory that holds all this. Raises OSError."""
    text = json.dumps({path: data.decode("latin-1") for path, data in contents.items()})
    descriptor = _memory(text.encode())
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def unpack(descriptor: int) -> dict[str, bytes]:
    """What `pack` has packed. Raises OSError and ValueError."""
    text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    return {path: data.encode("latin-1") for path, data in json.loads(text).items()}


@contextlib.contextmanager
def readable(file: Path | None, contents: Contents) -> Iterator[Path | None]:
    """A path by which a file is read: of what was read of it, where it was, else its own."""
    if file is None or (data := contents.get(str(file))) is None:
        yield file
        return
    descriptor = _memory(data)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _memory(data: bytes) -> int:
    descriptor = os.memfd_create("forkd-tls", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    return descriptor
