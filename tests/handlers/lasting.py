"""Handlers that say in the log what ended their connections."""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile

log = logging.getLogger("lasting")


class Echo(asyncio.Protocol):
    """An echo that reads no more from a client that does not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        log.info("lost by %s: %s", type(error).__name__, error)


class Asking(Echo):
    """Asks its client whether it is there."""

    def heartbeat(self) -> None:
        self.transport.write(b"?")


class Staying(Asking):
    """Keeps its side open when its client has ended the other."""

    def eof_received(self) -> bool:
        return True


class Handing(Echo):
    """Hands its client to a protocol that asks, at the first byte."""

    def data_received(self, data: bytes) -> None:
        successor = Asking()
        successor.connection_made(self.transport)
        self.transport.set_protocol(successor)


class Securing(asyncio.Protocol):
    """Goes over to TLS at once, then asks. It has no certificate, so it takes old suites that need none."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("aNULL:@SECLEVEL=0")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        loop, inner = asyncio.get_running_loop(), Asking()

        async def secure() -> None:
            over_tls = await loop.start_tls(transport, inner, context, server_side=True)
            assert over_tls is not None
            inner.connection_made(over_tls)

        self.task = loop.create_task(secure())


class Ticking(Echo):
    """Says something now and then, unasked."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.tick()

    def tick(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"tick")
            asyncio.get_running_loop().call_later(0.3, self.tick)


class Deaf(Asking):
    """Asks, and reads nothing."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()


class Failing(Echo):
    """Raises instead."""

    def heartbeat(self) -> None:
        raise ValueError("no heart")


class Filling(asyncio.BufferedProtocol):
    """Takes what comes into a buffer of its own, and echoes it."""

    def __init__(self) -> None:
        self.buffer = bytearray(65536)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.writelines([bytes(self.buffer[:nbytes]), b""])

    def connection_lost(self, error: Exception | None) -> None:
        log.info("lost by %s: %s", type(error).__name__, error)


class Parting(asyncio.Protocol):
    """Says more than its client takes, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(bytes(64 << 20))
        transport.close()

    def heartbeat(self) -> None:
        raise AssertionError("it is asked after it was closed")

    def connection_lost(self, error: Exception | None) -> None:
        log.info("lost by %s: %s", type(error).__name__, error)


async def sending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends a file that is larger than its client takes."""
    with tempfile.TemporaryFile() as file:
        file.truncate(64 << 20)
        try:
            await asyncio.get_running_loop().sendfile(writer.transport, file)
        except ConnectionError as error:
            log.info("lost by %s: %s", type(error).__name__, error)
            raise


async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An echo by streams."""
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except Exception as error:
        log.info("read raises %s: %s", type(error).__name__, error)
        raise
