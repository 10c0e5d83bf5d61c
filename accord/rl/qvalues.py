"""Q-values in a language model's logits: two of them a position, without the others in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accord.nn.loading import Model
from accord.nn.logprobs import CHUNK, wide
from accord.rl.experience import Experience
from accord.rollout.scoring import states_of


class Logits(NamedTuple):
    """For the N response tokens of some rows."""

    chosen: Tensor  # (N,) z of the token asked for
    largest: Tensor  # (N,) z of the likeliest token
    best: Tensor  # (N,) int64, which one that is


def logits_at(model: Model, rows: Experience, split: int, temperature: float, tokens: Tensor | None = None) -> Logits:
    """Two logits a position, without the others in memory. ``tokens`` (N,), by default those of the rollout. Differentiable."""
    states, matrix = states_of(model, rows.rollout, split), model.output_matrix
    tokens = rows.rollout.tokens[rows.rollout.response_mask] if tokens is None else tokens
    with torch.no_grad():
        weights = matrix.to(states.dtype).t()
        best = torch.cat([(h @ weights).argmax(-1) for h in states.split(CHUNK)])
    chosen, largest = (token_logits(states, matrix, ids, temperature) for ids in (tokens, best))
    return Logits(chosen, largest, best)


def token_logits(states: Tensor, matrix: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """z = h . w_a / temperature of one token a position. states (N,D), matrix (V,D), tokens (N,) -> (N,). Differentiable."""
    return (wide(states) * wide(F.embedding(tokens, matrix).to(states.dtype))).sum(-1) / temperature
