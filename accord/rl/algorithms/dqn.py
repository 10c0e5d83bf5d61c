"""Deep Q-learning over tokens (Mnih et al. 2015), with a dueling form in which the policy stays a language model.

    Q(s, a) = V(s) + q_scale * (z_a(s) - max_b z_b(s))          (Wang et al. 2016, eq. 8)

z are the policy's logits / temperature and V is the critic, so V(s) = max_a Q(s, a). Exploring by softmax(z) is
Boltzmann exploration, softmax(Q / q_scale); at the start it is the language model itself, and the trained policy is
one too. Targets are n-step returns with double Q-learning (van Hasselt et al. 2016): the online network chooses the
action, the target network says its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.nn.loading import Model
from accord.reward.model import ScalarModel
from accord.rl.advantages import n_step_targets, returns_to_go
from accord.rl.algorithms.base import Algorithm
from accord.rl.experience import Experience, add_trunk, values_before
from accord.rl.masked import masked_mean
from accord.rl.optimize import Optimizer, means
from accord.rl.qvalues import logits_at
from accord.rl.replay import Replay
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy, snapshot_of
from accord.rollout.rollout import micro_batches
from accord.rollout.scoring import spread


class DQN(Algorithm):
    """Replay of the last rollouts, a target network that follows every ``target_every`` steps."""

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        super().__init__(settings, policy, critic)
        assert critic is not None
        self.replay = Replay(settings.replay_steps)
        self._trained = {"policy": list(policy.trainable()), "critic": list(critic.trainable())}
        self._take(policy, critic)

    def _take(self, policy: Policy, critic: ScalarModel) -> None:
        self.target: tuple[Model, ScalarModel] = policy.snapshot(), snapshot_of(critic)

    def advantages(self, e: Experience, kl_coef: float) -> Experience:
        """Rewards; the returns are for looking at."""
        rewards = self.credit.rewards(e, kl_coef)
        return replace(e, rewards=rewards, returns=returns_to_go(rewards, e.mask, self.settings.gamma), kl_coef=kl_coef)

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: Optimizer, e: Experience, step: int) -> dict[str, float]:
        """Epochs x minibatches of optimizer steps on rows drawn from the replay."""
        assert critic is not None
        s, history = self.settings, []
        self.replay.add(e)
        if step and step % s.target_every == 0:
            self._take(policy, critic)
        for number in range(s.epochs * s.minibatches):
            rng = np.random.default_rng([s.seed, step, number])
            rows = self.replay.sample(rng, len(e.scores) // s.minibatches, e)
            add_trunk(policy, rows.rollout, s.micro_batch_tokens)
            rows = self.with_targets(policy, rows)
            history.append(optimizer.step(rows, lambda rows, count: self.td_loss(policy, critic, rows, count)))
        return means(history)

    @torch.no_grad()
    def with_targets(self, policy: Policy, e: Experience) -> Experience:
        """The n-step double-Q target of every token, as the rows' returns."""
        s, returns = self.settings, torch.zeros_like(e.rewards)
        for index in micro_batches(e.rollout.lengths, s.micro_batch_tokens):
            rows = e.select(index)
            best = logits_at(policy.model, rows, policy.split, s.temperature).best
            model, critic = self.target
            theirs = logits_at(model, rows, policy.split, s.temperature, best)
            bootstrap = values_before(critic, rows.rollout)[0] + s.q_scale * spread(theirs.chosen - theirs.largest, rows.rollout)
            returns[index, : rows.mask.shape[1]] = n_step_targets(rows.rewards, bootstrap, rows.mask, s.gamma, s.n_step)
        return replace(e, returns=returns)

    def td_loss(self, policy: Policy, critic: ScalarModel, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """E_t[(Q(s_t, a_t) - y_t)^2 / 2]."""
        s = self.settings
        z = logits_at(policy.model, rows, policy.split, s.temperature)
        q = values_before(critic, rows.rollout)[0] + s.q_scale * spread(z.chosen - z.largest, rows.rollout)
        loss = 0.5 * masked_mean((q - rows.returns) ** 2, rows.mask, count)
        return loss, {"objective/td": loss, "q_mean": masked_mean(q, rows.mask, count).detach()}

    def tensors(self) -> dict[str, Tensor]:
        out = self.replay.tensors()
        for name, module in zip(("policy", "critic"), self.target, strict=True):
            parameters = dict(module.named_parameters())
            out |= {f"target/{name}/{n}": parameters[n].detach() for n in self._trained[name]}
        return out

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().restore(tensors, about)
        self.replay.restore(tensors)
        for name, module in zip(("policy", "critic"), self.target, strict=True):
            parameters = dict(module.named_parameters())
            for n in self._trained[name]:
                parameters[n].data.copy_(tensors[f"target/{name}/{n}"])
