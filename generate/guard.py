"""Checks of requests before they are answered (host names, keys, sizes), and error responses."""

import asyncio
import hmac
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from generate.jobs import JobError
from generate.openai_format import error_body
from lit_llama.utils import UserError

if TYPE_CHECKING:
    from generate.serve import Settings

PUBLIC = ("/", "/health")  # paths that need no key: they reveal nothing about the adapters
STATUS = {  # of a `JobError`
    "context_length_exceeded": 400, "queue_full": 429, "server_error": 500, "shutting_down": 503, "timeout": 504
}  # fmt: skip
ENOUGH = 8  # a body is read up to this multiple of the limit


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.status, self.body = status, error_body(message, kind, code, param)

    def response(self) -> JSONResponse:
        # OpenAI's client repeats a request after any status from 500 on, unless a header forbids it
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 504: {"x-should-retry": "false"}}
        return JSONResponse(self.body, self.status, headers.get(self.status))


def refusal_of(error: Exception, folder: Path) -> Refusal:
    """Return the answer to an error.

    Args:
        error: any error. Clients see the text of a `UserError` only.
        folder: the checkpoint's, which is removed from that text.
    """
    message = re.sub(rf"(?<!\S){re.escape(str(folder))}/", "", str(error))
    message = re.sub(rf"(?<!\S){re.escape(str(folder))}(?![\w/.-]*\w)", "the base model", message)
    if isinstance(error, JobError):
        return Refusal(STATUS[error.code], message, error.code)
    if isinstance(error, UserError):
        return Refusal(400, message)
    return Refusal(500, "The server failed to answer; its log says why.")


def explain(error: RequestValidationError) -> Refusal:
    """Return one sentence about the first mistake in a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(400, "The body is not JSON.")
    place = [str(part) for part in first["loc"] if part not in ("body", "query")]
    if not place:
        return Refusal(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    name = place[0]
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"This server does not support the field {name!r}.", param=name)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return Refusal(400, f"{'.'.join(place)}: {message}.", param=name)


class Guard:
    """Checks keys and sizes before the application sees a request, and reads its body within a size and time limit."""

    def __init__(self, app: Callable, settings: "Settings") -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self.check_host(headers.get(b"host", b"").decode("latin-1"))
            is_admin = scope["path"].startswith("/adapters") and scope["method"] != "GET"
            self.check_key(scope["path"], headers.get(b"authorization", b""), is_admin)
            settings = self.settings
            limit = settings.max_adapter_mb * 2**20 if is_admin else settings.max_body_kb * 1024
            body = await self.read(headers, receive, limit)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict:
            return parts.pop() if parts else await receive()

        await self.app(scope, replay, send)

    def check_host(self, header: str) -> None:
        """Raise a refusal unless the Host header has an allowed name.

        This prevents DNS rebinding, in which a web page gives the server's address another name, so that it counts as
        the page's own origin.
        """
        host = re.sub(r":\d*$", "", header).lower()
        if "*" not in self.settings.allowed_hosts and host not in self.settings.allowed_hosts:
            raise Refusal(421, f"This server does not accept the host name {host!r}; add it with --allowed_hosts.")

    def check_key(self, path: str, header: bytes, is_admin: bool) -> None:
        """Raise a refusal unless the header has the key that a path needs."""
        if is_admin and self.settings.admin_token is None:
            raise Refusal(403, "Adapters cannot be changed here; start the server with --admin_token.")
        expected = self.settings.admin_token if is_admin else self.settings.api_key
        if expected is None or path in PUBLIC:
            return
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), expected.encode()):
            name = "admin token" if is_admin else "API key"
            raise Refusal(401, f"The {name} is missing or wrong; send it as Authorization: Bearer.", "invalid_api_key")

    async def read(self, headers: dict[bytes, bytes], receive: Callable, limit: int) -> bytes:
        """Return the body, which must arrive within the time limit and be no larger than `limit`."""
        stated, body = headers.get(b"content-length", b"0"), b""
        size = int(stated) if stated.isdigit() and len(stated) < 20 else 0
        try:
            if size <= ENOUGH * limit:
                body = await asyncio.wait_for(receive_body(receive, limit), self.settings.body_seconds)
        except asyncio.TimeoutError:
            seconds = self.settings.body_seconds
            raise Refusal(408, f"The body of the request did not arrive within {seconds:g} seconds.") from None
        if max(size, len(body)) > limit:
            raise Refusal(413, f"The body has more than {limit} bytes; send less.", "body_too_large")
        return body


async def receive_body(receive: Callable, limit: int) -> bytes:
    """Return the body, or a part of it that is longer than the limit.

    Up to `ENOUGH` times the limit is read: a client that is still sending would not see the response.
    """
    body, size = bytearray(), 0
    while size <= ENOUGH * limit:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal(400, "The connection was closed within the request.")
        size += len(message.get("body", b""))
        if len(body) <= limit:
            body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)
