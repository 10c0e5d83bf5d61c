"""Log-probability and entropy of tokens, computed in chunks so that a B x T x V tensor never exists.

This is the only function in accord that turns hidden states into log-probabilities: sampling, the
reference and the update all come through :func:`log_softmax_of` with the same temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accord.nn.native import call, serves

EXCLUDED = -1e9  # a logit of no probability that is still a number
CHUNK = 256  # positions at a time: 256 x 49,152 logits in bf16 are 24 MiB
KL_CHUNK = 64  # where two distributions are held whole, in fp32

LIKELIEST = 1024  # tokens that a nucleus is looked for among first: finding them is much cheaper than sorting all


class TokenStats(NamedTuple):
    """For N positions."""

    logprobs: Tensor  # (N,) nats, log pi(token)
    entropy: Tensor  # (N,) nats, of the whole next-token distribution


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LogitsProcessor(Protocol):
    """Makes another distribution of the logits / temperature of N positions."""

    @property
    def slope(self) -> float:
        """d output / d logits, the same for every token that stays in."""
        ...

    def apply(self, logits: Tensor, temperature: float, chosen: Tensor | None) -> Tensor:
        """logits / temperature (N,V) -> (N,V). A token that was ``chosen`` (N,) stays in, whatever rounding says."""
        ...

    def at(self, rows: slice) -> LogitsProcessor:
        """The same for some of the positions."""
        ...


class Nucleus(NamedTuple):
    """The tokens that another policy finds likely: at each of N positions its smallest set of mass ``top_p``."""

    hidden: Tensor  # (N,D) that policy's final hidden states
    matrix: Tensor  # (V,D)
    top_p: float

    @property
    def slope(self) -> float:
        return 1.0

    def apply(self, logits: Tensor, temperature: float, chosen: Tensor | None) -> Tensor:
        allowed = nucleus_set(log_softmax_logits(self.hidden, self.matrix, temperature), self.top_p)
        if chosen is not None:
            allowed = allowed.scatter(-1, chosen[:, None], True)
        return logits.masked_fill(~allowed, EXCLUDED)

    def at(self, rows: slice) -> Nucleus:
        return self._replace(hidden=self.hidden[rows])


class Contrast(NamedTuple):
    """base * z_ref + strength * (z - z_ref): a reference's logits z_ref, moved towards the policy's z and beyond.

    With ``base`` 1 this is a reference perturbed by the policy's advantages (Snell et al. 2022, sec. 4.3); strength 1
    is then the policy itself. With ``base`` 0 it is the difference alone.
    """

    hidden: Tensor  # (N,D) the reference's final hidden states
    matrix: Tensor  # (V,D)
    strength: float
    base: float = 1.0

    @property
    def slope(self) -> float:
        return self.strength

    def apply(self, logits: Tensor, temperature: float, chosen: Tensor | None) -> Tensor:
        theirs = wide(self.hidden @ self.matrix.to(self.hidden.dtype).t()) / temperature
        return self.base * theirs + self.strength * (logits - theirs)

    def at(self, rows: slice) -> Contrast:
        return self._replace(hidden=self.hidden[rows])


class EpsilonGreedy(NamedTuple):
    """The likeliest token with probability 1 - epsilon, else any token. It has no gradient."""

    epsilon: float

    @property
    def slope(self) -> float:
        return 0.0

    def apply(self, logits: Tensor, temperature: float, chosen: Tensor | None) -> Tensor:
        best = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1 - self.epsilon)
        return (best + self.epsilon / logits.shape[-1]).log()

    def at(self, rows: slice) -> EpsilonGreedy:
        return self


def nucleus_set(logprobs: Tensor, top_p: float) -> Tensor:
    """(N,V) bool: the smallest set of likeliest tokens whose mass reaches ``top_p``."""
    inside = torch.zeros_like(logprobs, dtype=torch.bool)
    most = logprobs.shape[-1] if logprobs.is_cuda else LIKELIEST  # a GPU is not asked in between
    ordered, order = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    probability = ordered.exp()
    inside.scatter_(-1, order, probability.cumsum(-1) - probability < top_p)
    flat = probability.sum(-1) < top_p  # rows whose set is larger than that: all of the vocabulary has to be sorted
    if ordered.shape[-1] < logprobs.shape[-1] and bool(flat.any()):
        ordered, order = logprobs[flat].sort(-1, descending=True)
        probability = ordered.exp()
        inside[flat] = inside[flat].scatter(-1, order, probability.cumsum(-1) - probability < top_p)
    return inside


def log_softmax_logits(
    hidden: Tensor, matrix: Tensor, temperature: float, processor: LogitsProcessor | None = None, chosen: Tensor | None = None
) -> Tensor:
    """:func:`log_softmax_of` of hidden @ matrix.T. hidden (N,D), matrix (V,D) -> (N,V)."""
    return log_softmax_of(hidden @ matrix.to(hidden.dtype).t(), temperature, processor, chosen)


def log_softmax_of(logits: Tensor, temperature: float, processor: LogitsProcessor | None = None, chosen: Tensor | None = None) -> Tensor:
    """log softmax(logits / temperature), fp32 (fp64 stays). (N,V) -> (N,V).

    With a ``processor``, of what it makes of the logits; ``chosen`` (N,) are the tokens that were drawn from that.
    """
    logits = wide(logits)
    if temperature != 1.0:
        logits = logits / temperature
    if processor is not None:
        logits = processor.apply(logits, temperature, chosen)
    return torch.log_softmax(logits, dim=-1)


def stats_of(logits: Tensor, tokens: Tensor, temperature: float, processor: LogitsProcessor | None = None) -> TokenStats:
    """Log-probability of each row's token and entropy of the row. logits (N,V), tokens (N,)."""
    if processor is None and serves(logits):
        logits = logits.contiguous()
        out = TokenStats(*(torch.empty(len(tokens), dtype=torch.float32, device=logits.device) for _ in range(2)))
        call("token_stats", logits, logits, tokens.contiguous(), temperature, *out, *logits.shape)
        return out
    logp = log_softmax_of(logits, temperature, processor, tokens)
    return TokenStats(logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1))


def slope_of(logits: Tensor, tokens: Tensor, temperature: float, a: Tensor, b: Tensor, processor: LogitsProcessor | None = None) -> Tensor:
    """d (a * log p(token) + b * entropy) / d logits, (N,V) in the logits' dtype. a, b (N,) fp32.

    With p = softmax(z), z = logits / T: d logp_t / dz = onehot(t) - p, and dH / dz = -p * (log p + H).
    """
    if processor is None and serves(logits):
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        call("token_slope", logits, logits, tokens.contiguous(), temperature, a.contiguous(), b.contiguous(), out, *logits.shape)
        return out
    logp = log_softmax_of(logits, temperature, processor, tokens)
    p = logp.exp()
    entropy = -(p * logp).sum(-1, keepdim=True)
    dz = p * (-a[:, None] - b[:, None] * (logp + entropy))
    dz.scatter_add_(-1, tokens[:, None], a[:, None].to(dz.dtype))
    slope = (1.0 if processor is None else processor.slope) / temperature
    return (dz * slope).to(logits.dtype)


class _TokenStats(torch.autograd.Function):
    """Never holds more than a chunk of logits.

    How a row's log-probability and entropy change with its hidden state depends on nothing that comes back, so where the
    output matrix does not train that is computed while the logits are at hand, and the backward pass has no product
    with the vocabulary. Where it trains, the backward pass computes each chunk of logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, tokens: Tensor, temperature: float, processor: LogitsProcessor | None, entropic: bool
    ) -> tuple[Tensor, Tensor]:
        weights = matrix.to(hidden.dtype)
        early = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        parts, slopes = [], [[], []] if entropic else [[]]  # type: ignore[var-annotated]
        one = torch.ones(CHUNK, dtype=torch.float32, device=hidden.device)
        none = torch.zeros_like(one)
        for h, t, piece in zip(hidden.split(CHUNK), tokens.split(CHUNK), _pieces(processor, len(tokens)), strict=True):
            logits = h @ weights.t()
            parts.append(stats_of(logits, t, temperature, piece))
            if early:
                for kept, (a, b) in zip(slopes, ((one, none), (none, one)), strict=False):
                    kept.append(slope_of(logits, t, temperature, a[: len(t)], b[: len(t)], piece) @ weights)
        logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.early, ctx.temperature, ctx.processor, ctx.entropic = early, temperature, processor, entropic
        ctx.save_for_backward(*(torch.cat(kept) for kept in slopes)) if early else ctx.save_for_backward(hidden, matrix, tokens)
        if not entropic:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.early:
            pairs = zip(ctx.saved_tensors, grads, strict=False)
            return sum(slope * g[:, None].to(slope.dtype) for slope, g in pairs), None, None, None, None, None  # type: ignore[return-value]
        hidden, matrix, tokens = ctx.saved_tensors
        weights = matrix.to(hidden.dtype)
        grad_hidden, grad_matrix = [], None
        part = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        back = (grads[0], grads[1] if ctx.entropic else torch.zeros_like(grads[0]))
        pieces = (t.split(CHUNK) for t in (hidden, tokens, *back))
        for h, t, a, b, piece in zip(*pieces, _pieces(ctx.processor, len(tokens)), strict=True):
            dz = slope_of(h @ weights.t(), t, ctx.temperature, a, b, piece)
            grad_hidden.append(dz @ weights)
            if part is not None:
                torch.mm(dz.t(), h, out=part)
                grad_matrix = part.to(matrix.dtype, copy=True) if grad_matrix is None else grad_matrix.add_(part)
        return torch.cat(grad_hidden), grad_matrix, None, None, None, None


def _pieces(processor: LogitsProcessor | None, positions: int) -> Sequence[LogitsProcessor | None]:
    return [None if processor is None else processor.at(slice(i, i + CHUNK)) for i in range(0, positions, CHUNK)]


def token_stats(
    hidden: Tensor,
    matrix: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    processor: LogitsProcessor | None = None,
    entropic: bool = True,
) -> TokenStats:
    """Log-probability of ``tokens`` and entropy of the distribution they were drawn from.

    Args:
        hidden: (N,D) final hidden states at the positions *before* the tokens.
        matrix: (V,D) output matrix.
        tokens: (N,) int64, the tokens chosen.
        temperature: the sampling temperature; logits are divided by it.
        processor: what makes another distribution of the logits; its own states get no gradient.
        entropic: whether the entropy is differentiated too; without, its gradient is not computed.

    Differentiable in ``hidden`` and ``matrix``; memory does not depend on N x V.
    """
    if not len(tokens):
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return TokenStats(empty, empty)
    return TokenStats(*_TokenStats.apply(hidden, matrix, tokens, temperature, processor, entropic))


class _ExactKL(torch.autograd.Function):
    """With p and q the two softmaxes: d KL / dz_p = p * (log p - log q - KL),  d KL / dz_q = q - p."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, other_hidden: Tensor, other_matrix: Tensor, temperature: float) -> Tensor:
        out = []
        for h, o in zip(hidden.split(KL_CHUNK), other_hidden.split(KL_CHUNK), strict=True):
            p, q = (log_softmax_logits(x, w, temperature) for x, w in ((h, matrix), (o, other_matrix)))
            out.append(q.sub_(p).mul_(p.exp_()).sum(-1).neg_())
        ctx.save_for_backward(hidden, matrix, other_hidden, other_matrix)
        ctx.temperature = temperature
        return torch.cat(out)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, matrix, other_hidden, other_matrix = ctx.saved_tensors
        sides = ((hidden, matrix), (other_hidden, other_matrix))
        wanted = ctx.needs_input_grad
        out = [torch.zeros_like(t) if want else None for t, want in zip(ctx.saved_tensors, wanted, strict=False)]
        for start in range(0, len(hidden), KL_CHUNK):
            rows = slice(start, start + KL_CHUNK)
            p, q = (log_softmax_logits(h[rows], w, ctx.temperature) for h, w in sides)
            P, g = p.exp(), grads[0][rows, None] / ctx.temperature
            slopes = (P * (p - q - (P * (p - q)).sum(-1, keepdim=True)) * g, (q.exp() - P) * g)
            for k, ((h, w), dz) in enumerate(zip(sides, slopes, strict=True)):
                dz = dz.to(h.dtype)
                if (grad := out[2 * k]) is not None:
                    grad[rows] = dz @ w.to(h.dtype)
                if (grad := out[2 * k + 1]) is not None:
                    grad += (dz.t() @ h[rows]).to(w.dtype)
        return (*out, None)


def exact_kl(hidden: Tensor, matrix: Tensor, other_hidden: Tensor, other_matrix: Tensor, temperature: float = 1.0) -> Tensor:
    """KL[p || q] in nats over the whole vocabulary, (N,): sum_v p_v (log p_v - log q_v). Differentiable in both sides."""
    if not len(hidden):
        return hidden.new_zeros(0, dtype=torch.float32)
    kl: Tensor = _ExactKL.apply(hidden, matrix, other_hidden, other_matrix, temperature)
    return kl
