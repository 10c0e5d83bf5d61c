"""A real server of the pages, on this machine or on a network."""

from __future__ import annotations

import getpass
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from accord.errors import UserError, did_you_mean
from accord.feedback.people import Person
from accord.feedback.store import Store
from accord.feedback.web.retraining import Retraining
from accord.feedback.web.server import LOOPBACK, make_app
from accord.feedback.web.site import WebSettings
from accord.progress import console


def is_loopback(host: str) -> bool:
    return host in (*LOOPBACK, "::1")


def listen(host: str, port: int) -> socket.socket:
    """A socket for a server; ``port`` 0 takes any that is free.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host}:{port} cannot be listened at: {getattr(error, 'strerror', None) or error}. Give another --port or --host."
        ) from None


def address(listening: socket.socket, settings: WebSettings | None = None) -> str:
    """The address to give a browser: behind a proxy with TLS the first of the names that it goes by."""
    host, port = listening.getsockname()[:2]
    return _at(host, port, settings)


def _at(host: str, port: int, settings: WebSettings | None) -> str:
    if settings is not None and settings.https and settings.hosts:
        return f"https://{settings.hosts[0]}"
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def only_person(store: Store) -> Person:
    """Who labels where nobody logs in: an owner with the name of this machine's user."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = "me"
    return store.people.get(name) or store.people.add(name, "owner")


def web_settings(
    store: Store, host: str, accounts: bool, https: bool = False, hosts: tuple[str, ...] = (), requests: int = 3000
) -> WebSettings:
    """Raises:
    UserError: others could reach the pages, and nobody would have to log in.
    """
    if accounts:
        return WebSettings(https=https, hosts=hosts, requests=requests)
    if not is_loopback(host):
        raise UserError(f"On {host} others can reach the pages, so people must log in: give --accounts. Without it accord listens on 127.0.0.1 only.")  # fmt: skip
    if _owners(store):
        raise UserError("People of this store log in; give --accounts.")
    return WebSettings(alone=only_person(store), requests=requests)


def _owners(store: Store) -> bool:
    """Whether an owner can log in."""
    return any(p["role"] == "owner" and p["active"] and p["logs_in"] for p in store.people.everyone())


def first_owner(store: Store, at: str) -> str | None:
    """The link by which the first owner chooses a name and a password; None if there is an owner who can log in."""
    if _owners(store):
        return None
    return f"{at}/invite/{store.people.invite('owner')}"


def forgotten(store: Store, settings: WebSettings, host: str, port: int, name: str) -> None:
    """Print the link by which somebody chooses a new password, at the server that listens there.

    Raises:
        UserError: there is nobody of this name, or everybody is let in.
    """
    if settings.alone is not None:
        raise UserError("Without --accounts there are no passwords.")
    person = store.people.get(name)
    if person is None:
        raise UserError(f"There is no '{name}' here.{did_you_mean(name, [p['name'] for p in store.people.everyone()])}")
    at = _at(host, port, settings)
    console.print(f"{name} chooses a new password: {at}/invite/{store.people.new_password(person.id)}", soft_wrap=True, markup=False)


def announce(store: Store, settings: WebSettings, listening: socket.socket, note: str) -> None:
    """Print where the pages are, and the first owner's link if there is none yet."""
    at = address(listening, settings)
    if settings.alone is None and (link := first_owner(store, at)):
        console.print(f"Become the owner: {link}", soft_wrap=True, markup=False)
    console.print(f"Rank at {at}   ({note})", soft_wrap=True, markup=False)


def _server(store: Store, settings: WebSettings, retraining: Retraining | None = None) -> uvicorn.Server:
    config = uvicorn.Config(
        make_app(store, settings, retraining), log_level="warning", access_log=False, server_header=False, proxy_headers=settings.https,
        forwarded_allow_ips="127.0.0.1", timeout_graceful_shutdown=5, lifespan="off",
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(store: Store, settings: WebSettings, listening: socket.socket, retraining: Retraining | None = None) -> None:
    """Until SIGINT or SIGTERM; requests that have begun are answered."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn takes both, and raises them again when it is done
    try:
        _server(store, settings, retraining).run(sockets=[listening])
    finally:
        if retraining is not None:
            retraining.stop()


@contextmanager
def serving(
    store: Store, settings: WebSettings, listening: socket.socket, retraining: Retraining | None = None
) -> Iterator[Callable[[], None]]:
    """In a thread, while something else goes on. What is given raises if the server has ended."""
    server = _server(store, settings, retraining)
    server.capture_signals = _nothing  # type: ignore[method-assign]  # they are the main thread's
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()

    def check() -> None:
        if not thread.is_alive():
            raise UserError("The labeling server has ended; start again.")

    try:
        while not server.started:
            check()
            time.sleep(0.01)
        yield check
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
