"""What a decoding step does between its matrix products: in torch, and by accord's own kernels.

Both sets have the same four functions. :class:`Plain` is the reference and runs anywhere; :class:`Native` is for a
CPU. B rows, N width, H query heads, G key/value heads, d head width, S cache slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accord.nn.attention import attend, attention_bias
from accord.nn.fused import plain_rms_norm, plain_rotate
from accord.nn.logprobs import log_softmax_of
from accord.nn.native import call, serves
from accord.rollout.sampling import draw


@dataclass(frozen=True)
class Place:
    """Where each row's next token stands in the cache, and at which angles.

    positions (B,) int64; cos, sin (B,d); longest: no position is larger than ``longest - 1``.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    longest: int


class Pieces(Protocol):
    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x += y, in place; returns weight * x / sqrt(mean(x^2) + eps). x, y (B,N); weight (N,) in x's dtype."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. (B,2N) -> (B,N)."""
        ...

    def attend(self, joined: Tensor, keys: Tensor, values: Tensor, place: Place, heads: int, rotary: bool, window: int | None) -> Tensor:
        """One query a row against the cache, after its own key and value went in.

        joined (B,(H+2G)d): queries, keys, values of the new tokens; keys, values (B,G,S,d), written at ``place``.
        Returns (B,H*d).
        """
        ...

    def draw(self, logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """A token a row by inverse CDF from softmax(logits / temperature), and its log-probability; at 0 the likeliest.

        logits (B,V), uniform (B,) in [0,1) -> (B,) int64, (B,) fp32 nats.
        """
        ...


class Plain:
    """In torch."""

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if y is not None:
            x += y
        return plain_rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(self, joined: Tensor, keys: Tensor, values: Tensor, place: Place, heads: int, rotary: bool, window: int | None) -> Tensor:
        G, d = keys.shape[1], keys.shape[3]
        query_key, value = joined.view(len(joined), -1, d).split((heads + G, G), dim=1)
        if rotary:
            query_key = plain_rotate(query_key, place.cos[:, None], place.sin[:, None])
        rows, slots = torch.arange(len(joined), device=keys.device), torch.arange(place.longest, device=keys.device)
        keys[rows, :, place.positions] = query_key[:, heads:]
        values[rows, :, place.positions] = value
        bias = attention_bias(place.positions, slots, window)[:, None, None]
        return attend(query_key[:, :heads, None], keys[:, :, : place.longest], values[:, :, : place.longest], bias)[:, 0]

    def draw(self, logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs = log_softmax_of(logits, temperature or 1.0)
        tokens = logprobs.argmax(-1) if temperature == 0 else draw(logprobs, uniform)
        return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Native:
    """By the kernels of kernels.cpp, in float32 or bfloat16 on a CPU."""

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        call("add_norm", x, x, y, weight, out, None, *x.shape, eps)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        call("silu_mul", gate_up, gate_up, gate_up[:, width:], out, rows, width, 2 * width)
        return out

    def attend(self, joined: Tensor, keys: Tensor, values: Tensor, place: Place, heads: int, rotary: bool, window: int | None) -> Tensor:
        B, G, slots, d = keys.shape
        out = joined.new_empty(B, heads * d)
        cos, sin = (place.cos, place.sin) if rotary else (None, None)
        call("attend", joined, joined, cos, sin, keys, values, place.positions, out, B, heads, G, d, slots, window or 0)
        return out

    def draw(self, logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        call("draw", logits, logits, uniform, temperature, tokens, logprobs, *logits.shape)
        return tokens, logprobs


def pieces_for(device: torch.device, dtype: torch.dtype) -> Pieces:
    """The fastest set for this device and dtype."""
    return Native() if serves(torch.empty(0, dtype=dtype, device=device)) else Plain()
