# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What stands between the network and a server's application: bounded bodies, known routes, errors in OpenAI's form.

Written for ASGI, the interface of Python's HTTP servers, so that it fits in front of any backend.
"""

import asyncio
import contextlib
import json
from typing import Any


ROUTES = {
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
}
SECONDS_FOR_A_BODY = 60


class BadRequest(ValueError):
    """An error of whoever sent the request: status 400."""


@contextlib.contextmanager
def blamed_on_the_request(*kinds: type[Exception]):
    """Turns errors of these kinds into BadRequest. What says nothing by itself, a KeyError for instance, is named."""
    try:
        yield
    except BadRequest:
        raise
    except kinds as error:
        text = str(error) if isinstance(error, ValueError) else f"malformed request: {type(error).__name__}: {error}"
        raise BadRequest(text[:1000]) from error


def error_body(status: int, message: str) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Guard:
    """An ASGI application that hands requests on to `app`: those for known routes, their bodies read and not too large, and
    no more than so many at once."""

    def __init__(self, app: Any, max_request_bytes: int, max_requests: int):
        self.app, self.max_request_bytes, self.max_requests = app, max_request_bytes, max_requests
        self.at_work = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (scope["method"], scope["path"]) not in ROUTES:
            routes = ", ".join(" ".join(route) for route in sorted(ROUTES))
            return await refuse(send, 404, f"There is no {scope['method']} {scope['path'][:200]}. There are {routes}.")
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.at_work >= self.max_requests:
            return await refuse(send, 503, f"{self.max_requests} requests are at work or waiting. Try again later.")
        self.at_work += 1
        try:
            body = await asyncio.wait_for(self._body(scope, receive), SECONDS_FOR_A_BODY)
            if body is None:
                limit = f"max_request_bytes={self.max_request_bytes}"
                return await refuse(send, 413, f"The request has more than {limit} bytes.")
            waiting = [{"type": "http.request", "body": body, "more_body": False}]
            del body

            async def again():
                return waiting.pop() if waiting else await receive()

            await self.app(scope, again, send)
        except asyncio.TimeoutError:
            await refuse(send, 408, f"The request was not complete after {SECONDS_FOR_A_BODY} seconds.")
        finally:
            self.at_work -= 1

    async def _body(self, scope, receive) -> bytes | None:
        """The whole body, or None if it is too large; what says so in its header is not read at all."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.max_request_bytes:
            return None
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_request_bytes:
                return None
        return bytes(body)


async def refuse(send, status: int, message: str) -> None:
    """Answers with an error."""
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
