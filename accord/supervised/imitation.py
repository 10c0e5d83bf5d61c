"""Supervised fine-tuning: making examples more likely."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from accord.data.batching import in_turn
from accord.nn.budget import TokenBudget
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import score_states, states_of
from accord.supervised.examples import Encoded
from accord.supervised.settings import SFTSettings
from accord.supervised.training import Task

AT_ONCE = 64  # examples that are measured together


class Imitation(Task):
    """Minimise -log p of the tokens that count, a mean over those of the whole optimizer step."""

    name = "SFT"

    def __init__(self, train: Encoded, heldout: Encoded | None, settings: SFTSettings) -> None:
        self.train, self.heldout, self._settings = train, heldout, settings
        self.steps = math.ceil(settings.epochs * len(train) / settings.examples_per_step)

    @property
    def digests(self) -> Mapping[str, str]:
        return {"examples": self.train.digest, "validation": self.heldout.digest if self.heldout is not None else ""}

    def accumulate(self, policy: Policy, step: int, tokens: int) -> dict[str, float]:
        rollout = self.train.rollout(in_turn(len(self.train), step, self._settings.examples_per_step, self._settings.seed))
        count, total = int(rollout.response_mask.sum()), 0.0
        for rows in rollout.micro_batches(tokens):
            loss = sft_loss(policy, rollout.select(rows), count)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total, "tokens": float(count)}

    def measure(self, policy: Policy, budget: TokenBudget) -> dict[str, float]:
        return {} if self.heldout is None else {"loss": loss_of(policy, self.heldout, budget)}


def sft_loss(policy: Policy, rollout: Rollout, count: int) -> Tensor:
    """-sum log p of the tokens that count (``response_mask``), divided by ``count``: those of the whole optimizer step."""
    states = states_of(policy.model, rollout, 0)
    return -score_states(policy.model, rollout, states, 1.0, entropic=False).logprobs.sum() / count


@torch.no_grad()
def loss_of(policy: Policy, examples: Encoded, budget: TokenBudget) -> float:
    """Mean -log p of the examples' tokens that count, nats a token."""
    count, total = examples.counted, 0.0
    for start in range(0, len(examples), AT_ONCE):
        rollout = examples.rollout(range(start, min(start + AT_ONCE, len(examples))))
        total += budget.fit(
            lambda tokens, r=rollout: math.fsum(float(sft_loss(policy, r.select(rows), count)) for rows in r.micro_batches(tokens))  # type: ignore[misc]
        )
    return total
