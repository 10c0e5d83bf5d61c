"""Where reward training begins: the logistic probe of the starting model's last layer that predicts the preferences best.

The head is fitted alone, on the states that the starting model has after the last token of each completion. That is a convex
problem with one answer, found in seconds; the layers then begin from a head that already points the right way, and change less
(linear probing, then fine-tuning: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution"). With few or noisy preferences the probe alone is often all that they can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accord.data.records import PairGroup

FOLDS = 5
STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Of the ridge, for each prompt; tried from the strongest on."""
TICKS = (FOLDS + 1) * len(STRENGTHS)
"""How many fits there are at most."""


class Probe(NamedTuple):
    """A linear score of a state, ``state @ weight + bias``, whose mean over the training completions is 0.

    Attributes:
        weight: (H,) fp32.
        strength: of the ridge, for each prompt: half of it times the squared length of the weights of standardised states.
        log_loss: of the preferences, each predicted from the other folds; None if there are too few to leave some out.
    """

    weight: Tensor
    bias: float
    strength: float
    log_loss: float | None


class _Preferences(NamedTuple):
    scaled: Tensor  # (N,H) standardised states
    added: Tensor  # (N,) what each score has besides
    preferred: Tensor  # (P,) which of the states
    other: Tensor  # (P,)
    weights: Tensor  # (P,) a prompt's add up to its own
    prompt: np.ndarray  # (P,)

    def of(self, inside: np.ndarray) -> _Preferences:
        index = torch.from_numpy(np.flatnonzero(inside))
        return self._replace(
            preferred=self.preferred[index], other=self.other[index], weights=self.weights[index], prompt=self.prompt[inside]
        )

    def log_loss(self, weight: Tensor) -> Tensor:
        """Sum of -log P(preferred)."""
        scores = self.scaled @ weight + self.added
        return (self.weights * F.softplus(scores[self.other] - scores[self.preferred])).sum()


def fit_probe(
    states: Tensor,
    groups: Sequence[PairGroup],
    offsets: Sequence[int],
    added: Tensor | None = None,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Probe:
    """Fit the Bradley-Terry model whose score is linear in the states, with a ridge chosen by cross-validation over prompts.

    Minimises, over w, the sum over prompts of the weighted mean of -log sigma(w . difference), plus G strength |w|^2 / 2, where G is
    how many prompts there are. States are standardised for it (each number by its deviation over the completions).

    Args:
        states: (N,H) of the completions; group g's start at ``offsets[g]``.
        added: (N,) what each score has besides the probe, such as what length explains.
        seed: of the folds.
        tick: called after each of the :data:`TICKS` fits; what it raises ends it.
    """
    states = states.cpu().double()
    mean, deviation = states.mean(0), states.std(0, correction=0)
    scaled = (states - mean) / deviation.where(deviation > 1e-6 * deviation.max(), torch.inf)  # what never changes says nothing
    told = _preferences(scaled, groups, offsets, torch.zeros(len(states)) if added is None else added)
    fold = np.random.default_rng([seed, 5]).permutation(len(groups)) % FOLDS
    losses, left_out = torch.zeros(len(STRENGTHS), dtype=torch.float64), 0.0
    for k in range(FOLDS):
        inside = fold[told.prompt] != k
        if inside.any() and not inside.all():
            fitted, left = told.of(inside), told.of(~inside)
            losses += torch.stack([left.log_loss(w) for w in _path(fitted, STRENGTHS, 1e-5, tick)])
            left_out += float(left.weights.sum())
    best = int(losses.argmin()) if left_out else STRENGTHS.index(1.0)
    *_, weight = _path(told, STRENGTHS[: best + 1], 1e-7, tick)
    plain = (weight / deviation.where(deviation > 1e-6 * deviation.max(), torch.inf)).float()
    return Probe(plain, -float(mean.float() @ plain), STRENGTHS[best], float(losses[best]) / left_out if left_out else None)


def _preferences(scaled: Tensor, groups: Sequence[PairGroup], offsets: Sequence[int], added: Tensor) -> _Preferences:
    better, worse, weights, prompt = [], [], [], []
    for g, (group, at) in enumerate(zip(groups, offsets, strict=True)):
        whole = sum(pair.weight for pair in group.pairs)
        for pair in group.pairs:
            better.append(at + pair.preferred)
            worse.append(at + pair.other)
            weights.append(group.weight * pair.weight / whole)
            prompt.append(g)
    first, second = torch.tensor(better), torch.tensor(worse)
    return _Preferences(scaled, added.cpu().double(), first, second, torch.tensor(weights, dtype=torch.float64), np.array(prompt))


def _path(told: _Preferences, strengths: Sequence[float], exact: float, tick: Callable[[], None]) -> list[Tensor]:
    """The minimum for each strength, each found from the one before, where the gradient is at most ``exact``."""
    prompts = len(np.unique(told.prompt))
    weight = torch.zeros(told.scaled.shape[1], dtype=torch.float64, requires_grad=True)
    found = []
    for strength in strengths:
        search = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=exact, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def objective(search: torch.optim.LBFGS = search, strength: float = strength) -> Tensor:
            search.zero_grad()
            value: Tensor = told.log_loss(weight) / prompts + strength / 2 * weight @ weight
            value.backward()  # type: ignore[no-untyped-call]
            return value

        search.step(objective)  # type: ignore[no-untyped-call]
        found.append(weight.detach().clone())
        tick()
    return found
