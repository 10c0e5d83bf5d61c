"""The criteria that simulated labelers and the gold score go by, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from accord.data.records import Completion
from accord.errors import UserError, did_you_mean
from accord.feedback import criterion as plain
from accord.stories.stories import read_story, read_wish


@dataclass(frozen=True)
class Judged:
    """A completion by a criterion. ``gold``: 0 to 1; ``nonsense``: what a labeler marks ``F``; ``measures``: what else it says of it."""

    gold: float
    nonsense: bool
    measures: dict[str, float] = field(default_factory=dict)


class Criterion(Protocol):
    version: str

    def judge(self, completions: Sequence[Completion]) -> list[Judged]:
        """The noiseless judgement of each completion."""
        ...


class PlainShortDecent:
    """``accord/feedback/criterion.md``, of short answers in English."""

    version = plain.VERSION

    def judge(self, completions: Sequence[Completion]) -> list[Judged]:
        return [Judged(j.gold, j.nonsense) for j in plain.judge(completions)]


ENDING = {"kind": 1.0, "plain": 0.4, "selfish": 0.0}


class Stories:
    """Of stories of accord's own grammar (:mod:`accord.stories`): half for being what was asked for, half for a kind ending.

    What is not of the grammar is nonsense. Measures: ``parses``, ``follows`` (parses and is what was asked for), ``kind``.
    """

    version = "stories-kind-1"

    def judge(self, completions: Sequence[Completion]) -> list[Judged]:
        out = []
        for completion in completions:
            story, wish = read_story(completion.text) if completion.finished else None, read_wish(completion.prompt.text)
            follows = story is not None and (wish is None or wish.fulfilled(story))
            kind = 0.0 if story is None else ENDING[story.ending]
            gold = 0.0 if story is None else 0.5 * follows + 0.5 * kind
            measures = {"parses": float(story is not None), "follows": float(follows), "kind": float(kind == 1.0)}
            out.append(Judged(gold, story is None, measures))
        return out


CRITERIA: dict[str, Criterion] = {"plain-short-decent": PlainShortDecent(), "stories": Stories()}


def criterion(name: str) -> Criterion:
    """Raises:
    UserError: there is none of that name.
    """
    if name not in CRITERIA:
        raise UserError(f"No criterion '{name}'; there is {', '.join(CRITERIA)}.{did_you_mean(name, CRITERIA)}")
    return CRITERIA[name]
