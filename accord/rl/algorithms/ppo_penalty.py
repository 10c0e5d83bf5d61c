"""PPO with an adaptive penalty on KL[old, new] instead of the clip (Schulman et al. 2017, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from accord.nn.loading import Model
from accord.reward.model import ScalarModel
from accord.rl.algorithms.base import Algorithm
from accord.rl.experience import Experience
from accord.rl.masked import masked_mean
from accord.rl.objective import ratio_surrogate, step_sizes
from accord.rl.optimize import PolicyOptimizer
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy
from accord.rollout.scoring import Scored, kl_between, kl_rows


class PPOPenalty(Algorithm):
    """J_KLPEN = E_t[r_t A_t - beta KL[pi_old(.|s_t), pi(.|s_t)]] (eq. 8), KL over the whole vocabulary.

    Before the next rollout's updates: beta / 2 if the KL is below penalty_target / 1.5, beta * 2 if above 1.5 of it.
    """

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        super().__init__(settings, policy, critic)
        self.beta = settings.penalty_beta
        self.moved: float | None = None  # KL[old, new] of the last rollout's updates

    def old_model(self, policy: Policy) -> Model:
        return policy.snapshot()

    def surrogate(self, scored: Scored, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        objective = ratio_surrogate(scored.logprobs, rows.old_logprobs, rows.advantages, rows.mask, count)
        return objective, step_sizes(scored.logprobs - rows.old_logprobs, rows.mask, count)

    def penalties(self, policy: Policy, rows: Experience, states: Tensor, scored: Scored, count: Tensor) -> dict[str, Tensor]:
        assert rows.old_model is not None
        kl = kl_rows(policy.model, rows.rollout, states, rows.old_model, policy.split, self.settings.temperature, reverse=True)
        moved = -self.beta * masked_mean(kl, rows.mask, count)
        return {**super().penalties(policy, rows, states, scored, count), "kl_old_new": moved}

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: PolicyOptimizer, e: Experience, step: int) -> dict[str, float]:
        old = e.old_model
        assert old is not None
        if self.moved is not None:
            self.beta = adapted(self.beta, self.moved, self.settings.penalty_target)
        stats = super().update(policy, critic, optimizer, e, step)
        split, temperature = policy.split, self.settings.temperature
        kl = optimizer.budget.fit(lambda tokens: kl_between(old, policy.model, e.rollout, split, split, temperature, tokens))
        moved = float(masked_mean(kl, e.mask)) if bool(e.mask.any()) else 0.0
        self.moved = moved
        return {**stats, "penalty_beta": self.beta, "kl_old_new": moved}

    def about(self) -> dict[str, Any]:
        return {**super().about(), "beta": self.beta, "moved": self.moved}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().restore(tensors, about)
        self.beta, self.moved = float(about["beta"]), about["moved"]


def adapted(beta: float, kl: float, target: float) -> float:
    """The rule of the paper's section 4."""
    if kl < target / 1.5:
        return beta / 2
    return beta * 2 if kl > target * 1.5 else beta
