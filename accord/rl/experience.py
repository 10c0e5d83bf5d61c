"""A rollout with everything an algorithm may ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from accord.nn.budget import TokenBudget
from accord.nn.loading import Model
from accord.nn.transformer import Transformer
from accord.reward.functions import Reject
from accord.reward.model import ScalarModel
from accord.reward.sources import Reward
from accord.rl.kl import kl_estimate
from accord.rl.settings import RLSettings
from accord.rollout.guides import Guide
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import kl_between, score, trunk_of


@dataclass
class Experience:
    """Scored completions. Every (B,T) tensor is aligned with ``rollout.tokens`` and 0 outside the response.

    Attributes:
        mask: (B,T) bool, the response mask without rows that a reward skipped.
        scores: (B,). valid: (B,) bool. parts: each reward's own scores.
        old_logprobs, ref_logprobs, old_entropy, kl: (B,T) nats.
        values: (B,T), V of the state before each token. final_values: (B,), V after the last one.
        raw_logprobs: (B,T) nats, of the policy without a guide: what the KL speaks of. Without one, ``old_logprobs``.
        rewards, advantages, returns: (B,T), 0 until the algorithm fills them in.
        kl_coef: the coefficient of this step. guide: what restricted the tokens, if something did.
        old_model: the policy that sampled, if the algorithm asked for a copy.
        rejects: what a reward failed on, of all rows.
    """

    rollout: Rollout
    mask: Tensor
    scores: Tensor
    valid: Tensor
    parts: dict[str, list[float | None]]
    old_logprobs: Tensor
    old_entropy: Tensor
    ref_logprobs: Tensor
    raw_logprobs: Tensor
    kl: Tensor
    values: Tensor
    final_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    kl_coef: float = 0.0
    guide: Guide | None = None
    old_model: Model | None = None
    rejects: Sequence[Reject] = ()

    def select(self, rows: Tensor) -> Experience:
        rollout = self.rollout.select(rows)
        width = rollout.tokens.shape[1]
        changes: dict[str, object] = {"rollout": rollout}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value[rows] if value.ndim == 1 else value[rows, :width]
        return replace(self, **changes)  # type: ignore[arg-type]


def values_before(critic: ScalarModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """V of the state before each token (B,T), 0 outside the response, and V after the last token (B,)."""
    after = critic(rollout, rollout.before_response | rollout.at_last)
    before = torch.cat((torch.zeros_like(after[:, :1]), after[:, :-1]), dim=1)
    return before.masked_fill(~rollout.response_mask, 0.0), after.gather(1, rollout.last[:, None])[:, 0]


@torch.no_grad()
def critic_values(critic: ScalarModel, rollout: Rollout, token_budget: int) -> tuple[Tensor, Tensor]:
    values = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
    final = torch.zeros(len(rollout), device=rollout.tokens.device)
    for rows in rollout.micro_batches(token_budget):
        part = rollout.select(rows)
        before, after = values_before(critic, part)
        values[rows, : before.shape[1]], final[rows] = before, after
    return values, final


@torch.no_grad()
def add_trunk(policy: Policy, rollout: Rollout, token_budget: int) -> None:
    """Give the rollout the frozen model's activations at the cut, if the policy did not leave them (lora, full)."""
    start = policy.start
    if rollout.trunk is not None or not isinstance(start, Transformer) or policy.trunk_layers == 0:
        return
    shape = (*rollout.tokens.shape, start.config.hidden_size)
    trunk = torch.zeros(shape, dtype=start.dtype, device=start.device)
    for rows in rollout.micro_batches(token_budget):
        part = rollout.select(rows)
        trunk[rows, : part.tokens.shape[1]] = trunk_of(start, part, policy.trunk_layers)
    rollout.trunk, rollout.trunk_cut = trunk, policy.trunk_layers


def score_rollout(
    policy: Policy,
    critic: ScalarModel | None,
    reward: Reward,
    rollout: Rollout,
    settings: RLSettings,
    guide: Guide | None = None,
    old_model: Model | None = None,
    budget: TokenBudget | None = None,
) -> Experience:
    """Scores, reference and old log-probabilities and values: the frozen trunk is read once for all of them."""
    budget, temperature = budget or TokenBudget(settings.micro_batch_tokens), settings.temperature
    budget.fit(lambda tokens: add_trunk(policy, rollout, tokens))
    scored = reward(rollout)
    mine = budget.fit(lambda tokens: score(policy.model, rollout, policy.split, temperature, tokens, guide))
    raw = mine.logprobs
    if guide is not None:
        raw = budget.fit(lambda tokens: score(policy.model, rollout, policy.split, temperature, tokens)).logprobs
    reference = budget.fit(lambda tokens: score(policy.start, rollout, policy.trunk_layers, temperature, tokens))
    mask = rollout.response_mask & scored.valid[:, None]
    if settings.kl_estimator == "full":
        kl = budget.fit(
            lambda tokens: kl_between(policy.model, policy.start, rollout, policy.split, policy.trunk_layers, temperature, tokens)
        )
    else:
        kl = kl_estimate(raw, reference.logprobs, settings.kl_estimator)
    if critic is None:
        values, final = torch.zeros_like(mine.logprobs), torch.zeros_like(scored.total)
    else:
        values, final = budget.fit(lambda tokens: critic_values(critic, rollout, tokens))
    return Experience(
        rollout=rollout,
        mask=mask,
        scores=scored.total,
        valid=scored.valid,
        parts=scored.parts,
        old_logprobs=mine.logprobs,
        old_entropy=mine.entropy,
        ref_logprobs=reference.logprobs,
        raw_logprobs=raw,
        kl=kl,
        values=values,
        final_values=final,
        rewards=torch.zeros_like(values),
        advantages=torch.zeros_like(values),
        returns=torch.zeros_like(values),
        guide=guide,
        old_model=old_model,
        rejects=scored.rejects,
    )
