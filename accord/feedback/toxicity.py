"""Probability that a text is toxic, from the bundled classifier (alt-profanity-check: a linear model on word counts)."""

from __future__ import annotations

from collections.abc import Sequence


def toxicity(texts: Sequence[str]) -> list[float]:
    """Probability of the toxic class for each text, 0 to 1.

    A bag-of-words model: it knows rude words well and irony not at all.
    """
    from profanity_check import predict_prob

    return [float(p) for p in predict_prob(list(texts))] if texts else []
