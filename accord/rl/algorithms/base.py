"""What algorithms have in common: the three other terms of the objective and the update loop.

A policy-gradient algorithm is this class with its own :meth:`Algorithm.surrogate`. One that learns otherwise
(trust regions, Q-values) overrides what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.nn.loading import Model
from accord.reward.model import ScalarModel
from accord.rl.credit import Credit
from accord.rl.experience import Experience, values_before
from accord.rl.kl import kl_estimate
from accord.rl.masked import masked_mean
from accord.rl.objective import entropy_bonus, value_loss
from accord.rl.optimize import PolicyOptimizer, means
from accord.rl.settings import RLSettings
from accord.rollout.guides import Guide
from accord.rollout.policy import Policy
from accord.rollout.scoring import Scored, kl_rows, processor_of, score_states, states_of


class Algorithm:
    """J(theta) = surrogate + c2 * S - c1 * L_VF - kl_coef * KL (the last one if ``kl_in`` is ``loss``).

    Each term is logged as it stands in that sum (``term/...``).
    """

    def __init__(self, settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> None:
        del policy, critic
        self.settings = settings
        self.credit = Credit(settings)

    # What is asked of the rollout.

    def guide(self) -> Guide | None:
        """What makes another distribution of the policy's while sampling and scoring; None is nothing."""
        return None

    def old_model(self, policy: Policy) -> Model | None:
        """A copy of the policy that sampled, if the loss compares whole distributions with it."""
        del policy
        return None

    def advantages(self, e: Experience, kl_coef: float) -> Experience:
        """Fill in rewards, advantages and returns (the critic's target)."""
        return self.credit.assign(e, kl_coef)

    # The loss.

    def surrogate(self, scored: Scored, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The policy's own term, to be maximised, over these rows' share of ``count`` tokens; and named scalars."""
        raise NotImplementedError

    def loss(self, policy: Policy, critic: ScalarModel | None, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-J(theta) over these rows' share of the ``count`` response tokens of the optimizer step."""
        s, mask = self.settings, rows.mask
        states = states_of(policy.model, rows.rollout, policy.split)
        processor = None if rows.guide is None else processor_of(rows.guide, rows.rollout)
        scored = score_states(policy.model, rows.rollout, states, s.temperature, processor, s.entropy_coef != 0)
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
                scored = score_states(policy.model, rows.rollout, states, s.temperature, entropic=False)
            kl = kl_estimate(scored.logprobs, rows.ref_logprobs, s.kl_estimator)
        return {"kl": -rows.kl_coef * masked_mean(kl, rows.mask, count)}

    # The update.

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: PolicyOptimizer, e: Experience, step: int) -> dict[str, float]:
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
        return {"baseline": self.credit.baseline}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        del tensors
        self.credit.baseline = about["baseline"]
