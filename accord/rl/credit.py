"""Who gets the credit: from scores to rewards, advantages and returns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accord.rl.advantages import gae, group_normalised, leave_one_out, returns_to_go, truncated_ratio
from accord.rl.experience import Experience
from accord.rl.masked import whiten
from accord.rl.rewards import token_rewards
from accord.rl.settings import RLSettings


class Credit:
    """What the settings say of rewards and advantages.

    Attributes:
        baseline: moving average of the completions' returns (from their first token), for Monte-Carlo advantages; None before the first.
    """

    def __init__(self, settings: RLSettings) -> None:
        self.settings = settings
        self.baseline: float | None = None

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

    def assign(self, e: Experience, kl_coef: float) -> Experience:
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
        if s.rollout_weights != "same":  # every term that has an advantage is linear in it, so this weighs the tokens
            weight = truncated_ratio(e.old_logprobs, e.rollout.engine_logprobs, s.correction_cap)
            advantages = torch.where(e.mask, advantages * weight, 0.0)
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
