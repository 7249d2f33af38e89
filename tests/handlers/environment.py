"""Tells the value of an environment variable that a client asks for by a line."""

from __future__ import annotations

import asyncio
import os


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One question, one answer; `-` for a variable that is not there."""
    name = (await reader.readline()).decode().strip()
    writer.write(os.environ.get(name, "-").encode() + b"\n")
