"""Learning from pairs without reinforcement learning.

With r the implicit reward of a completion y to a prompt x, l the log-probability a token, d = r(preferred) - r(other):

| loss  | r(x, y)                                | of a pair                            |                                        |
|-------|----------------------------------------|--------------------------------------|----------------------------------------|
| dpo   | beta * log(pi(y) / ref(y))             | -log sigma(d)                        | Rafailov et al. 2023, eq. 7            |
| ipo   | log(pi(y) / ref(y)) / tokens           | (d - 1 / (2 beta))^2                 | Azar et al. 2023, eq. 17, a token      |
| simpo | beta * l                               | -log sigma(d - gamma)                | Meng et al. 2024, eq. 6                |
| orpo  | log(p / (1 - p)), p = e^l              | -l(preferred) - beta * log sigma(d)  | Hong et al. 2024, eq. 6 and 7          |
| kto   | beta * log(pi(y) / ref(y))             | none: each completion by itself      | Ethayarajh et al. 2024, eq. 7 and 8    |

KTO: desirable_weight * (1 - sigma(r - z)) of a completion to prefer, undesirable_weight * (1 - sigma(z - r)) of one to avoid, where
z = beta * max(0, mean of log(pi(y') / ref(y'))) over completions y' of other prompts of the step, and is not differentiated.

orpo and simpo know no reference. That ipo divides by tokens is not in its equation 17, but in its authors' experiments, and in TRL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accord.data.batching import in_turn
from accord.data.records import Pair
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.rollout.policy import Policy
from accord.supervised.comparisons import Comparisons, sequence_logprobs
from accord.supervised.settings import PreferenceSettings
from accord.supervised.training import Task

ALONE = ("orpo", "simpo")
"""Losses that know no reference."""


class Logprobs(NamedTuple):
    """Of the K completions of a prompt, (K,) each: log p under the policy and under the reference, nats; and response tokens."""

    policy: Tensor
    reference: Tensor
    tokens: Tensor


def implicit_rewards(of: Logprobs, settings: PreferenceSettings) -> Tensor:
    """(K,) r(x, y) of the module's table."""
    beta, mean = settings.strength, of.policy / of.tokens
    if settings.loss == "orpo":
        return mean - log1mexp(mean)
    if settings.loss == "simpo":
        return beta * mean
    ratio = of.policy - of.reference
    return ratio / of.tokens if settings.loss == "ipo" else beta * ratio


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, of whichever of two forms loses no digits (Mächler 2012)."""
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def pair_losses(of: Logprobs, pairs: Sequence[Pair], settings: PreferenceSettings) -> Tensor:
    """(P,) losses of the module's table, of every pair of a prompt's completions."""
    r = implicit_rewards(of, settings)
    better, worse = (torch.tensor([pair[side] for pair in pairs], device=r.device) for side in (0, 1))
    d = r[better] - r[worse]
    if settings.loss == "ipo":
        return (d - 1 / (2 * settings.strength)) ** 2
    if settings.loss == "simpo":
        return -F.logsigmoid(d - settings.gamma)
    if settings.loss == "orpo":
        return -(of.policy / of.tokens)[better] - settings.strength * F.logsigmoid(d)
    return -F.logsigmoid(d)


def completion_losses(of: Logprobs, labels: Tensor, z: float, settings: PreferenceSettings) -> Tensor:
    """(K,) KTO losses; 0 for what is neither.

    Args:
        labels: (K,) above 0 for completions to prefer, below for those to avoid.
        z: beta times the estimated KL of the policy to the reference.
    """
    r = implicit_rewards(of, settings)
    good, bad = settings.desirable_weight * torch.sigmoid(z - r), settings.undesirable_weight * torch.sigmoid(r - z)
    return torch.where(labels > 0, good, torch.where(labels < 0, bad, torch.zeros_like(r)))


class Preference(Task):
    """Minimise the mean over prompts, times their weights, of the weighted mean over a prompt's pairs (KTO: completions) of the loss.

    Args:
        start: the reference, and what the policy starts from. Its log-probabilities are computed once.

    Raises:
        UserError: KTO has no other prompts in a step to estimate the KL from.
    """

    def __init__(self, start: Policy, train: Comparisons, heldout: Comparisons | None, settings: PreferenceSettings) -> None:
        self.name, self.train, self.heldout, self.settings = settings.loss.upper(), train, heldout, settings
        self.steps = math.ceil(settings.epochs * len(train) / settings.prompts_per_step)
        if settings.loss == "kto" and min(len(train), settings.prompts_per_step) < 2:
            raise UserError("kto estimates the KL from the other prompts of a step; it needs two prompts or more, and --prompts-per-step 2 or more.")  # fmt: skip
        self._start: Policy = start
        self._reference: list[Tensor] | None = None
        self._held: list[Tensor] | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        return {"pairs": self.train.digest, "validation": self.heldout.digest if self.heldout is not None else ""}

    def begin(self) -> None:
        if self.settings.loss not in ALONE:
            budget = TokenBudget(self.settings.micro_batch_tokens)
            self._reference = self.train.logprobs(self._start.model, budget, "Reference")
            self._held = self.heldout.logprobs(self._start.model, budget, "Reference, held out") if self.heldout is not None else None

    def accumulate(self, policy: Policy, step: int, tokens: int) -> dict[str, float]:
        numbers = in_turn(len(self.train), step, self.settings.prompts_per_step, self.settings.seed)
        return self._over(policy, self.train, self._reference, numbers, tokens, backward=True).told()

    @torch.no_grad()
    def measure(self, policy: Policy, budget: TokenBudget) -> dict[str, float]:
        if self.heldout is None:
            return {}
        held, reference = self.heldout, self._held
        parts = [
            budget.fit(lambda tokens, a=a, b=b: self._over(policy, held, reference, list(range(a, b)), tokens, backward=False))  # type: ignore[misc]
            for a, b in batches(len(held), self.settings.prompts_per_step)
        ]
        return Sums.of(parts).told()

    def _over(
        self, policy: Policy, some: Comparisons, reference: list[Tensor] | None, numbers: list[int], tokens: int, backward: bool
    ) -> Sums:
        """The loss of these prompts in micro-batches of so many tokens, ``backward`` with its gradient."""
        s = self.settings
        z = s.strength * self._mismatched_kl(policy, some, numbers, tokens) if s.loss == "kto" else 0.0
        sums = Sums(kl=z / s.strength if s.loss == "kto" else None)
        for part in some.packs(numbers, tokens):
            rollout = some.rollout(part)
            sizes = [len(some.judged[i].answers) for i in part]
            told = sequence_logprobs(policy.model, rollout).split(sizes)
            total = torch.zeros((), device=rollout.tokens.device)
            for i, mine, count in zip(part, told, rollout.response_lengths.split(sizes), strict=True):
                group = some.judged[i].group
                of = Logprobs(mine, torch.zeros_like(mine) if reference is None else reference[i], count)
                if s.loss == "kto":
                    labels = mine.new_tensor(some.judged[i].labels)
                    losses, weights = completion_losses(of, labels, z, s), labels.abs()
                else:
                    losses, weights = pair_losses(of, group.pairs, s), mine.new_tensor([p.weight for p in group.pairs])
                loss = group.weight * (losses * weights).sum() / weights.sum().clamp_min(1e-12)
                total = total + loss / len(numbers)
                sums.add(float(loss.detach()), implicit_rewards(of, s).detach(), (mine - of.reference).detach(), group.pairs)
            if backward:
                total.backward()  # type: ignore[no-untyped-call]
        return sums

    @torch.no_grad()
    def _mismatched_kl(self, policy: Policy, some: Comparisons, numbers: list[int], tokens: int) -> float:
        """max(0, mean of log(pi / ref)) of each prompt with the completions of the one before it among ``numbers``, nats a completion."""
        numbers = list(dict.fromkeys(numbers))  # a prompt may be there twice where an epoch ends
        if len(numbers) < 2:
            return 0.0
        before, gaps = dict(zip(numbers, [numbers[-1], *numbers[:-1]], strict=True)), []
        for part in some.packs(numbers, tokens, before):
            rollout = some.rollout(part, [before[i] for i in part])
            gaps.append(sequence_logprobs(policy.model, rollout) - sequence_logprobs(self._start.model, rollout))
        return max(0.0, float(torch.cat(gaps).mean()))


def batches(count: int, size: int) -> list[tuple[int, int]]:
    """Where batches of ``size`` begin and end; none has fewer than half as many, nor fewer than two while there are two."""
    size = max(2, size)
    starts = list(range(0, max(1, count - max(2, size // 2) + 1), size))
    return list(zip(starts, [*starts[1:], count], strict=True))


class Sums:
    """What is told of prompts, added up. ``kl``: KTO's estimate."""

    def __init__(self, kl: float | None) -> None:
        self.prompts, self.loss, self.kl = 0, 0.0, kl
        self.weight = self.right = self.better = self.worse = self.moved = 0.0

    def add(self, loss: float, rewards: Tensor, moved: Tensor, pairs: Sequence[Pair]) -> None:
        """A prompt's. ``moved``: log p of each completion minus the reference's (alone: log p)."""
        self.prompts, self.loss = self.prompts + 1, self.loss + loss
        r, m = rewards.tolist(), moved.tolist()
        for pair in pairs:
            self.weight += pair.weight
            d = r[pair.preferred] - r[pair.other]
            self.right += pair.weight * (0.5 if d == 0 else float(d > 0))
            self.better, self.worse = self.better + pair.weight * r[pair.preferred], self.worse + pair.weight * r[pair.other]
            self.moved += pair.weight * m[pair.preferred]

    @classmethod
    def of(cls, parts: Sequence[Sums]) -> Sums:
        known = [(p.kl, p.prompts) for p in parts if p.kl is not None]
        out = cls(sum(kl * n for kl, n in known) / sum(n for _, n in known) if known else None)
        for name in ("prompts", "loss", "weight", "right", "better", "worse", "moved"):
            setattr(out, name, sum(getattr(part, name) for part in parts))
        return out

    def told(self) -> dict[str, float]:
        """``loss``; ``accuracy``: share of pair weight whose preferred has the higher implicit reward; that reward of both sides of a
        pair; ``preferred_logprob``: how much likelier than under the reference the preferred is (orpo, simpo: its log-probability)."""
        out = {
            "loss": self.loss / self.prompts, "accuracy": self.right / self.weight, "implicit_reward_preferred": self.better / self.weight,
            "implicit_reward_other": self.worse / self.weight, "preferred_logprob": self.moved / self.weight,
        }  # fmt: skip
        return out if self.kl is None else out | {"kl_estimate": self.kl}
