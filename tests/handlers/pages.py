"""An HTTP server made of aiohttp's low-level one, which is an object that makes protocols."""

from __future__ import annotations

from aiohttp import web


async def _answer(request: web.BaseRequest) -> web.StreamResponse:
    text = await request.text()
    return web.Response(text=f"{request.method} {request.path} {request.scheme} {len(text)}\n")


def make() -> web.Server:
    """One for each worker."""
    return web.Server(_answer)


server = make()
