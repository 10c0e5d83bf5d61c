"""Trust region policy optimization (Schulman et al. 2015): the largest natural-gradient step within a KL limit.

    maximise E_t[r_t A_t]   subject to   E_t[KL[pi_old(.|s_t), pi(.|s_t)]] <= delta        (eq. 14)

The direction solves F x = g by conjugate gradients (appendix C), with F the Fisher information matrix, used only
through its products; a backtracking line search makes sure of both the limit and an improvement.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from accord.nn.budget import TokenBudget
from accord.nn.loading import Model
from accord.reward.model import ScalarModel
from accord.rl.algorithms.base import Algorithm
from accord.rl.experience import Experience
from accord.rl.masked import masked_mean
from accord.rl.natural import conjugate_gradient, fisher_vector_product
from accord.rl.objective import entropy_bonus, ratio_surrogate
from accord.rl.optimize import PolicyOptimizer, value_steps
from accord.rollout.policy import Policy
from accord.rollout.scoring import kl_between, score_states, states_of

BACKTRACKS = 10


class TRPO(Algorithm):
    """One trust-region step a rollout; the critic is fitted by AdamW."""

    def old_model(self, policy: Policy) -> Model:
        return policy.snapshot()

    def update(self, policy: Policy, critic: ScalarModel | None, optimizer: PolicyOptimizer, e: Experience, step: int) -> dict[str, float]:
        if not bool(e.mask.any()):
            return {}
        stats = self.policy_step(policy, e, optimizer.budget)
        if stats is None:
            optimizer.refuse()
            return {"accepted": 0.0}
        fitted = {} if critic is None else value_steps(critic, optimizer, e, self.settings, step)
        return {**fitted, **stats}

    def policy_step(self, policy: Policy, e: Experience, budget: TokenBudget) -> dict[str, float] | None:
        """g, then x = F^-1 g, then the line search along sqrt(2 delta / x^T F x) x. None: a gradient is not finite."""
        s, parameters = self.settings, list(policy.trainable().values())
        before = parameters_to_vector(parameters).detach().clone()
        start, gradient = budget.fit(lambda tokens: self.objective(policy, e, tokens, gradient=True))

        def fisher(v: Tensor) -> Tensor:
            return budget.fit(lambda tokens: fisher_vector_product(policy, e, v, s.temperature, tokens)) + s.cg_damping * v

        if not bool(torch.isfinite(gradient).all()):
            return None
        direction = conjugate_gradient(fisher, gradient, s.cg_iterations)
        if not bool(torch.isfinite(direction).all()):
            return None
        curvature = float(direction @ fisher(direction))
        stats = {"objective/policy": start, "grad_norm/policy": float(gradient.norm()), "line_search": 0.0, "kl_old_new": 0.0}
        if not curvature > 0:
            return stats | {"accepted": 0.0}  # no gradient at all: stay
        full = (2 * s.trust_region / curvature) ** 0.5 * direction
        for backtrack in range(BACKTRACKS):
            vector_to_parameters(before + 0.5**backtrack * full, parameters)
            kl = budget.fit(lambda tokens: self.moved(policy, e, tokens))
            now, _ = budget.fit(lambda tokens: self.objective(policy, e, tokens))
            if kl <= s.trust_region and now > start:
                return stats | {"line_search": float(backtrack), "kl_old_new": kl, "objective/policy": now, "accepted": 1.0}
        vector_to_parameters(before, parameters)
        return stats | {"line_search": float(BACKTRACKS), "accepted": 0.0}

    def objective(self, policy: Policy, e: Experience, token_budget: int, gradient: bool = False) -> tuple[float, Tensor]:
        """E_t[r_t A_t + c2 S] and, if asked for, its gradient as one vector."""
        s, parameters = self.settings, list(policy.trainable().values())
        total, slopes = 0.0, [torch.zeros_like(p) for p in parameters]
        for index in e.rollout.micro_batches(token_budget):
            rows = e.select(index)
            with torch.set_grad_enabled(gradient):
                states = states_of(policy.model, rows.rollout, policy.split)
                scored = score_states(policy.model, rows.rollout, states, s.temperature, entropic=s.entropy_coef != 0)
                part = ratio_surrogate(scored.logprobs, rows.old_logprobs, rows.advantages, rows.mask, e.mask.sum())
                part = part + s.entropy_coef * entropy_bonus(scored.entropy, rows.mask, e.mask.sum())
            total += float(part.detach())
            if gradient:
                for slope, g in zip(slopes, torch.autograd.grad(part, parameters, allow_unused=True), strict=True):
                    if g is not None:
                        slope += g
        return total, parameters_to_vector(slopes)

    def moved(self, policy: Policy, e: Experience, token_budget: int) -> float:
        """E_t[KL[pi_old, pi]] over the whole vocabulary, nats a token."""
        assert e.old_model is not None
        kl = kl_between(e.old_model, policy.model, e.rollout, policy.split, policy.split, self.settings.temperature, token_budget)
        return float(masked_mean(kl, e.mask))
