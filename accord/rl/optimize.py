"""The optimizer step over experience, shared by every algorithm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from accord.nn.budget import TokenBudget
from accord.optimizer import Optimizer
from accord.reward.model import ScalarModel
from accord.rl.experience import Experience, values_before
from accord.rl.objective import value_loss
from accord.rl.settings import RLSettings

Loss = Callable[[Experience, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
"""(rows, response tokens of the whole optimizer step) -> (loss, named scalars that add up over micro-batches)."""


class PolicyOptimizer(Optimizer):
    """:class:`accord.optimizer.Optimizer` of policy and critic, over experience."""

    def __init__(
        self, groups: Mapping[str, tuple[Mapping[str, Tensor], float]], settings: RLSettings, budget: TokenBudget | None = None
    ) -> None:
        remedy = "set on_divergence to rollback, or look for extreme scores in completions.jsonl"
        budget = budget or TokenBudget(settings.micro_batch_tokens)
        super().__init__(groups, settings.max_grad_norm, settings.max_nonfinite, budget, remedy)
        self._warmup = settings.warmup_steps

    def set_step(self, step: int) -> None:
        """Learning rates of training step ``step`` (from 0): a linear rise over ``warmup_steps``, then constant."""
        self.set_rate(min(1.0, (step + 1) / (self._warmup + 1)))

    def step(self, rows: Experience, loss: Loss) -> dict[str, float]:
        """One optimizer step over ``rows``, in micro-batches whose gradients add up to that of all rows at once."""
        count = rows.mask.sum()
        return self.take(lambda tokens: self._gradients(rows, loss, count, tokens)) if count else {}

    def _gradients(self, rows: Experience, loss: Loss, count: Tensor, tokens: int) -> dict[str, float]:
        """Accumulate the gradients of ``rows``; returns the sums of the named scalars."""
        stats: dict[str, float] = defaultdict(float)
        for index in rows.rollout.micro_batches(tokens):
            value, named = loss(rows.select(index), count)
            value.backward()  # type: ignore[no-untyped-call]
            for name, scalar in named.items():
                stats[name] += float(scalar.detach())
        return dict(stats)


def value_steps(critic: ScalarModel, optimizer: PolicyOptimizer, e: Experience, settings: RLSettings, step: int) -> dict[str, float]:
    """``critic_epochs`` passes of the critic alone over a step's completions."""
    losses = []

    def loss(rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        values, _ = values_before(critic, rows.rollout)
        out = value_loss(values, rows.returns, rows.mask, rows.values, settings.value_clip, count)
        return out.loss, {"objective/value_loss": out.loss, "value_clip_fraction": out.clip_fraction}

    for epoch in range(settings.critic_epochs):
        order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(e.scores))
        losses += [optimizer.step(e.select(torch.from_numpy(rows)), loss) for rows in np.array_split(order, 2) if len(rows)]
    return means(losses)


def means(history: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each named scalar over the optimizer steps that have it."""
    names = {name for stats in history for name in stats}
    return {name: float(np.mean([stats[name] for stats in history if name in stats])) for name in sorted(names)}
