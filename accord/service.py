"""Services over HTTP that are asked in JSON: rewards and judges on other machines.

What fails on the way is tried again, waiting longer each time, by a random share of it so that many runs do not return at
once ("full jitter": Brooker 2015). After several requests in a row that failed all the same, the service is left alone for a
while and then asked once (a circuit breaker: Nygard 2007). An outage is nobody's question's fault: it is waited for, and one that
does not end stops the run with its state saved. Answers are kept by content, on disk, as they come: the same question is never
paid twice.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape

from accord.errors import UserError, first_line
from accord.progress import console, safe_point

TRANSIENT = {408, 425, 429, 500, 502, 503, 504, *range(520, 530)}
"""Status codes after which the same request may succeed."""
LARGEST = 2**24  # bytes of an answer


class Refused(Exception):
    """A request cannot succeed, or its answer cannot be used. ``status``: the code that was answered, if it was one of failure."""

    def __init__(self, cause: str, status: int | None = None) -> None:
        super().__init__(cause)
        self.cause, self.status = cause, status


class Unanswered(Exception):
    """A request failed and another may not. ``wait``: seconds that the service asks for."""

    def __init__(self, cause: str, wait: float | None = None) -> None:
        super().__init__(cause)
        self.cause, self.wait = cause, wait


class Service:
    """A URL that is asked by POST. Several threads may ask at once.

    Args:
        what: in words, such as ``Reward``, for messages.
        token: the environment variable whose value, if it is set, is sent as a bearer token. It is written nowhere.
        timeout: seconds a request may take.

    Attributes:
        halt: set, it ends every wait of every thread.

    Raises:
        UserError: the URL is none, or the token cannot be sent.
    """

    ATTEMPTS = 6
    FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds
    BREAK, REST = 3, 60.0  # requests in a row that failed all the same, and the seconds for which the service is then left alone
    OUTAGE = 900.0  # seconds after which a run stops that is waiting for its service

    def __init__(self, what: str, url: str, token: str, timeout: float) -> None:
        self.name, self.url, self.timeout, self._token = f"{what} '{url}'", url, timeout, token
        self._lock = threading.Lock()
        self._failures, self._next, self._cause = 0, 0.0, ""  # requests in a row that failed; when the next may be made; why
        self._since: float | None = None  # when the first of them began
        self._answered = 0
        self.halt = threading.Event()
        try:
            parts = urllib.parse.urlsplit(url)
            _ = parts.port, url.encode("ascii"), (parts.hostname or "").encode("idna")
        except ValueError as error:
            raise UserError(f"{self.name} is no URL ({first_line(error)}); write http://HOST[:PORT]/PATH in ASCII.") from None
        if not parts.hostname:
            raise UserError(f"{self.name} names no host; write http://HOST[:PORT]/PATH.")
        value = os.environ.get(token, "")
        if not (value.isascii() and value.isprintable()):
            raise UserError(f"{token} has characters that no header may hold (a line end?); set it again.")

    def ask_or_wait(self, question: Any) -> Any:
        """:meth:`ask`, over outages of the service, which all threads wait for together: one of them asks whether it is over.

        Raises:
            Refused: the service is there and does not like the question, or never answers this one while it answers others; or its
                answer cannot be used; or waiting was halted.
            UserError: the outage does not end.
        """
        mine, others = 0, self._answered
        while True:
            attempts = self._turn()
            begun = time.monotonic()
            try:
                answer = self.ask(question, attempts)
            except Unanswered as again:
                mine += 1
                if mine >= self.BREAK and self._answered > others:
                    raise Refused(f"{again.cause}, {mine} times, while it answered other requests") from None
                self._failed(again.cause, begun)
                continue
            except Refused:
                self._there()
                raise
            self._there()
            return answer

    def _turn(self) -> int:
        """How often this thread may try now; while the service is left alone it waits."""
        while True:
            with self._lock:
                if self._failures < self.BREAK:
                    return self.ATTEMPTS
                self._check_outage()
                left = self._next - time.monotonic()
                if left <= 0:
                    self._next = time.monotonic() + self.timeout + self.REST  # this thread asks; the others wait for what it finds
                    return 1
            self._sleep(min(left, 1.0))

    def _failed(self, cause: str, begun: float) -> None:
        with self._lock:
            self._cause, self._failures = cause, self._failures + 1
            self._since = begun if self._since is None else min(self._since, begun)
            self._next = time.monotonic() + self.REST
            self._check_outage()
            if self._failures == self.BREAK:
                console.print(f"[bold yellow]{escape(self.name)} is down[/] ({escape(cause)}). It is asked again every {self.REST:g} s; stop with Ctrl-C.", soft_wrap=True)  # fmt: skip

    def _there(self) -> None:
        with self._lock:
            if self._failures >= self.BREAK:
                console.print(f"{escape(self.name)} answers again.", soft_wrap=True)
            self._failures, self._since = 0, None
            self._answered += 1

    def _check_outage(self) -> None:
        """For those that hold the lock."""
        if self._since is not None and (waited := time.monotonic() - self._since) >= self.OUTAGE:
            raise UserError(
                f"{self.name} {self._cause}, for {waited / 60:.0f} minutes now. Nothing is lost: what it has answered is kept. Go on when it is back."
            )

    def ask(self, question: Any, attempts: int) -> Any:
        """The JSON that answers a request, tried several times.

        Raises:
            Refused: it cannot succeed.
            Unanswered: it did not.
        """
        for attempt in range(1, attempts + 1):
            try:
                return self._post(question)
            except Unanswered as again:
                if attempt == attempts:
                    raise
                longest = min(self.FIRST_WAIT * 2 ** (attempt - 1), self.LONGEST_WAIT)
                wait = min(again.wait, self.LONGEST_WAIT) if again.wait is not None else random.uniform(0, longest)
            self._sleep(wait)
        raise AssertionError

    def _post(self, question: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "accord"}
        if token := os.environ.get(self._token):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, data=json.dumps(question).encode(), headers=headers, method="POST")
        try:
            with OPENER.open(request, timeout=self.timeout) as response:
                data = response.read(LARGEST + 1)
                if response.length and len(data) <= LARGEST:
                    raise Unanswered("broke off in the middle of its answer")
        except urllib.error.HTTPError as error:
            told = f"answered {error.code}: {_body(error)}"
            if error.code in TRANSIENT:
                raise Unanswered(told, _seconds(error.headers.get("Retry-After"))) from None
            raise Refused(told, error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            text = "did not answer in time" if isinstance(reason, TimeoutError) else f"cannot be reached ({first_line(reason)})"
            raise Unanswered(text) from None
        if len(data) > LARGEST:
            raise Refused(f"answered more than {LARGEST >> 20} MiB")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Refused(f"answered what is not JSON: {data[:60]!r}") from None

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            safe_point("What the service has answered is kept.")
            if self.halt.is_set():
                raise Refused("was not waited for")
            time.sleep(min(left, 0.2))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token to whoever it names."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirects)


def _body(error: urllib.error.HTTPError) -> str:
    """The first line of an error's text; it may break off too."""
    try:
        with error:
            text = error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return first_line(ValueError(text or str(error.reason)))


def _seconds(given: str | None) -> float | None:
    """``Retry-After`` as seconds; dates are not understood, and left to our own waiting."""
    try:
        return None if given is None else max(float(given), 0.0)
    except ValueError:
        return None


class Answers:
    """A service's answers by what was asked, in a small database that several runs, and threads of one, may use at once.

    Where it cannot be used that is said once, and the run goes on without it.

    Args:
        path: of the database.
        url: the service; the same question to another is another.
        what: in words, such as ``reward``, for that message.
    """

    def __init__(self, path: Path, url: str, what: str) -> None:
        self._url, self._what, self._database = url, what, None
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS given (question BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")
        except (sqlite3.Error, OSError) as error:
            self._without(path, error)

    def of(self, questions: Iterable[Any]) -> list[tuple[Any] | None]:
        """For each question: (its answer,), or None if it is not known. Both are JSON."""
        keys = [self._key(question) for question in questions]
        with self._lock:
            if self._database is None:
                return [None] * len(keys)
            try:
                found = [self._database.execute("SELECT answer FROM given WHERE question = ?", (key,)).fetchone() for key in keys]
                return [None if row is None else (json.loads(row[0]),) for row in found]
            except (sqlite3.Error, ValueError, TypeError) as error:
                self._without(None, error)
                return [None] * len(keys)

    def keep(self, answered: Iterable[tuple[Any, Any]]) -> None:
        """Questions with their answers."""
        rows = [(self._key(question), json.dumps(answer)) for question, answer in answered]
        with self._lock:
            if self._database is None:
                return
            try:
                with self._database:
                    self._database.execute("BEGIN")
                    self._database.executemany("INSERT OR REPLACE INTO given VALUES (?, ?)", rows)
            except sqlite3.Error as error:
                self._without(None, error)

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _key(self, question: Any) -> bytes:
        return hashlib.sha256(json.dumps([self._url, question], sort_keys=True).encode()).digest()

    def _without(self, path: Path | None, error: Exception) -> None:
        self.close()
        where = f" {path}" if path else ""
        console.print(
            f"[yellow]The {self._what}'s answers cannot be kept{where} ({first_line(error)}); going on without.[/]", soft_wrap=True
        )
