"""Which prompts teach most: those of whose completions reward models cannot tell which is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from accord.data.records import Completion
from accord.progress import bar
from accord.reward.model import RewardModel

CHUNK = 32  # prompts that are scored at once


def uncertainty(completions: Mapping[str, Sequence[Completion]], rewards: Sequence[RewardModel]) -> dict[str, float]:
    """By prompt, from 0 (certain) to 1: the entropy in bits of which of two completions is preferred, mean over pairs.

    The probability is Bradley-Terry's, mean over the models: entropy is high where each of them is undecided, and where they
    contradict each other (predictive entropy as in Houlsby et al. 2011, "Bayesian Active Learning", before the noise is taken off).
    """
    keys, found = list(completions), {}
    with bar("Uncertainty", len(keys)) as progress:
        for start in range(0, len(keys), CHUNK):
            some = keys[start : start + CHUNK]
            groups = {key: [c for c in completions[key] if c.text or c.tokens] for key in some}  # an empty one has no score
            flat = [c for group in groups.values() for c in group]
            scores = np.array(
                [reward.logits(reward.encode(flat)).double().cpu().numpy() for reward in rewards if flat]
            )  # (models, completions)
            at = 0
            for key, group in groups.items():
                found[key] = _entropy(scores[:, at : at + len(group)]) if len(group) > 1 else 0.0
                at += len(group)
            progress.advance(len(some))
    return found


def _entropy(scores: np.ndarray) -> float:
    """Of one prompt's scores (models, completions)."""
    pairs = list(combinations(range(scores.shape[1]), 2))
    one, other = (scores[:, [pair[side] for pair in pairs]] for side in (0, 1))
    p = np.clip((1 / (1 + np.exp(-np.clip(one - other, -50, 50)))).mean(0), 1e-12, 1 - 1e-12)
    return float((-p * np.log2(p) - (1 - p) * np.log2(1 - p)).mean())
