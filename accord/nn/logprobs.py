"""Log-probability and entropy of tokens, computed in chunks so that a B x T x V tensor never exists.

This is the only function in accord that turns hidden states into log-probabilities: sampling, the
reference and the update all come through :func:`log_softmax_logits` with the same temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # positions at a time: 256 x 49,152 logits in fp32 are 48 MiB


class TokenStats(NamedTuple):
    """For N positions."""

    logprobs: Tensor  # (N,) nats, log pi(token)
    entropy: Tensor  # (N,) nats, of the whole next-token distribution


def log_softmax_logits(hidden: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    """log softmax(hidden @ matrix.T / temperature), fp32. hidden (N,D), matrix (V,D) -> (N,V)."""
    logits = (hidden @ matrix.to(hidden.dtype).t()).float()
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


class _TokenStats(torch.autograd.Function):
    """Saves only hidden states; the backward pass computes each chunk of logits again.

    With p = softmax(z), z = hidden @ matrix.T / temperature, entropy H = -sum p log p:
    d logp_a / dz = onehot(a) - p,   dH / dz = -p * (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropy = [], []
        for h, a in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True):
            logp = log_softmax_logits(h, matrix, temperature)
            logprobs.append(logp.gather(-1, a[:, None])[:, 0])
            entropy.append(-(logp.exp() * logp).sum(-1))
        out = torch.cat(logprobs), torch.cat(entropy)
        ctx.save_for_backward(hidden, matrix, tokens, out[1])
        ctx.temperature = temperature
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, matrix, tokens, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        weights = matrix.to(hidden.dtype)
        grad_hidden, grad_matrix = [], torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropy.any())
        pieces = (t.split(CHUNK) for t in (hidden, tokens, entropy, grad_logprobs, grad_entropy))
        for h, a, e, g, ge in zip(*pieces, strict=True):
            logp = log_softmax_logits(h, matrix, ctx.temperature)
            p = logp.exp()
            dz = p * (-g[:, None] - ge[:, None] * (logp + e[:, None])) if with_entropy else p.mul_(-g[:, None])
            dz.scatter_add_(-1, a[:, None], g[:, None])
            dz = (dz / ctx.temperature).to(hidden.dtype)
            grad_hidden.append(dz @ weights)
            if grad_matrix is not None:
                grad_matrix += (dz.t() @ h).to(matrix.dtype)
        return torch.cat(grad_hidden), grad_matrix, None, None


def token_stats(hidden: Tensor, matrix: Tensor, tokens: Tensor, temperature: float = 1.0) -> TokenStats:
    """Log-probability of ``tokens`` and entropy of the distribution they were drawn from.

    Args:
        hidden: (N,D) final hidden states at the positions *before* the tokens.
        matrix: (V,D) output matrix.
        tokens: (N,) int64, the tokens chosen.
        temperature: the sampling temperature; logits are divided by it.

    Differentiable in ``hidden`` and ``matrix``; memory does not depend on N x V.
    """
    if not len(tokens):
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return TokenStats(empty, empty)
    return TokenStats(*_TokenStats.apply(hidden, matrix, tokens, temperature))


@torch.no_grad()
def exact_kl(hidden: Tensor, matrix: Tensor, other_hidden: Tensor, other_matrix: Tensor, temperature: float = 1.0) -> Tensor:
    """KL[p || q] in nats over the whole vocabulary, (N,): sum_v p_v (log p_v - log q_v)."""
    out = []
    for h, o in zip(hidden.split(CHUNK), other_hidden.split(CHUNK), strict=True):
        p = log_softmax_logits(h, matrix, temperature)
        q = log_softmax_logits(o, other_matrix, temperature)
        out.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.float32)
