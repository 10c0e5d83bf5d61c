"""Means over response tokens, and the one definition of whitening."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Values whose spread is below this share of the largest are equal; what is left is rounding, and not to be blown up."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` where ``mask`` is True; what lies outside, even NaN, does not count."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Sum over the mask divided by ``count`` (default: the mask's own size).

    A micro-batch passes the ``count`` of the whole optimizer step, so that accumulated gradients equal
    those of one large batch.
    """
    denominator = mask.sum() if count is None else count
    return masked_sum(values, mask) / denominator


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (standard deviation + eps) over the mask; 0 outside it.

    Population standard deviation (divided by n). Values that are all equal, up to rounding, become 0.
    """
    mean = masked_mean(values, mask)
    centred = torch.where(mask, values - mean, torch.zeros_like(values))
    deviation = masked_mean(centred**2, mask).sqrt()
    largest = torch.where(mask, values, torch.zeros_like(values)).abs().amax()
    return torch.where(deviation > ROUNDING * largest, centred / (deviation + eps), torch.zeros_like(centred))
