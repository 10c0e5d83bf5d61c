"""Coming and going: login, logout, invitations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from accord.errors import UserError
from accord.feedback.people import SHORTEST
from accord.feedback.web.site import Anyone, Site

routes = APIRouter()
Name = Annotated[str, Form(max_length=200)]
Password = Annotated[str, Form(max_length=2000)]


@routes.get("/login", response_class=HTMLResponse)
def login_page(request: Request) -> Response:
    site = Site.of(request)
    if site.settings.alone is not None:
        return site.let_in(RedirectResponse("/", 303), site.store.people.log_in(site.settings.alone))
    return RedirectResponse("/", 303) if site.session(request) else site.page(request, "login", name="", error="")


@routes.post("/login", response_class=HTMLResponse)
def login(request: Request, name: Name = "", password: Password = "") -> Response:
    site, address = Site.of(request), _address(request)
    name = name.strip()
    # Taken before the password is looked at, so that many at once are not more than one after the other.
    wait = site.by_name.take(name) or site.by_address.take(address)
    if wait:
        response: Response = site.page(
            request, "login", status=429, name=name, error=f"Too many attempts; try again in {int(wait // 60) + 1} minutes."
        )
        response.headers["Retry-After"] = str(int(wait) + 1)
        return response
    token = site.store.people.enter(name, password)
    if token is None:
        return site.page(request, "login", status=403, name=name, error="There is no such name, or this is not its password.")
    site.by_name.forget(name)
    site.by_address.give_back(address)
    _end(site, request)
    return site.let_in(RedirectResponse("/", 303), token)


@routes.post("/logout")
def logout(request: Request, session: Anyone) -> Response:
    site = Site.of(request)
    _end(site, request)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(site.cookie, "/", secure=site.settings.https, httponly=True, samesite="lax")
    return response


@routes.get("/invite/{token}", response_class=HTMLResponse)
def invitation(request: Request, token: str) -> Response:
    site = Site.of(request)
    found = site.store.people.invited(token)
    return _ended(site, request) if found is None else site.page(request, "invite", invitation=found, name="", error="", shortest=SHORTEST)


@routes.post("/invite/{token}", response_class=HTMLResponse)
def accept(request: Request, token: str, name: Name = "", password: Password = "") -> Response:
    site, address = Site.of(request), _address(request)
    if site.by_address.take(address):
        return site.page(request, "message", status=429, title="Too many attempts", text="Try again in a quarter of an hour.")
    found = site.store.people.invited(token)
    if found is None:
        return _ended(site, request)
    site.by_address.give_back(address)
    try:
        person = site.store.people.accept(token, name, password)
    except UserError as error:
        return site.page(request, "invite", status=400, invitation=found, name=name, error=str(error), shortest=SHORTEST)
    _end(site, request)
    return site.let_in(RedirectResponse("/", 303), site.store.people.log_in(person))


def _ended(site: Site, request: Request) -> Response:
    text = "It was taken already or has ended. Ask for another one."
    return site.page(request, "message", status=404, title="This invitation cannot be taken", text=text)


def _end(site: Site, request: Request) -> None:
    """Whoever was logged in by this browser is not any more."""
    if old := request.cookies.get(site.cookie):
        site.store.people.log_out(old)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
