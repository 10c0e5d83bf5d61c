"""What learners of Q-values have in common: a target network, and rewards instead of advantages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from accord.nn.loading import Model
from accord.reward.model import ScalarModel
from accord.rl.advantages import returns_to_go
from accord.rl.algorithms.base import Algorithm
from accord.rl.experience import Experience
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy, snapshot_of, take_over, tensors_of


class QLearning(Algorithm):
    """Attributes:
    target: policy and critic as they were when :meth:`follow` last took them.
    """

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        super().__init__(settings, policy, critic)
        assert critic is not None
        self._trained = {"policy": list(policy.trainable()), "critic": list(critic.trainable())}
        self.target: tuple[Model, ScalarModel] = policy.snapshot(), snapshot_of(critic)

    def follow(self, policy: Policy, critic: ScalarModel, step: int) -> None:
        """Take the current networks for the target, every ``target_every`` steps."""
        if step and step % self.settings.target_every == 0:
            self.target = policy.snapshot(), snapshot_of(critic)

    def advantages(self, e: Experience, kl_coef: float) -> Experience:
        """Rewards; the returns are for looking at."""
        rewards = self.credit.rewards(e, kl_coef)
        return replace(e, rewards=rewards, returns=returns_to_go(rewards, e.mask, self.settings.gamma), kl_coef=kl_coef)

    def tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for (name, trained), module in zip(self._trained.items(), self.target, strict=True):
            out |= {f"target/{name}/{n}": tensor for n, tensor in tensors_of(module, trained).items()}
        return out

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().restore(tensors, about)
        for (name, trained), module in zip(self._trained.items(), self.target, strict=True):
            take_over(module, {n: tensors[f"target/{name}/{n}"] for n in trained})
