"""Proximal policy optimization, clipped (Schulman et al. 2017), as used from human feedback (Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from accord.reward.model import ScalarModel
from accord.rl.advantages import gae
from accord.rl.experience import Experience, values_before
from accord.rl.masked import whiten
from accord.rl.objective import clipped_surrogate, entropy_bonus, value_loss
from accord.rl.optimize import Optimizer
from accord.rl.rewards import token_rewards
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy
from accord.rollout.scoring import score_rows


class PPO:
    """J(theta) = E_t[J_CLIP - c1 * L_VF + c2 * S], several epochs over each rollout."""

    def __init__(self, settings: RLSettings) -> None:
        self.settings = settings

    def advantages(self, e: Experience, kl_coef: float) -> Experience:
        """Per-token rewards, then GAE; whitened over the response tokens of the step."""
        s, rollout = self.settings, e.rollout
        rewards = token_rewards(
            e.scores, e.kl, e.mask, rollout.last, kl_coef, rollout.finished,
            s.truncation, s.truncation_penalty, s.gamma, e.final_values,
        )  # fmt: skip
        rewards = rewards.masked_fill(~e.mask, 0.0)  # a skipped row has none
        advantages, returns = gae(rewards, e.values, e.mask, s.gamma, s.gae_lambda)
        if s.whiten_advantages:
            advantages = whiten(advantages, e.mask)
        return replace(e, rewards=rewards, advantages=advantages, returns=returns)

    def loss(self, policy: Policy, critic: ScalarModel, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-J(theta) over these rows' share of the ``count`` response tokens of the optimizer step."""
        s, mask = self.settings, rows.mask
        scored = score_rows(policy.model, rows.rollout, policy.split, s.temperature)
        values, _ = values_before(critic, rows.rollout)
        surrogate = clipped_surrogate(scored.logprobs, rows.old_logprobs, rows.advantages, mask, s.clip_epsilon, count)
        value = value_loss(values, rows.returns, mask, rows.values, s.value_clip, count)
        entropy = entropy_bonus(scored.entropy, mask, count)
        objective = surrogate.objective - s.value_coef * value.loss + s.entropy_coef * entropy
        return -objective, {
            "objective/clip": surrogate.objective,
            "objective/value_loss": value.loss,
            "objective/entropy": entropy,
            "clip_fraction": surrogate.clip_fraction,
            "value_clip_fraction": value.clip_fraction,
            "ratio_error": surrogate.ratio_error,
            "kl_old_new": surrogate.approx_kl,
        }

    def update(self, policy: Policy, critic: ScalarModel, optimizer: Optimizer, e: Experience, step: int) -> dict[str, float]:
        """Epochs x minibatches of optimizer steps; the mean of each named scalar over them."""
        s, history = self.settings, []
        for epoch in range(s.epochs):
            order = np.random.default_rng([s.seed, step, epoch]).permutation(len(e.scores))
            for rows in np.split(order, s.minibatches):
                batch = e.select(torch.from_numpy(rows))
                history.append(optimizer.step(batch, lambda rows, count: self.loss(policy, critic, rows, count)))
        names = {name for stats in history for name in stats}
        return {name: float(np.mean([stats[name] for stats in history if name in stats])) for name in sorted(names)}
