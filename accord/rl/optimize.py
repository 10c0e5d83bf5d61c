"""Gradient accumulation and the optimizer step, shared by every algorithm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from accord.checkpoints import adam_state, load_adam_state, under
from accord.errors import Diverged
from accord.nn.budget import TokenBudget
from accord.reward.model import ScalarModel
from accord.rl.experience import Experience, values_before
from accord.rl.objective import value_loss
from accord.rl.settings import RLSettings

Loss = Callable[[Experience, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
"""(rows, response tokens of the whole optimizer step) -> (loss, named scalars that add up over micro-batches)."""


class Optimizer:
    """AdamW over named groups of parameters, each with its own learning rate and gradient norm.

    A step whose gradient is not finite is not taken; it is counted, and too many in a row are a divergence.

    Attributes:
        budget: padded tokens of a micro-batch.
        halvings: how often the learning rates were halved, after divergences.
    """

    def __init__(
        self, groups: Mapping[str, tuple[Mapping[str, Tensor], float]], settings: RLSettings, budget: TokenBudget | None = None
    ) -> None:
        self._settings, self.budget, self.halvings = settings, budget or TokenBudget(settings.micro_batch_tokens), 0
        self._named = {name: dict(parameters) for name, (parameters, _) in groups.items()}
        self._groups = {name: list(parameters.values()) for name, parameters in self._named.items()}
        self._rates = [rate for _, rate in groups.values()]
        self._adam = torch.optim.AdamW(
            [{"params": p} for p in self._groups.values()], lr=0.0, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, fused=True
        )
        self.skipped, self.in_a_row = 0, 0

    def set_step(self, step: int) -> None:
        """Learning rates of training step ``step`` (from 0): a linear rise over ``warmup_steps``, then constant."""
        factor = min(1.0, (step + 1) / (self._settings.warmup_steps + 1)) * 0.5**self.halvings
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(self, rows: Experience, loss: Loss) -> dict[str, float]:
        """One optimizer step over ``rows``, in micro-batches whose gradients add up to that of all rows at once."""
        count = rows.mask.sum()
        if count == 0:
            return {}
        stats = self.budget.fit(lambda tokens: self._gradients(rows, loss, count, tokens))
        norms = {
            name: torch.nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm) for name, parameters in self._groups.items()
        }
        stats |= {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}
        if all(bool(torch.isfinite(norm)) for norm in norms.values()):
            self._adam.step()
            self.in_a_row = 0
        else:
            self.refuse()
        return dict(stats)

    def _gradients(self, rows: Experience, loss: Loss, count: Tensor, tokens: int) -> dict[str, float]:
        """Accumulate the gradients of ``rows`` from nothing; returns the sums of the named scalars."""
        stats: dict[str, float] = defaultdict(float)
        self._adam.zero_grad(set_to_none=True)
        for index in rows.rollout.micro_batches(tokens):
            value, named = loss(rows.select(index), count)
            value.backward()  # type: ignore[no-untyped-call]
            for name, scalar in named.items():
                stats[name] += float(scalar.detach())
        return stats

    def release(self) -> None:
        """Give back the gradients' memory until the next step."""
        self._adam.zero_grad(set_to_none=True)

    def refuse(self) -> None:
        """Count a step that is not taken because its gradient is not finite.

        Raises:
            Diverged: it was one too many in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self._settings.max_nonfinite:
            raise Diverged(
                f"{self.in_a_row} optimizer steps in a row had a gradient that is not finite; none was taken, and the run "
                "stops. The last checkpoint is whole. Lower learning_rate, set on_divergence to rollback, or look for extreme "
                "scores in completions.jsonl."
            )

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, for a checkpoint."""
        return {f"{group}/{name}": t for group, named in self._named.items() for name, t in adam_state(self._adam, named).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for group, named in self._named.items():
            load_adam_state(self._adam, named, under(f"{group}/", state))


def value_steps(critic: ScalarModel, optimizer: Optimizer, e: Experience, settings: RLSettings, step: int) -> dict[str, float]:
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
