"""Simulated labelers: honestly named, for demos and tests. They see the criterion through weights and noise of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from accord.data.records import Completion, RankedCompletions, Ranking
from accord.errors import UserError, did_you_mean
from accord.feedback.criteria import Stories
from accord.feedback.criterion import VERSION, Parts, judge, weighted


@dataclass(frozen=True)
class SimulatedLabeler:
    """Ranks by its own weighted sum plus Gaussian noise; scores closer than ``tie`` share a rank."""

    name: str
    weights: Parts
    noise: float
    tie: float

    def rank(self, completions: Sequence[Completion], seed: int) -> Ranking:
        """One ranking of the K completions of one prompt; the noise depends on seed, labeler and prompt alone."""
        judged = judge(completions)
        seen = [None if j.nonsense else weighted(j.parts, self.weights) for j in judged]
        return _ranked(self.name, completions, seen, self.noise, self.tie, VERSION, seed)


@dataclass(frozen=True)
class StoryLabeler:
    """Ranks by the gold score of stories plus Gaussian noise; scores closer than ``tie`` share a rank."""

    name: str
    noise: float
    tie: float

    def rank(self, completions: Sequence[Completion], seed: int) -> Ranking:
        seen = [None if j.nonsense else j.gold for j in Stories().judge(completions)]
        return _ranked(self.name, completions, seen, self.noise, self.tie, Stories.version, seed)


def _ranked(
    name: str, completions: Sequence[Completion], seen: Sequence[float | None], noise: float, tie: float, version: str, seed: int
) -> Ranking:  # fmt: skip
    """``seen``: what a labeler makes of each, before the noise; None is ``F``."""
    prompt_id = completions[0].prompt.id
    rng = np.random.default_rng([seed, *f"{name}/{prompt_id}".encode()])
    luck = [rng.normal(0, noise) for _ in completions]
    scores = {k: score + luck[k] for k, score in enumerate(seen) if score is not None}
    ranks: list[int | None] = [None] * len(completions)
    rank, last = 0, float("inf")
    for k in sorted(scores, key=lambda k: -scores[k]):
        if last - scores[k] > tie:  # measured from the best of a rank, so that ties do not chain
            rank, last = rank + 1, scores[k]
        ranks[k] = rank
    return Ranking(prompt_id, name, tuple(ranks), version, simulated=True)


PANELS: dict[str, tuple[SimulatedLabeler | StoryLabeler, ...]] = {
    "hhh": (
        SimulatedLabeler("simulated-careful", Parts(0.22, 0.28, 0.15, 0.25, 0.10), noise=0.01, tie=0.03),
        SimulatedLabeler("simulated-brisk", Parts(0.15, 0.20, 0.25, 0.20, 0.20), noise=0.02, tie=0.05),
        SimulatedLabeler("simulated-kind", Parts(0.15, 0.22, 0.13, 0.40, 0.10), noise=0.04, tie=0.04),
    ),
    "stories": tuple(StoryLabeler(f"simulated-{name}", noise, 0.05) for name, noise in (("first", 0.1), ("second", 0.15), ("third", 0.2))),
}


@dataclass(frozen=True)
class SimulatedPanel:
    labelers: tuple[SimulatedLabeler | StoryLabeler, ...]
    seed: int = 0

    def rank(self, completions: dict[str, list[Completion]]) -> RankedCompletions:
        """Every labeler ranks the completions of every prompt."""
        rankings = [labeler.rank(group, self.seed) for group in completions.values() for labeler in self.labelers]
        return RankedCompletions(completions, rankings)


def simulated_panel(name: str = "hhh", seed: int = 0) -> SimulatedPanel:
    """A named panel of simulated labelers: ``hhh``, or ``stories``."""
    if name not in PANELS:
        raise UserError(f"No simulated panel '{name}'; there is {', '.join(PANELS)}.{did_you_mean(name, PANELS)}")
    return SimulatedPanel(PANELS[name], seed)
