"""Limits of request bodies.

Parsing a large JSON body would block the event loop, and slow bodies would fill the memory.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

MAX_BODY_BYTES = 10**6
MAX_BODY_SECONDS = 30.0
UPLOAD_PATH = "/gradio_api/upload"  # streamed to disk by Gradio, which enforces `max_file_size`


class BodyLimit:
    """ASGI middleware that answers 413 to bodies of more than `MAX_BODY_BYTES`, and 408 to slow bodies.

    File uploads are exempt.

    The body is read here, chunk by chunk, before the app sees the request; it does not rely on `Content-Length`.

    Args:
        app: The ASGI app.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse a request whose body is too large or slow; pass any other to the app."""
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) == UPLOAD_PATH:
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(MAX_BODY_SECONDS):
                body = await _read_body(receive)
        except TimeoutError:
            await _refuse(send, 408, f"the request body must arrive within {MAX_BODY_SECONDS:g} seconds.")
            return
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            await _refuse(
                send, 413, f"the request body must have at most {MAX_BODY_BYTES} bytes: send files through uploads."
            )
            return
        whole = [{"type": "http.request", "body": body}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


async def _read_body(receive: Any) -> bytes | None:
    """Read a body until it ends or exceeds the limit; return None if the client disconnects."""
    body, more = bytearray(), True
    while more and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
