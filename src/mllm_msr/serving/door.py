"""What every request passes first and every reply last: keys, limits, headers, metrics, the log."""

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException

from mllm_msr.serving.auth import Access, Keys
from mllm_msr.serving.client import CLIENT, Client
from mllm_msr.serving.metrics import Metrics
from mllm_msr.serving.schemas import ErrorReply
from mllm_msr.serving.service import Service

logger = logging.getLogger(__name__)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
OPEN = ("/health", "/ready", "/docs", "/openapi.json")
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Args:
        max_body: bytes.
        max_requests: in flight at a time.
        deadline: seconds until a request is given up.
    """

    max_body: int = 32_000_000
    max_requests: int = 512
    deadline: float = 30.0


def access_of(method: str, path: str) -> Access | None:
    """What a request must be allowed to do; None for anyone's."""
    if path in OPEN:
        return None
    return "write" if method in ("PUT", "DELETE") or path.endswith("/events") else "read"


@dataclass
class Door:
    """The application as the web server sees it.

    Paths are routed as they were sent, so that an encoded slash belongs to an id; handlers decode ids.

    Args:
        log_texts: whether the log shows paths with their ids, and the messages of unforeseen errors.
    """

    app: Any
    service: Service
    keys: Keys
    limits: Limits
    metrics: Metrics
    log_texts: bool = False
    in_flight: int = field(default=0, init=False)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        path, status = scope["raw_path"].decode("ascii", "replace"), 0
        scope = {**scope, "path": path, "arrived": start}

        async def answer(message: Mapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *self._headers()]}
            await send(message)

        self.in_flight += 1
        client, watching = Client(), list[asyncio.Task]()

        def whole() -> None:
            watching.append(asyncio.create_task(listen(receive, client)))

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                CLIENT.set(client)
                await self.app(scope, self._limited(receive, start + self.limits.deadline, whole), answer)
            else:
                await refuse(answer, *refusal)
        except Exception as error:
            self._log_error(error)
            if not status:
                await refuse(answer, 500, "something went wrong in the server; its log says where")
        finally:
            for task in watching:
                task.cancel()
            self.in_flight -= 1
            route = getattr(scope.get("route"), "path", "-")
            seconds = time.monotonic() - start
            method = scope["method"] if scope["method"] in METHODS else "-"  # clients may invent as many as they like
            self.metrics.requests.labels(route, method, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            shown = path if self.log_texts else route
            logger.info("%s %s %d %.0f ms", method, shown, status, 1000 * seconds)

    def _refusal(self, scope: Mapping[str, Any]) -> tuple[int, str, dict[str, str]] | None:
        """Status, sentence and headers for a request that goes no further."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if (access := access_of(scope["method"], scope["path"])) is not None:
            allowed = self.keys.allows(headers.get("authorization"), access)
            if allowed is None:
                hint = "send the header `Authorization: Bearer KEY` with a key of this server"
                return 401, hint, {"www-authenticate": "Bearer"}
            if not allowed:
                return 403, "this key may read only: send one that may write", {}
            if self.in_flight > self.limits.max_requests:
                return 429, "too many requests are in flight: try again in 1 s", {"retry-after": "1"}
        if not headers.get("content-length", "0").isdecimal():
            return 400, "the header Content-Length is no number", {}
        if int(headers.get("content-length", "0")) > self.limits.max_body:
            return 413, self._too_large(), {}
        return None

    def _too_large(self) -> str:
        return f"the body has more than {self.limits.max_body:,} bytes: send less at a time"

    def _limited(self, receive: Receive, until: float, when_whole: Callable[[], None]) -> Receive:
        """The body as it comes, up to the limit, and as long as it comes in time; what to do once it is there."""
        count, whole = 0, False

        async def limited() -> dict[str, Any]:
            nonlocal count, whole
            try:
                left = None if whole else max(0.0, until - time.monotonic())
                message = await asyncio.wait_for(receive(), left)
            except TimeoutError as error:
                raise HTTPException(408, "the body did not come in time: send it at once, or less at a time") from error
            first, whole = not whole, not message.get("more_body", False)
            count += len(message.get("body", b""))
            if count > self.limits.max_body:
                raise HTTPException(413, self._too_large())
            if whole and first:
                when_whole()
            return message

        return limited

    def _headers(self) -> list[tuple[bytes, bytes]]:
        opened = self.service.opened
        told = {"x-model": opened.name, "x-model-revision": opened.revision, "x-format-version": str(opened.format)}
        return [(name.encode(), quote(value, safe=" /.:-_").encode()) for name, value in told.items()]

    def _log_error(self, error: Exception) -> None:
        """Where it happened; what it says may quote a request."""
        if self.log_texts:
            logger.error("unforeseen error", exc_info=error)
            return
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        logger.error("unforeseen %s at %s", type(error).__name__, " < ".join(reversed(places[-6:])))


async def listen(receive: Receive, client: Client) -> None:
    """Wait for what comes after a whole body, which is the end of the connection or of the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    client.hang_up()


async def refuse(send: Send, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    """Send an error as all are sent."""
    body = ErrorReply(message=message).model_dump_json().encode()
    told = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
