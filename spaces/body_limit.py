"""Limit on the size of request bodies: parsing a large JSON body would block the event loop for all visitors."""

from __future__ import annotations

from typing import Any

MAX_BODY_BYTES = 10**6
UPLOAD_PATH = "/gradio_api/upload"  # streamed to disk by Gradio, which enforces `max_file_size`


class BodyLimit:
    """ASGI middleware that answers 413 if the body has more than `MAX_BODY_BYTES`, except for file uploads.

    The body is read here, chunk by chunk, before the app sees the request; a missing or wrong `Content-Length` changes nothing.

    Args:
        app: The ASGI app.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it to the app with its body."""
        if scope["type"] != "http" or scope["path"] == UPLOAD_PATH:
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                await _refuse(send)
                return
        whole = [{"type": "http.request", "body": bytes(body)}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


async def _refuse(send: Any) -> None:
    body = f'{{"error": "the request body must have at most {MAX_BODY_BYTES} bytes: send files through uploads."}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
