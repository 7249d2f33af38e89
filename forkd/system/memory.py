"""Shared memory behind a descriptor (memfd_create(2)), mapped where this process looks for it, and given back."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

READ = mmap.PROT_READ
WRITE = mmap.PROT_READ | mmap.PROT_WRITE

#: Nobody who has the memory can make it shorter, which would kill whoever next looks (memfd_create(2)).
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0

_MAP_FIXED = 0x10  # sys/mman.h; Python has no name for it
_MAP_FAILED = ctypes.c_void_p(-1).value
_PUNCH_HOLE = 0x02 | 0x01  # linux/falloc.h, FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE


def make_memory(name: str, size: int) -> int:
    """A descriptor of new memory of so many bytes; -1 where the system has no such thing. Raises OSError."""
    if not hasattr(os, "memfd_create"):
        return -1
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def map_over(place: mmap.mmap, start: int, descriptor: int, protection: int, offset: int, size: int) -> None:
    """Puts memory of a descriptor in the place of a part of an anonymous mapping (mmap(2), MAP_FIXED). An `mmap` of the
    descriptor would keep a copy of it open.

    Args:
        place: the mapping.
        start: the part's beginning in it, in bytes; whole pages, as all of these.
        descriptor: the memory's.
        protection: READ or WRITE.
        offset: where in the memory.
        size: bytes.

    Raises:
        OSError: the system would not.
    """
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = ctypes.addressof(ctypes.c_char.from_buffer(place)) + start
    if function(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, offset) == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def read_only(descriptor: int) -> int:
    """Another descriptor of the same memory, by which it can't be written; nor by a mapping that is made of it and
    changed later (mprotect(2)). Raises OSError.
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def clear_memory(descriptor: int, offset: int, size: int) -> None:
    """Makes a part of the memory zeros again, and gives it back to the system (fallocate(2)). Raises OSError."""
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if function(descriptor, _PUNCH_HOLE, offset, size):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
