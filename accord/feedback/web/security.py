"""What every request has to pass, whatever it asks for: its size, its host, where it comes from, how often."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY, UPLOAD = 2**20, 64 * 2**20
"""Bytes that a request may have, and one that uploads a file."""
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=()",
    "Cache-Control": "no-store",
}


class Limiter:
    """At most ``most`` events in any ``seconds`` under one name. Forgets the names that were used longest ago."""

    def __init__(self, most: int, seconds: float, names: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._names, self._clock = most, seconds, names, clock
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str) -> float:
        """Count one, if it is allowed: 0. If not: the seconds until one is."""
        with self._lock:
            times, now = self._seen.setdefault(name, deque()), self._clock()
            self._seen.move_to_end(name)
            if len(self._seen) > self._names:
                self._seen.popitem(last=False)
            while times and times[0] <= now - self._seconds:
                times.popleft()
            if len(times) >= self._most:
                return times[0] + self._seconds - now
            times.append(now)
            return 0.0

    def give_back(self, name: str) -> None:
        """The last one does not count after all."""
        with self._lock:
            if times := self._seen.get(name):
                times.pop()

    def forget(self, name: str) -> None:
        """None of them counts."""
        with self._lock:
            self._seen.pop(name, None)


class Guard:
    """ASGI middleware.

    - A host that is not among ``hosts`` is refused (none: any), so that a foreign name that points here opens nothing.
    - What changes something must name our own origin, as every browser does of itself; another page's form does not.
    - A body over :data:`BODY` (:data:`UPLOAD` for ``uploads``) ends the request, also where its length was not told.
    - No address may ask more often than ``limit`` allows.
    - Every answer carries :data:`HEADERS`.
    """

    def __init__(
        self, app: App, hosts: Iterable[str] = (), uploads: Iterable[str] = (), limit: Limiter | None = None, https: bool = False
    ) -> None:
        self._app, self._hosts, self._uploads, self._limit, self._https = (
            app,
            frozenset(host.lower() for host in hosts),
            frozenset(uploads),
            limit,
            https,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                if self._https:
                    out["Strict-Transport-Security"] = "max-age=31536000"
            await send(message)

        most, had = UPLOAD if scope["path"] in self._uploads else BODY, 0

        async def counted() -> Message:
            nonlocal had
            message = await receive()
            had += len(message.get("body", b""))
            if had > most:
                raise HTTPException(413, f"A request may have {most // 2**20} MiB.")
            return message

        await (self._refused(scope, headers, most) or self._app)(scope, counted, answer)

    def _refused(self, scope: Scope, headers: Headers, most: int) -> App | None:
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            return _no(421, f"This server does not go by the name '{_name(host)[:80]}'.")
        if scope["method"] not in SAFE:
            origin = headers.get("origin") or headers.get("referer", "")
            if _netloc(origin) != host or not host:
                return _no(403, "This request does not come from one of this server's own pages.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            return _no(413, f"A request may have {most // 2**20} MiB.")
        if self._limit is not None and not scope["path"].startswith("/static/"):
            who = (scope["client"] or ("",))[0]
            wait = self._limit.take(who)
            if wait:
                return _no(429, "Too many requests; wait a moment.", {"Retry-After": str(int(wait) + 1)})
        return None


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # half a bracket
        return ""


def _name(host: str) -> str:
    """A host without its port."""
    return host.rsplit(":", 1)[0].lower() if not host.endswith("]") else host.lower()


def _no(status: int, text: str, headers: dict[str, str] | None = None) -> App:
    return JSONResponse({"error": text}, status, headers)
