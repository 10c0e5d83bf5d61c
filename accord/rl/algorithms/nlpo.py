"""Natural language policy optimization (Ramamurthy et al. 2022, algorithm 1): PPO over a learned set of tokens.

Every token is drawn from the policy restricted to the top-p set of a *mask policy*, which is the policy as it
was some steps ago. Old and new log-probabilities in the ratio are those of the restricted policy; the KL to the
reference is that of the unrestricted one, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from accord.reward.model import ScalarModel
from accord.rl.algorithms.ppo import PPO
from accord.rl.experience import Experience
from accord.rl.optimize import PolicyOptimizer
from accord.rl.settings import RLSettings
from accord.rollout.guides import Within
from accord.rollout.policy import Policy, take_over, tensors_of


class NLPO(PPO):
    """PPO with a mask policy that follows every ``mask_every`` steps."""

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        super().__init__(settings, policy, critic)
        self._split = policy.split
        self._trained = list(policy.trainable())
        self._mask = policy.snapshot()

    def guide(self) -> Within:
        return Within(self._mask, self._split, self.settings.mask_top_p)

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: PolicyOptimizer, e: Experience, step: int) -> dict[str, float]:
        stats = super().update(policy, critic, optimizer, e, step)
        if (step + 1) % self.settings.mask_every == 0:
            self._mask = policy.snapshot()
        return stats

    def tensors(self) -> dict[str, Tensor]:
        return {f"mask/{name}": tensor for name, tensor in tensors_of(self._mask, self._trained).items()}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().restore(tensors, about)
        take_over(self._mask, {name: tensors[f"mask/{name}"] for name in self._trained})
