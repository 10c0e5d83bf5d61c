"""One readable decoder: embeddings, rotary positions, grouped-query attention, gated MLP, RMSNorm.

It is the Llama family (Llama, SmolLM2, SmolLM3, Mistral, Qwen2, Qwen3) under Hugging Face's parameter
names, so weights load and save without translation. Letters in shape comments: B sequences, T tokens,
S cache slots, V vocabulary, D width, H query heads, G key/value heads, d head width.

Numbers: matrix products run in the dtype of the activations; a weight kept in another dtype (fp32 master
weights under bf16 activations) is cast where it is used, and its gradient arrives in its own dtype.
Norms, rotary angles and softmax run in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accord.nn.fused import only_plain, rms_norm, rotate_tokens, silu_mul


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in Hugging Face's words.

    Attributes:
        rope: rotary settings: ``rope_theta`` and, for scaled variants, ``rope_type`` and its numbers.
        sliding_window: attend to at most this many latest tokens (Mistral); None is full attention.
        windowed: for each layer, whether the sliding window applies to it.
        rotary: for each layer, whether it has rotary positions at all (SmolLM3 leaves some out).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed: tuple[bool, ...] = ()
    rotary: tuple[bool, ...] = ()
    rope: dict[str, object] = field(default_factory=lambda: {"rope_theta": 10000.0})


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular frequency of each pair of channels, shape (d/2,), and the scale of cos and sin.

    Su et al. 2021 (RoFormer), eq. 15. The scaled variants come from ``transformers``' table of
    initialisers, which is where each of them is defined.
    """
    kind = str(config.rope.get("rope_type", "default"))
    theta = float(config.rope["rope_theta"])  # type: ignore[arg-type]
    if kind == "default":
        return 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stand_in = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope),
    )
    with torch.device("cpu"):
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](stand_in, device=torch.device("cpu"))
    return frequencies.float(), float(scale)


class Linear(nn.Linear):
    """``nn.Linear`` that computes in the dtype of its input, whatever dtype its weight is kept in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


WRITTEN_OUT = {torch.bfloat16: 256, torch.float32: 96}
"""Keys up to which two batched products are faster than the fused kernel on a CPU, forwards and backwards (bench/LOG.md)."""


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V with G key/value heads shared by H query heads.

    query (B,H,T,d); key, value (B,G,S,d); bias (B,1,T,S), 0 where a query may look and very low elsewhere.
    Returns (B,T,H*d). Written out, or through the fused kernel where that is faster: long rows, and a GPU.
    """
    T, S = query.shape[2], key.shape[2]
    if T > 1 and not only_plain() and (query.is_cuda or WRITTEN_OUT.get(query.dtype, S) < S):
        return attend_fused(query, key, value, bias)
    return attend_written_out(query, key, value, bias)


def attend_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """:func:`attend` by torch's kernel; the probabilities are never in memory."""
    B, H, T, d = query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    return out.transpose(1, 2).reshape(B, T, H * d)


def attend_written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """:func:`attend` as two batched products."""
    B, H, T, d = query.shape
    G, S = key.shape[1], key.shape[2]
    grouped = query.reshape(B, G, H // G * T, d)
    scores = (grouped @ key.transpose(-1, -2)).view(B, G, H // G, T, S)
    weights = torch.softmax(scores.float() / math.sqrt(d) + bias[:, :, None], dim=-1).to(value.dtype)
    out = weights.view(B, G, H // G * T, S) @ value
    return out.view(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.heads, self.groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.q_proj = Linear(D, self.heads * d, bias=config.qkv_bias)
        self.k_proj = Linear(D, self.groups * d, bias=config.qkv_bias)
        self.v_proj = Linear(D, self.groups * d, bias=config.qkv_bias)
        self.o_proj = Linear(self.heads * d, D, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.rotary = config.rotary[layer] if config.rotary else True

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,T,D) -> query (B,H,T,d), key and value (B,G,T,d), rotated to their positions."""
        B, T, _ = x.shape
        query = self.q_proj(x).view(B, T, self.heads, self.head_dim)
        key = self.k_proj(x).view(B, T, self.groups, self.head_dim)
        value = self.v_proj(x).view(B, T, self.groups, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary:
            query, key = rotate_tokens(query, cos, sin), rotate_tokens(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        return self.o_proj(attend(*self.project(x, cos, sin), bias))


class MLP(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, hidden, bias=config.mlp_bias)
        self.up_proj = Linear(D, hidden, bias=config.mlp_bias)
        self.down_proj = Linear(hidden, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.windowed = config.windowed[layer] if config.windowed else config.sliding_window is not None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Geometry:
    """What every layer needs to know about where the tokens are: built once a forward pass.

    cos, sin (B,1,T,d); bias and windowed_bias (B,1,T,S), fp32.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor
    windowed_bias: Tensor

    def of(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        return self.cos, self.sin, self.windowed_bias if block.windowed else self.bias


class Rotary(nn.Module):
    """cos and sin of positions times frequencies; kept out of the state dict."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.scale = rotary_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B,T) -> cos, sin (B,1,T,d) in ``dtype``."""
        angles = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def attention_bias(query_positions: Tensor, key_positions: Tensor, key_mask: Tensor, window: int | None = None) -> Tensor:
    """Additive mask (B,1,T,S): 0 where the key exists and is not after the query, else a very low number.

    Args:
        query_positions: (B,T) int.
        key_positions: (B,S) int.
        key_mask: (B,S) bool, True where a key exists (False for padding and unused cache slots).
        window: a query sees keys less than this many positions back; None is no limit.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    allowed = (distance >= 0) & key_mask[:, None, :]
    if window is not None:
        allowed &= distance < window
    # A finite low number, so that a row that may look nowhere (padding) averages instead of giving NaN.
    return torch.zeros_like(distance, dtype=torch.float32).masked_fill_(~allowed, -1e30)[:, None]


class Backbone(nn.Module):
    """Embeddings, layers and the final norm (``model.*`` in a Hugging Face checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model of the Llama family.

    The forward pass comes in pieces, because RLHF wants them apart: :meth:`lower` (the part below the
    split), :meth:`upper` (the part above it), and the output matrix, which callers apply only to the
    positions that need logits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary_emb = Rotary(config)
        self.compute_dtype = torch.float32

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    @property
    def blocks(self) -> list[Block]:
        """The layers, bottom first."""
        return cast("list[Block]", list(self.model.layers))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations are computed in; trained weights may be kept in fp32 under it."""
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def geometry(self, positions: Tensor, mask: Tensor) -> Geometry:
        """For a pass over whole sequences. positions (B,T); mask (B,T) bool, True where a token exists."""
        cos, sin = self.rotary_emb(positions, self.dtype)
        bias = attention_bias(positions, positions, mask)
        window = self.config.sliding_window
        windowed = bias if window is None else attention_bias(positions, positions, mask, window)
        return Geometry(cos, sin, bias, windowed)

    def lower(self, tokens: Tensor, geometry: Geometry, split: int) -> Tensor:
        """Embed and run the layers below ``split``. tokens (B,T) -> (B,T,D)."""
        x = self.model.embed_tokens(tokens).to(self.dtype)
        for block in self.blocks[:split]:
            x = block(x, *geometry.of(block))
        return x

    def upper(self, x: Tensor, geometry: Geometry, split: int) -> Tensor:
        """Run the layers from ``split`` and the final norm. (B,T,D) -> (B,T,D)."""
        for block in self.blocks[split:]:
            x = block(x, *geometry.of(block))
        return self.model.norm(x)

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Final normed hidden states, (B,T,D); ``hidden @ output_matrix.T`` are the logits."""
        geometry = self.geometry(positions, mask)
        return self.upper(self.lower(tokens, geometry, 0), geometry, 0)

    @property
    def output_matrix(self) -> Tensor:
        """(V,D): the weights of the language-model head."""
        return self.lm_head.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B,T,V) of every position; for tests and small texts. Positions count the real tokens."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.lm_head(self.hidden(tokens, positions, mask))
