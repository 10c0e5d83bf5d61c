"""The optimizer step of every kind of training: gradients accumulated in micro-batches, clipped, and never taken if not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from accord.checkpoints import under
from accord.errors import Diverged, UserError
from accord.nn.budget import TokenBudget

LOOKED_UP = ("embed", "wte", "wpe", "lm_head")
"""In the names of matrices whose rows are looked up, or are: of those of tokens and places. Muon leaves them to AdamW."""


class Optimizer:
    """AdamW, or Muon, over named groups of parameters, each with its own learning rate and gradient norm.

    A step whose gradient is not finite is not taken; it is counted, and too many in a row are a divergence.

    Args:
        groups: by name, parameters by name and their learning rate.
        max_grad_norm: each group's gradient is scaled down to this norm.
        max_nonfinite: so many steps in a row that are not taken are a divergence.
        budget: padded tokens of a micro-batch.
        remedy: what to do about a divergence, besides a lower learning rate.
        kind: ``muon`` orthogonalises the momentum of the layers' matrices (Jordan et al. 2024), scaled so that AdamW's learning rate
            serves (Liu et al. 2025); embeddings, norms and what is no matrix are AdamW's.

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
        betas: tuple[float, float] = (0.9, 0.99),
        kind: Literal["adamw", "muon"] = "adamw",
    ) -> None:
        self.budget, self.halvings, self.skipped, self.in_a_row = budget, 0, 0, 0
        self._most, self._max_grad_norm, self._remedy = max_nonfinite, max_grad_norm, remedy
        self._named = {name: dict(parameters) for name, (parameters, _) in groups.items()}
        self._rates = {name: rate for name, (_, rate) in groups.items()}
        turned = {
            id(p)
            for named in self._named.values()
            for name, p in named.items()
            if kind == "muon" and p.ndim == 2 and not any(word in name for word in LOOKED_UP)
        }
        sort = lambda is_turned: [
            {"params": some, "name": group}
            for group, named in self._named.items() if (some := [p for p in named.values() if (id(p) in turned) == is_turned])
        ]  # fmt: skip
        self._parts: list[torch.optim.Optimizer] = []
        if rest := sort(False):
            self._parts.append(torch.optim.AdamW(rest, lr=0.0, weight_decay=weight_decay, betas=betas, eps=1e-8, fused=True))
        if turned:
            self._parts.append(muon(sort(True), weight_decay))

    def set_rate(self, share: float) -> None:
        """From now on this share of the learning rates."""
        for group in (group for part in self._parts for group in part.param_groups):
            group["lr"] = self._rates[group["name"]] * share * 0.5**self.halvings

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
            self.release()
            return accumulate(tokens)

        stats = self.budget.fit(from_nothing)
        norms = {name: torch.nn.utils.clip_grad_norm_(list(p.values()), self._max_grad_norm) for name, p in self._named.items()}
        if all(bool(torch.isfinite(norm)) for norm in norms.values()):
            for part in self._parts:
                part.step()
            self.in_a_row = 0
        else:
            self.refuse()
        return stats | {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}

    def release(self) -> None:
        """Give back the gradients' memory until the next step."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

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
        of: dict[Tensor, Any] = {p: state for part in self._parts for p, state in part.state.items()}
        return {
            f"{group}/{name}/{key}": torch.as_tensor(value)
            for group, named in self._named.items() for name, p in named.items() for key, value in of.get(p, {}).items()
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        home = {p: part for part in self._parts for group in part.param_groups for p in group["params"]}
        for group, named in self._named.items():
            for name, p in named.items():
                home[p].state[p] = {key: t.to(p.device, copy=True) for key, t in under(f"{group}/{name}/", state).items()}


def muon(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """torch's Muon.

    Raises:
        UserError: this torch has none.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no Muon, which came with 2.9; install a newer one, or use --optimizer adamw.")
    return torch.optim.Muon(groups, lr=0.0, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
