"""A handler that fills the log: `log N` as N records of its own, `print N` as N lines of standard error."""

from __future__ import annotations

import asyncio
import logging
import sys

log = logging.getLogger("verbose")


async def fill(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Does what each line says."""
    async for line in reader:
        how, count = line.split()
        for _ in range(int(count)):
            if how == b"log":
                log.info("x" * 1000)
            else:
                print("x" * 1000, file=sys.stderr)
        writer.write(b"done\n")
