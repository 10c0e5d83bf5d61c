"""How a token is drawn, and where its randomness comes from."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accord.errors import UserError
from accord.nn.logprobs import nucleus_set


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 are off; training rollouts refuse them."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError(
                f"Sampling needs temperature >= 0 (it is {self.temperature}), 0 < top_p <= 1 ({self.top_p}), "
                f"top_k >= 0 ({self.top_k}) and max_new_tokens >= 1 ({self.max_new_tokens})."
            )

    def check_training(self) -> None:
        """Refuse what would make the sampled distribution another one than the scored one."""
        if self.top_k or self.top_p < 1:
            raise UserError("top_k and top_p change the distribution without its log-probabilities; leave them off in training.")
        if self.temperature == 0:
            raise UserError("Greedy decoding (temperature 0) explores nothing; training needs a temperature above 0.")


def uniforms(seed: int, names: list[str], length: int) -> Tensor:
    """(B, length) numbers in [0,1): a stream for each name, whatever else is in the batch.

    A row's stream depends on the seed and its name (prompt id and index) alone, so the same prompts and
    seed meet the same luck under two policies, in any order or batch.
    """
    rows = []
    for name in names:
        key = np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(length))
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, length, dtype=torch.float64)


def restrict(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Renormalised log-probabilities of the k likeliest tokens and of the smallest set of mass top_p (B,V)."""
    if top_k:
        floor = logprobs.topk(min(top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf)
    if top_p < 1:
        logprobs = torch.log_softmax(logprobs, -1)
        logprobs = logprobs.masked_fill(~nucleus_set(logprobs, top_p), -torch.inf)
    return torch.log_softmax(logprobs, -1)


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability passes ``uniform``. (B,V), (B,) -> (B,)."""
    cumulative = logprobs.exp().cumsum_(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)  # a NaN passes nothing
