"""What every route shares: the store, the pages, and who asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.concurrency import run_in_threadpool

from accord.feedback.people import IDLE, Person, Session
from accord.feedback.store import Store
from accord.feedback.web.security import SAFE, Limiter

COOKIE = "accord_session_"
STORE = "X-Accord-Store"
"""Header by which a page names the store that it is of: another one may be served at its address by now."""


@dataclass(frozen=True)
class WebSettings:
    """How the pages are served.

    Attributes:
        alone: the person who everybody is that comes; nobody logs in. For this machine's own address only.
        https: a proxy in front of this server speaks TLS: cookies travel by it only.
        attempts: logins that may fail under one name, and four times as many from one address, in a quarter of an hour.
        requests: a minute, from one address.
        hosts: the names this server goes by; none: any.
    """

    alone: Person | None = None
    https: bool = False
    attempts: int = 5
    requests: int = 3000
    hosts: tuple[str, ...] = ()


class Site:
    def __init__(self, store: Store, settings: WebSettings) -> None:
        self.store, self.settings = store, settings
        self.by_name, self.by_address = Limiter(settings.attempts, 900.0), Limiter(4 * settings.attempts, 900.0)
        # Cookies know no ports, and two servers may run on one machine. What begins with __Host- nobody else can set.
        self.cookie = ("__Host-" if settings.https else "") + COOKIE + store.id[:8]
        self._pages = Environment(
            loader=PackageLoader("accord.feedback.web"), autoescape=select_autoescape(default=True), undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip

    @classmethod
    def of(cls, request: Request) -> Site:
        site: Site = request.app.state.site
        return site

    def page(self, request: Request, template: str, session: Session | None = None, status: int = 200, **values: Any) -> HTMLResponse:
        text = self._pages.get_template(f"{template}.html.j2").render(
            person=session and session.person, csrf=session.csrf if session else "", alone=self.settings.alone is not None,
            path=request.url.path, store=self.store.id, **values,
        )  # fmt: skip
        return HTMLResponse(text, status)

    def let_in(self, response: Response, token: str) -> Response:
        """Give the browser a new session, whatever it had before."""
        response.set_cookie(self.cookie, token, int(IDLE), path="/", secure=self.settings.https, httponly=True, samesite="lax")
        return response

    def session(self, request: Request) -> Session | None:
        token = request.cookies.get(self.cookie)
        return self.store.people.session(token) if token else None


class LoggedOut(Exception):
    """A page was asked for by nobody in particular."""


async def checked(request: Request) -> Session:
    """Whoever is logged in; of a request that changes something, only if it knows their token."""
    if request.headers.get(STORE, Site.of(request).store.id) != Site.of(request).store.id:
        raise HTTPException(409, "This page is of another store; load it again.")
    session = await run_in_threadpool(Site.of(request).session, request)
    if session is None:
        if request.url.path.startswith("/api/"):
            raise HTTPException(401, "You are not logged in any more.")
        raise LoggedOut
    if request.method not in SAFE:
        told = request.headers.get("x-csrf-token")
        if told is None and "form" in request.headers.get("content-type", ""):
            told = str((await request.form()).get("csrf", ""))
        if told != session.csrf:
            raise HTTPException(403, "This page is from another login; load it again.")
    return session


def role(*allowed: str) -> Callable[..., Awaitable[Session]]:
    """Whoever is logged in, if they have one of these roles."""

    async def check(session: Annotated[Session, Depends(checked)]) -> Session:
        if session.person.role not in allowed:
            raise HTTPException(403, f"This is for {' and '.join(f'{r}s' for r in allowed)}; you are a {session.person.role}.")
        return session

    return check


Anyone = Annotated[Session, Depends(checked)]
Reviewer = Annotated[Session, Depends(role("reviewer", "owner"))]
Owner = Annotated[Session, Depends(role("owner"))]
