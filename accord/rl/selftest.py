"""The checks that must hold before the first update. A run whose invariants are broken refuses to start."""

from __future__ import annotations

from typing import NamedTuple

import torch

from accord.errors import UserError
from accord.rl.experience import Experience
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import score

MEAN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Mean absolute difference in nats a token that rounding in this dtype may cause where the same code runs on other shapes."""
SAMPLER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""The same between the sampler's kernels and the scoring path: sums in another order round otherwise, and thirty layers of bf16 pass it
on (measured: 0.04 with SmolLM2-135M where every layer is scored again)."""
INT8_TOLERANCE = 0.4
"""The same for weights in eight bits, which training corrects for (measured: 0.22)."""


class SelfTest(NamedTuple):
    """Differences in nats a token, mean and largest."""

    ratio: tuple[float, float]  # sampler's log-probabilities against the scoring path's
    reference: tuple[float, float]  # policy against reference
    padding: tuple[float, float]  # a padded row against the same row alone


def self_test(policy: Policy, experience: Experience, settings: RLSettings) -> SelfTest:
    """Check that ratio = 1, KL = 0, padding changes nothing and the mask is the generator's.

    Raises:
        UserError: naming the invariant that does not hold, by how much, and where to look.
    """
    rollout, mask = experience.rollout, experience.rollout.response_mask
    _check_mask(policy, rollout, settings)
    found = SelfTest(
        _difference(rollout.engine_logprobs[mask], experience.old_logprobs[mask]) if rollout.sampled else (0.0, 0.0),
        _difference(experience.raw_logprobs[mask], experience.ref_logprobs[mask]),
        _padding(policy, experience, settings),
    )
    remedies = SelfTest(
        "ratio = 1: the sampler and the scoring path disagree about the log-probability of the sampled tokens",  # type: ignore[arg-type]
        "KL = 0: the policy and its reference differ before any update",  # type: ignore[arg-type]
        "padding: a row's log-probabilities change with the rows beside it",  # type: ignore[arg-type]
    )
    for name, (mean, largest), broken in zip(SelfTest._fields, found, remedies, strict=True):
        dtype, rounded = policy.model.compute_dtype, settings.rollout_weights == "int8"
        tolerance = MEAN_TOLERANCE[dtype] if name != "ratio" else INT8_TOLERANCE if rounded else SAMPLER_TOLERANCE[dtype]
        most = max(50 * MEAN_TOLERANCE[dtype], 10 * tolerance)  # of a single token
        if not (mean <= tolerance and largest <= most):
            raise UserError(
                f"Self-test before the first update failed at '{name}'. Broken invariant: {broken} "
                f"(mean {mean:.2g}, largest {largest:.2g} nats; allowed {tolerance:g} and {most:g}). "
                "Training would learn from wrong ratios, so it does not start. Try --dtype float32"
                f"{' and --rollout-weights same' if settings.rollout_weights != 'same' else ''}; if that fails too, it is a bug."
            )
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    gap = (a - b).abs()
    return float(gap.mean()), float(gap.max())


def _check_mask(policy: Policy, rollout: Rollout, settings: RLSettings) -> None:
    mask, eos = rollout.response_mask, torch.tensor(policy.tokenizer.eos_ids, device=rollout.tokens.device)
    lengths = mask.sum(-1)
    ends = torch.isin(rollout.tokens.gather(1, rollout.last[:, None])[:, 0], eos)
    good = bool((lengths >= 1).all()) and bool((rollout.token_mask | ~mask).all()) and bool((rollout.last == rollout.lengths - 1).all())
    if rollout.step_rewards is None:  # in an environment, it says when an episode is over
        good = (
            good
            and bool((lengths <= settings.max_new_tokens).all())
            and bool((ends == rollout.finished).all())
            and bool((lengths[~rollout.finished] == settings.max_new_tokens).all())
        )
    if not good:
        raise UserError(
            "Self-test before the first update failed at 'response mask': a row has no response token, one outside "
            "its tokens, or is marked finished without ending. Training does not start."
        )


def _padding(policy: Policy, experience: Experience, settings: RLSettings) -> tuple[float, float]:
    shortest = int(experience.rollout.lengths.argmin())
    alone = experience.rollout.select(torch.tensor([shortest]))
    again = score(policy.model, alone, policy.split, settings.temperature, settings.micro_batch_tokens, experience.guide)
    mask = alone.response_mask
    return _difference(again.logprobs[mask], experience.old_logprobs[shortest, : mask.shape[1]][mask[0]])
