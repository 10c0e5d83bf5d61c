"""One readable decoder: embeddings, rotary positions, grouped-query attention, gated MLP, RMSNorm.

It is the Llama family (Llama, SmolLM2, SmolLM3, Mistral, Qwen2, Qwen3) under Hugging Face's parameter
names, so weights load and save without translation. Letters in shape comments: N tokens, B sequences of T places,
V vocabulary, D width, H query heads, G key/value heads, d head width. Activations are (N,D), a line a token
(:mod:`accord.nn.layout`).

Numbers: matrix products run in the dtype of the activations; a weight kept in another dtype (fp32 master
weights under bf16 activations) is cast where it is used, and its gradient arrives in its own dtype.
Norms, rotary angles and softmax run in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accord.errors import UserError, first_line
from accord.nn.attention import attend_rows, collect, lay_out
from accord.nn.fused import rms_norm, silu_mul
from accord.nn.layout import Layout, Places


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in Hugging Face's words.

    Attributes:
        rope: rotary settings: ``rope_theta`` and, for scaled variants, ``rope_type`` and its numbers.
        sliding_window: attend to at most this many latest tokens (Mistral); None is full attention.
        windowed: for each layer, whether the sliding window applies to it.
        rotary: for each layer, whether it has rotary positions at all (SmolLM3 leaves some out).
        positions: ``rotary``, or what is added to the embeddings: ``learned`` vectors, or ``sinusoidal`` ones.
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
    positions: str = "rotary"


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

    try:
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
    except Exception as error:  # the initialisers take what they find
        raise UserError(
            f"config.json: rotary positions of type {kind!r} cannot be computed ({first_line(error)}); copy or save the model again."
        ) from None


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(N,) -> (N,width) fp32: sin and cos of the position at wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, section 3.5)."""
    rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width)
    angles = positions[:, None].float() * rate
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


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

    def forward(self, x: Tensor, at: Geometry, window: int | None, wanted: Tensor | None = None) -> Tensor:
        """x (N,D) -> (N,D), or the lines of the ``wanted`` (M,) tokens only, (M,D)."""
        key = self.k_proj(x).view(len(x), self.groups, self.head_dim)
        value = self.v_proj(x).view(len(x), self.groups, self.head_dim)
        x, home, cos, sin = at.queries(x, wanted)
        query = self.q_proj(x).view(len(x), self.heads, self.head_dim)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        everywhere = at.layout.everywhere
        if self.rotary:
            query, key = lay_out(query, home, cos, sin), lay_out(key, everywhere, at.cos, at.sin)
        else:
            query, key = lay_out(query, home), lay_out(key, everywhere)
        return self.o_proj(collect(attend_rows(query, key, lay_out(value, everywhere), window), home))


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
        windowed = config.windowed[layer] if config.windowed else True
        self.window = config.sliding_window if windowed else None

    def forward(self, x: Tensor, at: Geometry, wanted: Tensor | None = None) -> Tensor:
        """x (N,D) -> (N,D), or only the lines of the ``wanted`` (M,) tokens, (M,D): what a last layer is read at."""
        change = self.self_attn(self.input_layernorm(x), at, self.window, wanted)
        x = (x if wanted is None else x.index_select(0, wanted)) + change
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Geometry:
    """What every layer needs to know about where the tokens are: built once a forward pass. cos, sin (N,d)."""

    layout: Layout
    cos: Tensor
    sin: Tensor

    def queries(self, x: Tensor, wanted: Tensor | None) -> tuple[Tensor, Places, Tensor, Tensor]:
        """Of the tokens whose queries look: their lines of x, their places, their cos and sin."""
        if wanted is None:
            return x, self.layout.home, self.cos, self.sin
        return x.index_select(0, wanted), self.layout.home_of(wanted), self.cos[wanted], self.sin[wanted]


class Rotary(nn.Module):
    """cos and sin of positions times frequencies; kept out of the state dict."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.scale = rotary_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (N,) -> cos, sin (N,d) in ``dtype``."""
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


class Backbone(nn.Module):
    """Embeddings, layers and the final norm (``model.*`` in a Hugging Face checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = config.positions
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What the first layer reads. tokens, positions (N,) -> (N,D)."""
        x = self.embed_tokens(tokens)
        if self.positions == "learned":
            x = x + self.embed_positions(positions)
        elif self.positions == "sinusoidal":
            x = x + sinusoids(positions, x.shape[-1])
        return cast(Tensor, x.to(dtype))


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

    def geometry(self, layout: Layout) -> Geometry:
        """For passes over the tokens of these rows."""
        return Geometry(layout, *self.rotary_emb(layout.positions, self.dtype))

    def lower(self, at: Geometry, split: int) -> Tensor:
        """Embed the tokens and run the layers below ``split``: (N,D)."""
        x = self.model.embed(at.layout.tokens, at.layout.positions, self.dtype)
        for block in self.blocks[:split]:
            x = block(x, at)
        return x

    def upper(self, x: Tensor, at: Geometry, split: int, wanted: Tensor | None = None) -> Tensor:
        """Run the layers from ``split`` and the final norm: (N,D) -> (N,D), or only the ``wanted`` (M,) tokens, (M,D)."""
        for number, block in enumerate(self.blocks[split:], split + 1):
            x = block(x, at, wanted if number == self.depth else None)
        if wanted is not None and split == self.depth:
            x = x.index_select(0, wanted)
        return self.model.norm(x)

    @property
    def output_matrix(self) -> Tensor:
        """(V,D): the weights of the language-model head."""
        return self.lm_head.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B,T,V) of every token, 0 where ``mask`` is False; for tests and small texts. Positions count the tokens."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        order = (~mask).long().argsort(dim=1, stable=True)  # the tokens of a row first, wherever its padding is
        at = self.geometry(layout := Layout.of(tokens.gather(1, order), mask.sum(1)))
        logits = layout.rows(self.lm_head(self.upper(self.lower(at, 0), at, 0)))
        return logits.gather(1, order.argsort(1)[..., None].expand_as(logits))
