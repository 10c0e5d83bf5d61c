"""What a layer does between its matrix products, as one operation each with a backward pass of its own.

On a CPU by the kernels of kernels.cpp, elsewhere (and in float64) in torch; the two are the same formula. The kernels'
backward passes cannot be differentiated again: what needs that works within :func:`twice_differentiable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from accord.nn.native import call, serves


class _Plain:
    wanted = False


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within, forward passes are torch's own, whose gradients have gradients."""
    before, _Plain.wanted = _Plain.wanted, True
    try:
        yield
    finally:
        _Plain.wanted = before


def only_plain() -> bool:
    """Whether this is within :func:`twice_differentiable`."""
    return _Plain.wanted


def by_kernels(x: Tensor) -> bool:
    """Whether the kernels are to compute this, forwards and backwards."""
    return not only_plain() and serves(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) over the last dimension, in fp32 inside (Zhang & Sennrich 2019, eq. 4)."""
    if by_kernels(x):
        out: Tensor = _Norm.apply(x, weight, eps)
        return out
    return plain_rms_norm(x, weight, eps)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm` in torch, wherever it is."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if by_kernels(gate):
        out: Tensor = _SiluMul.apply(gate, up)
        return out
    return F.silu(gate) * up


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of channels by an angle. x (...,d); cos, sin alike in both halves."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, w = x.contiguous(), weight.to(x.dtype).contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out, scales = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        call("add_norm", x, x, None, w, out, scales, rows, width, eps)
        ctx.save_for_backward(x, w, scales)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, scales = ctx.saved_tensors
        g, dx = grads[0].contiguous(), torch.empty_like(x)
        dw = torch.empty(len(w), dtype=torch.float32, device=x.device) if ctx.needs_input_grad[1] else None
        call("norm_backward", x, g, x, w, scales, dx, dw, len(scales), len(w))
        return dx, None if dw is None else dw.to(ctx.dtype), None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        width = gate.shape[-1]
        out = torch.empty_like(gate)
        call("silu_mul", gate, gate, up, out, gate.numel() // width, width, width)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        g, dgate, dup = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        width = gate.shape[-1]
        call("silu_backward", gate, g, gate, up, dgate, dup, gate.numel() // width, width)
        return dgate, dup
