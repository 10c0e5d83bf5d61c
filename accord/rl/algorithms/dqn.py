"""Deep Q-learning over tokens (Mnih et al. 2015), with a dueling form in which the policy stays a language model.

    Q(s, a) = V(s) + q_scale * (z_a(s) - max_b z_b(s))          (Wang et al. 2016, eq. 8)

z are the policy's logits / temperature and V is the critic, so V(s) = max_a Q(s, a). Exploring by softmax(z) is
Boltzmann exploration, softmax(Q / q_scale): at the start that is the language model itself, and the trained policy is
one too. Epsilon-greedy is the other choice. Targets are n-step returns with double Q-learning (van Hasselt et al.
2016): the online network chooses the action, the target network says its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.reward.model import ScalarModel
from accord.rl.advantages import n_step_targets
from accord.rl.algorithms.qlearning import QLearning
from accord.rl.experience import Experience, add_trunk, values_before
from accord.rl.masked import masked_mean
from accord.rl.optimize import PolicyOptimizer, means
from accord.rl.qvalues import logits_at
from accord.rl.replay import Replay
from accord.rl.settings import RLSettings
from accord.rollout.guides import Explore, Guide
from accord.rollout.policy import Policy
from accord.rollout.scoring import spread


class DQN(QLearning):
    """Replay of the last rollouts, a target network that follows every ``target_every`` steps."""

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        super().__init__(settings, policy, critic)
        self.replay = Replay(settings.replay_steps)

    def guide(self) -> Guide | None:
        """Epsilon-greedy, if that explores; else the policy itself does (Boltzmann)."""
        return Explore(self.settings.epsilon) if self.settings.exploration == "epsilon" else None

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: PolicyOptimizer, e: Experience, step: int) -> dict[str, float]:
        """Epochs x minibatches of optimizer steps on rows drawn from the replay."""
        assert critic is not None
        s, history = self.settings, []
        self.replay.add(e)
        self.follow(policy, critic, step)
        for number in range(s.epochs * s.minibatches):
            rng = np.random.default_rng([s.seed, step, number])
            rows = self.replay.sample(rng, len(e.scores) // s.minibatches, e)
            optimizer.budget.fit(lambda tokens, rollout=rows.rollout: add_trunk(policy, rollout, tokens))  # type: ignore[misc]
            history.append(optimizer.step(rows, lambda rows, count: self.td_loss(policy, critic, self.with_targets(policy, rows), count)))
        return means(history)

    @torch.no_grad()
    def with_targets(self, policy: Policy, rows: Experience) -> Experience:
        """The n-step double-Q target of every token, as the rows' returns."""
        s, (model, critic) = self.settings, self.target
        best = logits_at(policy.model, rows, policy.split, s.temperature).best
        theirs = logits_at(model, rows, policy.split, s.temperature, best)
        bootstrap = values_before(critic, rows.rollout)[0] + s.q_scale * spread(theirs.chosen - theirs.largest, rows.rollout)
        return replace(rows, returns=n_step_targets(rows.rewards, bootstrap, rows.mask, s.gamma, s.n_step))

    def td_loss(self, policy: Policy, critic: ScalarModel, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """E_t[(Q(s_t, a_t) - y_t)^2 / 2]."""
        s = self.settings
        z = logits_at(policy.model, rows, policy.split, s.temperature)
        q = values_before(critic, rows.rollout)[0] + s.q_scale * spread(z.chosen - z.largest, rows.rollout)
        loss = 0.5 * masked_mean((q - rows.returns) ** 2, rows.mask, count)
        return loss, {"objective/td": loss, "q_mean": masked_mean(q, rows.mask, count).detach()}

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self.replay.tensors()}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().restore(tensors, about)
        self.replay.restore(tensors)
