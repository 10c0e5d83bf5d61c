"""Rewards that a service gives over HTTP: a judge, a classifier on another machine.

It is asked ``POST URL`` with ``{"prompts": [...], "completions": [...]}`` and answers ``{"scores": [...]}``, a finite number
or null (skip) for each. Two empty lists are answered by an empty one: that is how a run sees at its start that it is there.
``ACCORD_REWARD_TOKEN``, if it is set, is sent as a bearer token. Outages and what was answered: :mod:`accord.service`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accord.errors import UserError
from accord.nn.bundled import cache_folder
from accord.progress import safe_point
from accord.reward.functions import Contained, Failed
from accord.reward.worker import plain
from accord.rollout.rollout import Rollout
from accord.service import Answers, Refused, Service, Unanswered


class RemoteSource(Contained):
    """A service at a URL.

    Attributes:
        asked: completions that the service was asked about, by this process.
    """

    EACH = 16  # completions a request

    def __init__(self, url: str, timeout: float = 60.0, cache: Path | None = None) -> None:
        super().__init__(url, timeout)
        self.asked = 0
        self._service = Service("Reward", url, "ACCORD_REWARD_TOKEN", timeout)
        self._answers = Answers(cache or cache_folder() / "rewards.sqlite", url, "reward")
        try:
            self._scores([], [], lambda question: self._service.ask(question, attempts=2))
        except (Failed, Unanswered) as failed:
            raise UserError(
                f'Reward \'{url}\' {failed.cause}. It must answer {{"prompts": [], "completions": []}} with {{"scores": []}} (docs/reliability.md).'
            ) from None

    def score(self, rollout: Rollout) -> list[float | None]:
        questions = [(p.text, text) for p, text in zip(rollout.prompts, rollout.texts, strict=True)]
        out: list[float | None] = [None] * len(questions)
        self.rejects = []
        known = self._answers.of(questions)
        missing = []
        first: dict[tuple[str, str], int] = {}
        for row, answer in enumerate(known):
            if answer is not None:
                out[row] = answer[0]
            elif first.setdefault(questions[row], row) == row:
                missing.append(row)
        for start in range(0, len(missing), self.EACH):
            rows = missing[start : start + self.EACH]
            safe_point("What the service has answered is kept.")
            try:
                values = self._scores([questions[i][0] for i in rows], [questions[i][1] for i in rows], self._service.ask_or_wait)
            except Failed as failed:
                self._reject(rows, failed.cause)
                continue
            taken = self._take(rows, values, out)
            self._answers.keep([(questions[i], out[i]) for i in taken])
        causes = {reject.row: reject.cause for reject in self.rejects}
        for row, answer in enumerate(known):  # the same text again
            same = first.get(questions[row], row)
            if answer is None and same != row:
                out[row] = out[same]
                if same in causes:
                    self._reject([row], causes[same])
        self.rejects.sort(key=lambda reject: reject.row)
        return out

    def _scores(self, prompts: list[str], completions: list[str], ask: Callable[[Any], Any]) -> list[Any]:
        """Raises:
        Failed: the answer cannot be used.
        Unanswered: there was none.
        """
        self.asked += len(completions)
        try:
            answer = ask({"prompts": prompts, "completions": completions})
            if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
                raise Refused(f"answered no list of scores: {str(answer)[:60]}")
            return list(plain(answer["scores"], len(completions)))
        except TypeError as error:
            raise Failed(str(error), halve=False) from None
        except Refused as refused:
            raise Failed(refused.cause, halve=False) from None

    def close(self) -> None:
        self._answers.close()
