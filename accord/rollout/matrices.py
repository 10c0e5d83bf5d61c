"""A layer's weights as the decoder multiplies by them: as they are, laid out for the processor, or in eight bits."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accord.nn.native import call, multiplies, serves


class Matrix(Protocol):
    """x W^T + b. W (N,K), b (N,) or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (B,K) -> (B,N), in x's dtype."""
        ...


class Dense:
    """As torch keeps it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Packed:
    """In the order oneDNN reads it, which it would otherwise bring it into at every product. The same numbers as Dense."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, 1), bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Panels:
    """In panels of 16 outputs, for accord's own product: for the few rows of a step there is no faster one on AVX512-BF16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outputs, inputs = weight.shape
        filled = F.pad(weight, (0, 0, 0, -self.outputs % 16))
        self.weight = filled.view(-1, 16, inputs // 2, 2).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(len(x), self.outputs)
        call("multiply", x, x, self.weight, self.bias, out, len(x), self.outputs, x.shape[1])
        return out


class Int8:
    """Weights in eight bits with a scale an output, activations rounded to eight bits a row as they come.

    Half the bytes and a faster product; other numbers. Weight w_nk ~ s_n q_nk with s_n = max_k |w_nk| / 127, activations
    likewise (Dettmers et al. 2022, eq. 3, vector-wise quantization).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
        self.weight = (weight.float() / self.scale[:, None]).round().to(torch.int8).t()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if not serves(x):
            rows = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            small = (x.float() / rows).round().to(torch.int8)
            missing = max(17 - len(x), 0) if x.is_cuda else 0  # CUDA's product wants more rows than sixteen
            product = torch._int_mm(F.pad(small, (0, 0, 0, missing)), self.weight)[: len(x)]
            out = product.float() * rows * self.scale
            return (out if self.bias is None else out + self.bias.float()).to(x.dtype)
        x = x.contiguous()
        small, rows = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32, device=x.device)
        call("quantize", x, x, small, rows, *x.shape)
        product = torch._int_mm(small, self.weight)
        out = x.new_empty(product.shape)
        call("dequantize", x, product, rows, self.scale, self.bias, out, *product.shape)
        return out


def matrix(weight: Tensor, bias: Tensor | None, precision: str = "same") -> Matrix:
    """The fastest form for where the weight is; ``int8`` in eight bits."""
    if precision == "int8":
        return Int8(weight, bias)
    if weight.device.type != "cpu":
        return Dense(weight, bias)
    if weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and multiplies() and not torch.cpu._is_amx_tile_supported():
        return Panels(weight, bias)  # with AMX oneDNN's are
    return Packed(weight, bias) if _packs(weight.dtype) else Dense(weight, bias)


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this processor."""
    if dtype not in (torch.bfloat16, torch.float32) or not torch.backends.mkldnn.is_available():
        return False
    try:
        Packed(torch.zeros(16, 16, dtype=dtype), None)(torch.zeros(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):  # bf16 on a processor without AVX512; a torch that names it otherwise
        return False
    return True
