"""What algorithms have in common: advantages from rewards, the three other terms of the objective, the update loop.

A policy-gradient algorithm is this class with its own :meth:`Algorithm.surrogate`. One that learns otherwise
(trust regions, Q-values) overrides what differs.
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
from accord.rl.advantages import gae, group_normalised, leave_one_out, returns_to_go
from accord.rl.experience import Experience, values_before
from accord.rl.kl import kl_estimate
from accord.rl.masked import masked_mean, masked_sum, whiten
from accord.rl.objective import entropy_bonus, value_loss
from accord.rl.optimize import Optimizer, means
from accord.rl.rewards import token_rewards
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy
from accord.rollout.scoring import Guide, Scored, kl_rows, score_states, states_of


class Algorithm:
    """J(theta) = surrogate + c2 * S - c1 * L_VF - kl_coef * KL (the last one if ``kl_in`` is ``loss``).

    Each term is logged as it stands in that sum (``term/...``).

    Attributes:
        baseline: moving average of the completions' returns (from their first token), for Monte-Carlo advantages; None before the first.
    """

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        del policy, critic
        self.settings = settings
        self.baseline: float | None = None

    # What is asked of the rollout.

    def guide(self) -> Guide | None:
        """What restricts the tokens while sampling and scoring; None is nothing."""
        return None

    def old_model(self, policy: Policy) -> Model | None:
        """A copy of the policy that sampled, if the loss compares whole distributions with it."""
        del policy
        return None

    # From scores to advantages.

    def rewards(self, e: Experience, kl_coef: float) -> Tensor:
        """(B,T): the score on the last token, what an environment gave at its turns' ends, minus the KL penalty if that stands here."""
        s, rollout, given = self.settings, e.rollout, e.rollout.step_rewards
        in_reward = kl_coef if s.kl_in == "reward" else 0.0
        rewards = token_rewards(
            e.scores if given is None else e.scores - given.sum(-1), e.kl, e.mask, rollout.last, in_reward, rollout.finished,
            s.truncation, s.truncation_penalty, s.gamma, e.final_values,
        )  # fmt: skip
        if given is not None:
            rewards = rewards + given
        return rewards.masked_fill(~e.mask, 0.0)  # a skipped row has none

    def advantages(self, e: Experience, kl_coef: float) -> Experience:
        """Fill in rewards, advantages and returns (the critic's target)."""
        s, rewards = self.settings, self.rewards(e, kl_coef)
        if s.advantage == "gae":
            advantages, returns = gae(rewards, e.values, e.mask, s.gamma, s.gae_lambda)
        elif s.advantage == "monte_carlo":
            returns = returns_to_go(rewards, e.mask, s.gamma)
            advantages = torch.where(e.mask, returns - self._moving_baseline(returns, e), 0.0)
        else:
            form = leave_one_out if s.advantage == "leave_one_out" else group_normalised
            returns = returns_to_go(rewards, e.mask, s.gamma)
            advantages = torch.where(e.mask, form(rewards.sum(-1), e.rollout.group, e.valid)[:, None], 0.0)
        if s.whiten_advantages:
            advantages = whiten(advantages, e.mask)
        return replace(e, rewards=rewards, advantages=advantages, returns=returns, kl_coef=kl_coef)

    def _moving_baseline(self, returns: Tensor, e: Experience) -> float:
        """The average before this rollout, so that it does not depend on the actions it judges; then take it in."""
        if not bool(e.valid.any()):
            return self.baseline or 0.0
        first = e.mask.to(torch.uint8).argmax(-1, keepdim=True)
        mean = float(returns.gather(1, first)[e.valid].mean())
        before = mean if self.baseline is None else self.baseline
        decay = self.settings.baseline_decay
        self.baseline = decay * before + (1 - decay) * mean
        return before

    # The loss.

    def surrogate(self, scored: Scored, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The policy's own term, to be maximised, over these rows' share of ``count`` tokens; and named scalars."""
        raise NotImplementedError

    def loss(self, policy: Policy, critic: ScalarModel | None, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-J(theta) over these rows' share of the ``count`` response tokens of the optimizer step."""
        s, mask = self.settings, rows.mask
        states = states_of(policy.model, rows.rollout, policy.split)
        nucleus = None if rows.guide is None else rows.guide.nucleus(rows.rollout)
        scored = score_states(policy.model, rows.rollout, states, s.temperature, nucleus)
        surrogate, stats = self.surrogate(scored, rows, count)
        entropy = entropy_bonus(scored.entropy, mask, count)
        terms = {"surrogate": surrogate, "entropy": s.entropy_coef * entropy}
        stats = {**stats, "objective/entropy": entropy}
        if critic is not None:
            values, _ = values_before(critic, rows.rollout)
            value = value_loss(values, rows.returns, mask, rows.values, s.value_clip, count)
            terms["value"] = -s.value_coef * value.loss
            stats |= {"objective/value_loss": value.loss, "value_clip_fraction": value.clip_fraction}
        terms |= self.penalties(policy, rows, states, scored, count)
        return -torch.stack(list(terms.values())).sum(), {**stats, **{f"term/{name}": term for name, term in terms.items()}}

    def penalties(self, policy: Policy, rows: Experience, states: Tensor, scored: Scored, count: Tensor) -> dict[str, Tensor]:
        """Further terms of J: -kl_coef * E_t[KL to the reference], if that stands in the loss. states (N,D) before the response tokens."""
        s = self.settings
        if s.kl_in != "loss":
            return {}
        if s.kl_estimator == "full":
            kl = kl_rows(policy.model, rows.rollout, states, policy.start, policy.trunk_layers, s.temperature)
        else:
            if rows.guide is not None:  # the KL is of the policy without its mask
                scored = score_states(policy.model, rows.rollout, states, s.temperature)
            kl = kl_estimate(scored.logprobs, rows.ref_logprobs, s.kl_estimator)
        return {"kl": -rows.kl_coef * masked_mean(kl, rows.mask, count)}

    # The update.

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: Optimizer, e: Experience, step: int) -> dict[str, float]:
        """Epochs x minibatches of optimizer steps; the mean of each named scalar over them."""
        s, history = self.settings, []
        for epoch in range(s.epochs):
            order = np.random.default_rng([s.seed, step, epoch]).permutation(len(e.scores))
            for rows in np.split(order, s.minibatches):
                batch = e.select(torch.from_numpy(rows))
                history.append(optimizer.step(batch, lambda rows, count: self.loss(policy, critic, rows, count)))
        return means(history)

    # What a checkpoint must hold besides policy, critic and optimizer.

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def about(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        del tensors
        self.baseline = about["baseline"]


def step_sizes(log_ratio: Tensor, mask: Tensor, count: Tensor) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, a token."""
    with torch.no_grad():
        log_ratio = torch.where(mask, log_ratio, 0.0)
        return {
            "ratio_error": masked_sum((log_ratio.exp() - 1).abs(), mask) / count,
            "kl_old_new": masked_sum(torch.expm1(log_ratio) - log_ratio, mask) / count,
        }
