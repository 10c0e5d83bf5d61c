"""The optimizer step of every kind of training: gradients accumulated in micro-batches, clipped, and never taken if not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from accord.checkpoints import adam_state, load_adam_state, under
from accord.errors import Diverged
from accord.nn.budget import TokenBudget


class Optimizer:
    """AdamW over named groups of parameters, each with its own learning rate and gradient norm.

    A step whose gradient is not finite is not taken; it is counted, and too many in a row are a divergence.

    Args:
        groups: by name, parameters by name and their learning rate.
        max_grad_norm: each group's gradient is scaled down to this norm.
        max_nonfinite: so many steps in a row that are not taken are a divergence.
        budget: padded tokens of a micro-batch.
        remedy: what to do about a divergence, besides a lower learning rate.

    Attributes:
        halvings: how often the learning rates were halved, after divergences.
        skipped, in_a_row: steps not taken, in all and just now.
    """

    def __init__(
        self,
        groups: Mapping[str, tuple[Mapping[str, Tensor], float]],
        max_grad_norm: float,
        max_nonfinite: int,
        budget: TokenBudget,
        remedy: str,
        weight_decay: float = 0.0,
    ) -> None:
        self.budget, self.halvings, self.skipped, self.in_a_row = budget, 0, 0, 0
        self._most, self._max_grad_norm, self._remedy = max_nonfinite, max_grad_norm, remedy
        self._named = {name: dict(parameters) for name, (parameters, _) in groups.items()}
        self._rates = [rate for _, rate in groups.values()]
        self._adam = torch.optim.AdamW(
            [{"params": list(p.values())} for p in self._named.values()],
            lr=0.0, weight_decay=weight_decay, betas=(0.9, 0.99), eps=1e-8, fused=True,
        )  # fmt: skip

    def set_rate(self, share: float) -> None:
        """From now on this share of the learning rates."""
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * share * 0.5**self.halvings

    def take(self, accumulate: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """One step.

        Args:
            accumulate: adds up the gradients in micro-batches of so many tokens and returns what it has to tell; called again, with
                nothing accumulated, where memory ran out.

        Returns:
            That, and ``grad_norm/GROUP``.

        Raises:
            Diverged: too many steps in a row had a gradient that is not finite.
        """

        def from_nothing(tokens: int) -> dict[str, float]:
            self._adam.zero_grad(set_to_none=True)
            return accumulate(tokens)

        stats = self.budget.fit(from_nothing)
        norms = {name: torch.nn.utils.clip_grad_norm_(list(p.values()), self._max_grad_norm) for name, p in self._named.items()}
        if all(bool(torch.isfinite(norm)) for norm in norms.values()):
            self._adam.step()
            self.in_a_row = 0
        else:
            self.refuse()
        return stats | {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}

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
        if self.in_a_row >= self._most:
            raise Diverged(
                f"{self.in_a_row} optimizer steps in a row had a gradient that is not finite; none was taken, and the run "
                f"stops. The last checkpoint is whole. Lower learning_rate, {self._remedy}."
            )

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, for a checkpoint."""
        return {f"{group}/{name}": t for group, named in self._named.items() for name, t in adam_state(self._adam, named).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for group, named in self._named.items():
            load_adam_state(self._adam, named, under(f"{group}/", state))
