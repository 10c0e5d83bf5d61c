"""Implicit language Q-learning (Snell et al. 2022): offline, from logged completions with scores.

    Q(s, a) = V(s) + q_scale * (z_a(s) - z_ref,a(s))

z are the policy's logits / temperature, z_ref the reference's, and V is the critic. Q is regressed on r + gamma V(s')
and V on an upper expectile of Q over the logged tokens (eq. 4), so that V comes near max_a Q(s, a) without asking for
a token that was never logged.

With beta = 1 / q_scale, the reference perturbed by the advantage, pi_ref(a|s) exp(beta (Q(s, a) - V(s))) (sec. 4.3),
is then softmax(z): the policy itself, an ordinary language model. Another beta can be had at decoding
(:class:`accord.rollout.guides.Perturb`, ``accord sample --reference``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from accord.nn.logprobs import Contrast, token_stats
from accord.reward.model import ScalarModel
from accord.rl.advantages import n_step_targets
from accord.rl.algorithms.qlearning import QLearning
from accord.rl.experience import Experience, values_before
from accord.rl.masked import masked_mean
from accord.rl.objective import expectile_loss
from accord.rl.optimize import PolicyOptimizer
from accord.rl.qvalues import token_logits
from accord.rollout.policy import Policy
from accord.rollout.scoring import spread, states_of


class ILQL(QLearning):
    """Epochs x minibatches of optimizer steps on each step's logged completions; nothing is sampled."""

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: PolicyOptimizer, e: Experience, step: int) -> dict[str, float]:
        assert critic is not None
        self.follow(policy, critic, step)
        return super().update(policy, critic, optimizer, e, step)

    def loss(self, policy: Policy, critic: ScalarModel | None, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert critic is not None
        theirs = self.reference(policy, rows)
        return self.q_loss(policy, critic, self.with_targets(policy, critic, rows, theirs), count, theirs)

    @torch.no_grad()
    def reference(self, policy: Policy, rows: Experience) -> Contrast:
        """q_scale * (z - z_ref), with the reference's states before each of the N response tokens."""
        states = states_of(policy.start, rows.rollout, policy.trunk_layers)
        return Contrast(states, policy.start.output_matrix, self.settings.q_scale, base=0.0)

    def advantage(self, states: Tensor, matrix: Tensor, rows: Experience, theirs: Contrast) -> Tensor:
        """Q(s_t, a_t) - V(s_t) of the rollout's tokens, (B,T). states (N,D), matrix (V,D): of a policy. Differentiable."""
        s, tokens = self.settings, rows.rollout.tokens[rows.rollout.response_mask]
        z, z_ref = (token_logits(h, w, tokens, s.temperature) for h, w in ((states, matrix), (theirs.hidden, theirs.matrix)))
        return s.q_scale * spread(z - z_ref, rows.rollout)

    @torch.no_grad()
    def with_targets(self, policy: Policy, critic: ScalarModel, rows: Experience, theirs: Contrast) -> Experience:
        """What Q is regressed on (r + gamma V(s'), or n steps of it) as the returns; the target network's Q as the values."""
        s, rollout, (model, old_critic) = self.settings, rows.rollout, self.target
        y = n_step_targets(rows.rewards, values_before(critic, rollout)[0], rows.mask, s.gamma, s.n_step)
        q = values_before(old_critic, rollout)[0]
        q = q + self.advantage(states_of(model, rollout, policy.split), model.output_matrix, rows, theirs)
        return replace(rows, returns=y, values=q)

    def q_loss(
        self, policy: Policy, critic: ScalarModel, rows: Experience, count: Tensor, theirs: Contrast
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """E_t[(Q - y)^2] + E_t[L2_tau(Q_target - V)] - cql_coef E_t[log softmax(Q(s_t, .))_a] (eq. 4, and 5 for the last term).

        The first and the last teach the policy's logits alone, the second the critic alone.
        """
        s, rollout, matrix = self.settings, rows.rollout, policy.model.output_matrix
        states, value = states_of(policy.model, rollout, policy.split), values_before(critic, rollout)[0]
        q = value.detach() + self.advantage(states, matrix, rows, theirs)
        among = token_stats(states, matrix, rollout.tokens[rollout.response_mask], s.temperature, theirs, entropic=False).logprobs
        td = masked_mean((q - rows.returns) ** 2, rows.mask, count)
        expectile = expectile_loss(rows.values - value, s.expectile, rows.mask, count)
        cql = -masked_mean(spread(among, rollout), rows.mask, count)
        named = {"objective/td": td, "objective/value_loss": expectile, "objective/cql": cql}
        return td + expectile + s.cql_coef * cql, {**named, "q_mean": masked_mean(q, rows.mask, count).detach()}
