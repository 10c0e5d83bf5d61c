"""Causal attention of rows, with its passages from tokens to rows and back (:mod:`accord.nn.layout`).

Shapes: N tokens, B rows of T places, H query heads, G key/value heads, d head width. On a CPU by the kernels of
kernels.cpp, with torch's batched products for rows up to some length and its fused kernel beyond; elsewhere, in float64 and
where second derivatives are wanted, in torch alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from accord.nn.fused import by_kernels, only_plain, plain_rotate
from accord.nn.layout import Places, select_lines
from accord.nn.native import call

WRITTEN_OUT = {torch.bfloat16: 512, torch.float32: 256}
"""Places a row up to which two batched products are faster than the fused kernel on a CPU, forwards and backwards (bench/LOG.md)."""


def lay_out(x: Tensor, places: Places, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Heads of tokens to their places, rotated on the way: (N,H,d) -> (B,H,T,d), 0 where there is no token.

    cos, sin (N,d), alike in both halves: each pair (i, i + d/2) of channels turns by its token's angle; None turns nothing.
    """
    if by_kernels(x):
        out: Tensor = _LayOut.apply(x, places, cos, sin)
        return out
    return plain_lay_out(x, places, cos, sin)


def plain_lay_out(x: Tensor, places: Places, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """:func:`lay_out` in torch."""
    if cos is not None and sin is not None:
        x = plain_rotate(x, cos[:, None], sin[:, None])
    if not places.single:
        x = select_lines(x, places.owners)
    rows = x.new_zeros(places.token.numel(), *x.shape[1:]).index_copy(0, places.places, x)
    return rows.unflatten(0, places.token.shape).transpose(1, 2)


def collect(rows: Tensor, places: Places) -> Tensor:
    """Heads of tokens from their places, of which each has one: (B,H,T,d) -> (N,H*d)."""
    if by_kernels(rows):
        out: Tensor = _Collect.apply(rows, places)
        return out.flatten(1)
    return plain_collect(rows, places)


def plain_collect(rows: Tensor, places: Places) -> Tensor:
    """:func:`collect` in torch."""
    return rows.transpose(1, 2).flatten(0, 1).index_select(0, places.places).flatten(1)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V where a place sees itself and what is before it.

    query (B,H,T,d); key, value (B,G,T,d), each shared by H/G query heads; window: see only that many latest places.
    Returns (B,H,T,d). What stands at places without a token is not to be read.
    """
    T = query.shape[2]
    if not only_plain() and (query.is_cuda or WRITTEN_OUT.get(query.dtype, T) < T):
        return fused_attend_rows(query, key, value, window)
    if by_kernels(query):
        out: Tensor = _Attend.apply(query, key, value, window)
        return out
    return plain_attend_rows(query, key, value, window)


def attention_bias(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """(T,S) fp32: 0 where a query (T,) sees a key (S,), itself or before it by less than ``window``, else a very low number."""
    distance = query_positions[:, None] - key_positions
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -1e30)


def causal_bias(T: int, window: int | None, device: torch.device) -> Tensor:
    """(T,T): :func:`attention_bias` of the places of a row."""
    places = torch.arange(T, device=device)
    return attention_bias(places, places, window)


def plain_attend_rows(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """:func:`attend_rows` written out in torch."""
    B, H, T, d = query.shape
    return attend(query, key, value, causal_bias(T, window, query.device).expand(B, 1, T, T)).view(B, T, H, d).transpose(1, 2)


def fused_attend_rows(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """:func:`attend_rows` by torch's kernel, for long rows and GPUs: the probabilities are never in memory."""
    T, shared = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    if window is None or window >= T:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal_bias(T, window, query.device).to(query.dtype))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V: the reference for every other form.

    query (B,H,T,d); key, value (B,G,S,d); bias (B,1,T,S), 0 where a query may look and very low elsewhere. Returns (B,T,H*d).
    """
    B, H, T, d = query.shape
    G, S = key.shape[1], key.shape[2]
    grouped = query.reshape(B, G, H // G * T, d)
    scores = (grouped @ key.transpose(-1, -2)).view(B, G, H // G, T, S)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores.to(wide) / math.sqrt(d) + bias[:, :, None], dim=-1).to(value.dtype)
    out = weights.view(B, G, H // G * T, S) @ value
    return out.view(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)


class _LayOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        x = x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
        ctx.places, ctx.angles = places, (cos, sin)
        return _to_rows(x, places, cos, sin)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grads[0], ctx.places, *ctx.angles), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return _to_tokens(rows, places, None, None)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_rows(grads[0].contiguous(), ctx.places, None, None), None


def _to_rows(x: Tensor, places: Places, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    (B, T), (_, H, d) = places.token.shape, x.shape
    out = x.new_empty(B, H, T, d)
    call("lay_heads", x, x, cos, sin, places.token, out, B, T, H, d, x.stride(0))
    return out


def _to_tokens(rows: Tensor, places: Places, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    rows = rows.contiguous()
    _, H, T, d = rows.shape
    tokens = len(places.offsets) - 1
    out = rows.new_empty(tokens, H, d)
    call("collect_heads", rows, rows, cos, sin, places.offsets, places.places, out, tokens, T, H, d)
    return out


class _Attend(torch.autograd.Function):
    """With P = softmax(S), S = Q K^T / sqrt(d): dV = P^T dO, dP = dO V^T, dS = P * (dP - sum(P * dP)) / sqrt(d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        B, H, T, d = query.shape
        G = key.shape[1]
        q, k, v = query.reshape(B * G, H // G * T, d), key.reshape(B * G, T, d), value.reshape(B * G, T, d)
        weights = q @ k.transpose(1, 2)
        call("causal_softmax", weights, weights, 1 / math.sqrt(d), B * H, T, window or 0)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shapes, ctx.window = (query.shape, key.shape), window
        return (weights @ v).view(query.shape)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        (B, H, T, d), shape = ctx.shapes
        g = grads[0].reshape(q.shape)
        slope = g @ v.transpose(1, 2)
        dv = weights.transpose(1, 2) @ g
        call("causal_softmax_backward", weights, weights, slope, 1 / math.sqrt(d), B * H, T, ctx.window or 0)
        return (slope @ k).view(B, H, T, d), (slope.transpose(1, 2) @ q).view(shape), dv.view(shape), None
