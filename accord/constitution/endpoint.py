"""OpenAI-compatible services: models that are asked over HTTP."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from accord.errors import UserError
from accord.nn.bundled import cache_folder
from accord.progress import bar, safe_point
from accord.service import Answers, Refused, Service

KEY = "ACCORD_JUDGE_KEY"
"""The environment variable whose value is sent as a bearer token."""
WRONG = {401, 403, 404}
"""Codes that no other question would change."""
Item = TypeVar("Item")
Made = TypeVar("Made")


class Endpoint:
    """A model behind ``POST URL/chat/completions``, as OpenAI's and most servers have it.

    What was answered is kept on disk as it comes and never asked again. Outages are waited for (:mod:`accord.service`).

    Args:
        what: it is, in words, such as ``Judge``.
        url: such as ``https://host/v1``.
        model: its name there.
        concurrency: requests at once.
        budget: tokens that may be used, as the service counts them; None is no limit.

    Attributes:
        used: tokens so far.
        asked: requests so far.
    """

    def __init__(
        self, what: str, url: str, model: str, concurrency: int = 8, budget: int | None = None, timeout: float = 60.0, cache: Path | None = None
    ) -> None:  # fmt: skip
        self.what, self.url, self.model = what, url, model
        self._concurrency, self._limit = concurrency, budget
        self._service = Service(what, f"{url.rstrip('/')}/chat/completions", KEY, timeout)
        self._answers = Answers(cache or cache_folder() / "judges.sqlite", self._service.url, what.lower())
        self.used = self.asked = 0
        self._lock = threading.Lock()

    @staticmethod
    def check_name(model: str | None, option: str) -> str:
        """Raises:
        UserError: no model is named.
        """
        if not model:
            raise UserError(f"A service has models of several names; say which with {option}.")
        return model

    @classmethod
    def named(cls, what: str, url: str, model: str | None, option: str, **more: Any) -> Endpoint:
        """Raises:
        UserError: no model is named.
        """
        return cls(what, url, cls.check_name(model, option), **more)

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of what is answered.

        Raises:
            Refused: there is none.
            UserError: the budget is used up, the service is down for too long, or URL, model or key are wrong.
        """
        question = {"model": self.model, **body}
        if (known := self._answers.of([question])[0]) is not None:
            return dict(known[0])
        with self._lock:
            if self._limit is not None and self.used >= self._limit:
                raise UserError(
                    f"The budget of {self._limit} tokens is used up, after {self.asked} requests. What was answered is kept: the same command "
                    "with a larger --budget goes on."
                )
            self.asked += 1
        try:
            answer = self._service.ask_or_wait(question)
        except Refused as refused:
            if refused.status in WRONG:
                raise UserError(
                    f"{self._service.name} {refused.cause}. Check the URL, the model's name '{self.model}', and the key in {KEY}."
                ) from None
            raise
        usage = answer.get("usage") if isinstance(answer, dict) else None
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        with self._lock:
            self.used += tokens if isinstance(tokens, int) else 0
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise Refused(f"answered no choice: {str(answer)[:60]}")
        text_of(choices[0])  # what has no text is asked again another time
        self._answers.keep([(question, choices[0])])
        return dict(choices[0])

    def each(self, work: Callable[[Item], Made], items: Sequence[Item], label: str | None = None) -> list[Made]:
        """``work`` on every item, as many at once as requests may be. The first error ends it; what was answered by then is kept.

        Args:
            label: of a progress bar; None shows none.
        """
        self._service.halt.clear()
        out: dict[int, Made] = {}
        waiting = iter(range(len(items)))
        running: dict[Future[Made], int] = {}
        with ThreadPoolExecutor(self._concurrency) as pool, bar(label, len(items)) if label else nullcontext() as progress:
            try:
                while True:
                    while len(running) < self._concurrency and (i := next(waiting, None)) is not None:
                        safe_point(f"What the {self.what.lower()} has answered is kept.")
                        running[pool.submit(work, items[i])] = i
                    if not running:
                        return [out[i] for i in range(len(items))]
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        out[running.pop(future)] = future.result()
                        if progress is not None:
                            progress.advance(1)
            except BaseException:
                self._service.halt.set()
                raise
            finally:
                for future in running:
                    future.cancel()

    def close(self) -> None:
        self._answers.close()


def text_of(choice: Mapping[str, Any]) -> str:
    """What the model said.

    Raises:
        Refused: nothing, or that it will not.
    """
    message = choice.get("message")
    said = message.get("content") if isinstance(message, dict) else None
    if not isinstance(said, str) or not said.strip():
        refusal = message.get("refusal") if isinstance(message, dict) else None
        raise Refused(f"refused: {str(refusal)[:60]}" if refusal else "answered without text")
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair is no character


def is_endpoint(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def name_of(spec: str) -> str:
    """As labels name a model: a run's policy by the run's folder, another folder by its own name, anything else as it is."""
    path = Path(spec).resolve()
    return (path.parent.name if path.name == "policy" else path.name) if os.path.isdir(spec) else spec
