"""The application: routes, what guards them, and what is said when something goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from accord.errors import UserError
from accord.feedback.store import Store
from accord.feedback.web import doors, labeling, owners
from accord.feedback.web.retraining import Retraining
from accord.feedback.web.security import Guard, Limiter
from accord.feedback.web.site import LoggedOut, Site, WebSettings

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
UPLOADS = ("/import",)


def make_app(store: Store, settings: WebSettings | None = None, retraining: Retraining | None = None) -> FastAPI:
    """The application, for any ASGI server. The store stays the caller's, who closes it; without ``retraining`` nothing is trained."""
    settings = settings or WebSettings()
    app = FastAPI(title="accord label", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site, app.state.watched = Site(store, settings), owners.Watched(store)
    app.state.retraining = retraining
    for part in (doors, labeling, owners):
        app.include_router(part.routes)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    app.add_exception_handler(LoggedOut, lambda request, error: RedirectResponse("/login", 303))
    app.add_exception_handler(UserError, lambda request, error: _failed(request, 400, str(error)))
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    hosts = settings.hosts if settings.alone is None else LOOPBACK
    app.add_middleware(Guard, hosts=hosts, uploads=UPLOADS, limit=Limiter(settings.requests, 60.0), https=settings.https)
    return app


def _failed(request: Request, status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": text}, status, headers)
    title = "There is nothing here" if status == 404 else "That did not work"
    response = Site.of(request).page(request, "message", status=status, title=title, text=text)
    response.headers.update(headers or {})
    return response


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _failed(request, error.status_code, str(error.detail), error.headers)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _failed(request, 422, f"{'.'.join(str(part) for part in first['loc'][1:]) or 'The request'}: {first['msg']}")
