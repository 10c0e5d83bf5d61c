"""Rewards that a service gives over HTTP: a judge, a classifier on another machine.

It is asked ``POST URL`` with ``{"prompts": [...], "completions": [...]}`` and answers ``{"scores": [...]}``, a finite number
or null (skip) for each. Two empty lists are answered by an empty one: that is how a run sees at its start that it is there.
``ACCORD_REWARD_TOKEN``, if it is set, is sent as a bearer token.

What fails on the way is tried again, waiting longer each time, by a random share of it so that many runs do not return at
once ("full jitter": Brooker 2015). After several requests in a row that failed all the same, the service is left alone for a
while and then asked once (a circuit breaker: Nygard 2007). An outage is no completion's fault, so it rejects none: it is
waited for, and one that does not end stops the run with its state saved. Answers are kept by content, on disk, as they come:
the same text is never paid twice.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from accord.errors import UserError, first_line
from accord.nn.bundled import cache_folder
from accord.progress import console, safe_point
from accord.reward.functions import Contained, Failed
from accord.reward.worker import plain
from accord.rollout.rollout import Rollout

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Status codes after which the same request may succeed."""
LARGEST = 2**24  # bytes of an answer


class RemoteSource(Contained):
    """A service at a URL.

    Attributes:
        asked: completions that the service was asked about, by this process.
    """

    EACH = 16  # completions a request
    ATTEMPTS = 6
    FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds
    BREAK, REST = 3, 60.0  # requests in a row that failed all the same, and the seconds for which the service is then left alone
    OUTAGE = 900.0  # seconds after which a run stops that is waiting for its service

    def __init__(self, url: str, timeout: float = 60.0, cache: Path | None = None) -> None:
        super().__init__(url, timeout)
        try:
            parts = urllib.parse.urlsplit(url)
            _ = parts.port, url.encode("ascii"), (parts.hostname or "").encode("idna")
        except ValueError as error:
            raise UserError(f"Reward '{url}' is no URL ({first_line(error)}); write http://HOST[:PORT]/PATH in ASCII.") from None
        if not parts.hostname:
            raise UserError(f"Reward '{url}' names no host; write http://HOST[:PORT]/PATH.")
        token = os.environ.get("ACCORD_REWARD_TOKEN", "")
        if not (token.isascii() and token.isprintable()):
            raise UserError("ACCORD_REWARD_TOKEN has characters that no header may hold (a line end?); set it again.")
        self.asked = 0
        self._answers = Answers(cache or cache_folder() / "rewards.sqlite", url)
        try:
            self._request([], [], attempts=2)
        except (Failed, _Again) as failed:
            raise UserError(
                f'Reward \'{url}\' {failed.cause}. It must answer {{"prompts": [], "completions": []}} with {{"scores": []}} (docs/reliability.md).'
            ) from None

    def score(self, rollout: Rollout) -> list[float | None]:
        prompts, texts = [p.text for p in rollout.prompts], list(rollout.texts)
        out: list[float | None] = [None] * len(texts)
        self.rejects = []
        known = self._answers.of(zip(prompts, texts, strict=True))
        missing = []
        first: dict[tuple[str, str], int] = {}
        for row, answer in enumerate(known):
            if answer is not None:
                out[row] = answer[0]
            elif first.setdefault((prompts[row], texts[row]), row) == row:
                missing.append(row)
        for start in range(0, len(missing), self.EACH):
            rows = missing[start : start + self.EACH]
            safe_point("What the service has answered is kept.")
            try:
                values = self._request_or_wait([prompts[i] for i in rows], [texts[i] for i in rows])
            except Failed as failed:
                self._reject(rows, failed.cause)
                continue
            taken = self._take(rows, values, out)
            self._answers.keep([(prompts[i], texts[i], out[i]) for i in taken])
        causes = {reject.row: reject.cause for reject in self.rejects}
        for row, answer in enumerate(known):  # the same text again
            same = first.get((prompts[row], texts[row]), row)
            if answer is None and same != row:
                out[row] = out[same]
                if same in causes:
                    self._reject([row], causes[same])
        self.rejects.sort(key=lambda reject: reject.row)
        return out

    def _request_or_wait(self, prompts: list[str], completions: list[str]) -> list[Any]:
        """:meth:`_request`, over outages of the service.

        Raises:
            Failed: the service is there and does not like the question, or its answer cannot be used.
            UserError: the outage does not end.
        """
        since, failed = time.monotonic(), 0
        while True:
            try:
                values = self._request(prompts, completions, self.ATTEMPTS if failed < self.BREAK else 1)
            except _Again as again:
                failed += 1
                waited = time.monotonic() - since
                if waited >= self.OUTAGE:
                    raise UserError(
                        f"Reward '{self.name}' {again.cause}, for {waited / 60:.0f} minutes now. Nothing is lost: what it has answered is "
                        "kept. Go on when it is back."
                    ) from None
                if failed == self.BREAK:
                    console.print(f"[bold yellow]The reward {self.name} is down[/] ({escape(again.cause)}). It is asked again every {self.REST:g} s; stop with Ctrl-C.", soft_wrap=True)  # fmt: skip
                if failed >= self.BREAK:
                    self._sleep(self.REST)
                continue
            if failed >= self.BREAK:
                console.print(f"The reward {self.name} answers again.", soft_wrap=True)
            return values

    def _request(self, prompts: list[str], completions: list[str], attempts: int) -> list[Any]:
        """The values of one request, tried several times.

        Raises:
            Failed: it cannot succeed.
            _Again: it did not.
        """
        self.asked += len(completions)
        for attempt in range(1, attempts + 1):
            try:
                return list(plain(self._post(prompts, completions), len(completions)))
            except TypeError as error:
                raise Failed(str(error), halve=False) from None
            except _Again as again:
                if attempt == attempts:
                    raise
                longest = min(self.FIRST_WAIT * 2 ** (attempt - 1), self.LONGEST_WAIT)
                wait = min(again.wait, self.LONGEST_WAIT) if again.wait is not None else random.uniform(0, longest)
            self._sleep(wait)
        raise AssertionError

    def _post(self, prompts: list[str], completions: list[str]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "accord"}
        if token := os.environ.get("ACCORD_REWARD_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        body = json.dumps({"prompts": prompts, "completions": completions}).encode()
        request = urllib.request.Request(self.name, data=body, headers=headers, method="POST")
        try:
            with OPENER.open(request, timeout=self.timeout) as response:
                data = response.read(LARGEST + 1)
                if response.length and len(data) <= LARGEST:
                    raise _Again("broke off in the middle of its answer")
        except urllib.error.HTTPError as error:
            told = f"answered {error.code}: {_body(error)}"
            if error.code in TRANSIENT:
                raise _Again(told, _seconds(error.headers.get("Retry-After"))) from None
            raise Failed(told, halve=False) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            text = "did not answer in time" if isinstance(reason, TimeoutError) else f"cannot be reached ({first_line(reason)})"
            raise _Again(text) from None
        if len(data) > LARGEST:
            raise Failed(f"answered more than {LARGEST >> 20} MiB", halve=False)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise Failed(f"answered what is not JSON: {data[:60]!r}", halve=False) from None
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise Failed(f"answered no list of scores: {str(answer)[:60]}", halve=False)
        return answer["scores"]

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            safe_point("What the service has answered is kept.")
            time.sleep(min(left, 0.2))

    def close(self) -> None:
        self._answers.close()


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


class _Again(Exception):
    """An attempt failed and another may not. ``wait``: seconds that the service asks for."""

    def __init__(self, cause: str, wait: float | None = None) -> None:
        super().__init__(cause)
        self.cause, self.wait = cause, wait


def _seconds(given: str | None) -> float | None:
    """``Retry-After`` as seconds; dates are not understood, and left to our own waiting."""
    try:
        return None if given is None else max(float(given), 0.0)
    except ValueError:
        return None


class Answers:
    """A service's scores by what was asked, in a small database that several runs may use at once.

    Where it cannot be used that is said once, and the run goes on without it.
    """

    def __init__(self, path: Path, url: str) -> None:
        self._url, self._database = url, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")
        except (sqlite3.Error, OSError) as error:
            self._without(path, error)

    def of(self, questions: Any) -> list[tuple[float | None] | None]:
        """For each (prompt, completion): (its score,), or None if it is not known."""
        keys = [self._key(*question) for question in questions]
        if self._database is None:
            return [None] * len(keys)
        try:
            found = [self._database.execute("SELECT score FROM answers WHERE question = ?", (key,)).fetchone() for key in keys]
        except sqlite3.Error as error:
            self._without(None, error)
            return [None] * len(keys)
        return found

    def keep(self, answered: Sequence[tuple[str, str, float | None]]) -> None:
        if self._database is None:
            return
        rows = [(self._key(prompt, completion), score) for prompt, completion, score in answered]
        try:
            with self._database:
                self._database.execute("BEGIN")
                self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._without(None, error)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _key(self, prompt: str, completion: str) -> bytes:
        return hashlib.sha256(json.dumps([self._url, prompt, completion]).encode()).digest()

    def _without(self, path: Path | None, error: Exception) -> None:
        self.close()
        where = f" {path}" if path else ""
        console.print(f"[yellow]The reward's answers cannot be kept{where} ({first_line(error)}); going on without.[/]", soft_wrap=True)
