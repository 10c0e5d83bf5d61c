"""A decoder with a static key/value cache and fused projections, for :class:`Transformer`.

It computes what the transformer computes, one token a row at a time. Rows are independent: each has its
own length, so a finished row's place can be given to the next prompt while the others go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accord.nn.transformer import Block, Transformer, attend, attention_bias, rotate


@dataclass(frozen=True)
class FusedBlock:
    """A block's weights in the compute dtype, query/key/value and gate/up side by side."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    block: Block  # norms, and which mask and positions apply

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> FusedBlock:
        def join(*layers: nn.Module) -> tuple[Tensor, Tensor | None]:
            weight = torch.cat([layer.weight.detach().to(dtype) for layer in layers])  # type: ignore[operator]
            if layers[0].bias is None:
                return weight, None
            return weight, torch.cat([layer.bias.detach().to(dtype) for layer in layers])  # type: ignore[operator]

        a, m = block.self_attn, block.mlp
        return cls(*join(a.q_proj, a.k_proj, a.v_proj), *join(a.o_proj), *join(m.gate_proj, m.up_proj), *join(m.down_proj), block)


class Decoder:
    """``rows`` sequences of up to ``slots`` tokens each.

    Frozen blocks are fused once and kept; :meth:`refresh` takes the current weights of the others. Those that
    an ``other`` decoder has fused already are taken over.
    """

    def __init__(self, model: Transformer, other: Decoder | None = None) -> None:
        self.model = model
        self._frozen: dict[int, FusedBlock] = {} if other is None else dict(other._frozen)
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's current weights."""
        self.blocks = []
        for block in self.model.blocks:
            if any(p.requires_grad for p in block.parameters()):
                self.blocks.append(FusedBlock.of(block, self.model.dtype))
            else:
                if id(block) not in self._frozen:
                    self._frozen[id(block)] = FusedBlock.of(block, self.model.dtype)
                self.blocks.append(self._frozen[id(block)])
        self.norm = self.model.model.norm
        self.matrix = self.model.output_matrix.detach().to(self.model.dtype)

    def allocate(self, rows: int, slots: int) -> None:
        c = self.model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)
        self.keys = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        self.values = torch.zeros_like(self.keys)
        self.slots = torch.arange(slots, device=self.model.device)

    def keep(self, rows: Tensor) -> None:
        """Shrink the cache to these rows, in this order."""
        self.keys, self.values = self.keys[:, rows].contiguous(), self.values[:, rows].contiguous()

    def prefill(self, tokens: Tensor, lengths: Tensor, rows: Tensor, source: Tensor, split: int) -> tuple[Tensor, Tensor]:
        """Read whole prompts once and copy their keys and values to the rows that continue them.

        Args:
            tokens: (P,T) right-padded prompts; lengths (P,).
            rows: (R,) cache rows to fill; source (R,): which prompt each continues.
            split: the layer whose input is the trunk activation.

        Returns:
            Final hidden state of each prompt's last token (P,D), and the trunk activations (P,T,D).
        """
        P, T = tokens.shape
        positions = self.slots[:T].expand(P, T)
        mask = positions < lengths[:, None]
        geometry = self.model.geometry(positions, mask)
        x = self.model.model.embed_tokens(tokens).to(self.model.dtype)
        trunk = x
        for layer, fused in enumerate(self.blocks):
            if layer == split:
                trunk = x
            cos, sin, bias = geometry.of(fused.block)
            query, key, value = self._project(fused, x, cos, sin)
            self.keys[layer, rows, :, :T] = key[source]
            self.values[layer, rows, :, :T] = value[source]
            x = self._rest(fused, x, attend(query, key, value, bias))
        if split == len(self.blocks):
            trunk = x
        last = x[torch.arange(P, device=x.device), lengths - 1]
        return self.norm(last), trunk

    def step(self, tokens: Tensor, positions: Tensor, split: int, longest: int) -> tuple[Tensor, Tensor]:
        """Read one token a row. tokens, positions (B,) -> final hidden (B,D), trunk activation (B,D).

        ``longest`` is 1 + the largest position; keys beyond it are not looked at.
        """
        at = torch.arange(len(tokens), device=tokens.device)
        where = positions[:, None]
        cos, sin = self.model.rotary_emb(where, self.model.dtype)
        keys_at = self.slots[None, :longest].expand(len(tokens), -1)
        exists = torch.ones_like(keys_at, dtype=torch.bool)
        bias = attention_bias(where, keys_at, exists)
        window = self.model.config.sliding_window
        windowed = bias if window is None else attention_bias(where, keys_at, exists, window)
        x = self.model.model.embed_tokens(tokens[:, None]).to(self.model.dtype)
        trunk = x
        for layer, fused in enumerate(self.blocks):
            if layer == split:
                trunk = x
            query, key, value = self._project(fused, x, cos, sin)
            self.keys[layer, at, :, positions] = key[:, :, 0]
            self.values[layer, at, :, positions] = value[:, :, 0]
            seen = (self.keys[layer, :, :, :longest], self.values[layer, :, :, :longest])
            x = self._rest(fused, x, attend(query, *seen, windowed if fused.block.windowed else bias))
        if split == len(self.blocks):
            trunk = x
        return self.norm(x[:, 0]), trunk[:, 0]

    @staticmethod
    def _project(fused: FusedBlock, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = fused.block.self_attn
        H, G, d = attention.heads, attention.groups, attention.head_dim
        B, T, _ = x.shape
        joined = F.linear(fused.block.input_layernorm(x), fused.qkv, fused.qkv_bias).view(B, T, H + 2 * G, d)
        query_key, value = joined[:, :, : H + G], joined[:, :, H + G :].transpose(1, 2)
        if attention.qk_norm:
            query_key = torch.cat((attention.q_norm(query_key[:, :, :H]), attention.k_norm(query_key[:, :, H:])), dim=2)
        query_key = query_key.transpose(1, 2)
        if attention.rotary:
            query_key = rotate(query_key, cos, sin)
        return query_key[:, :H], query_key[:, H:], value

    @staticmethod
    def _rest(fused: FusedBlock, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.linear(attended, fused.out, fused.out_bias)
        normed = fused.block.post_attention_layernorm(x)
        gate, up = F.linear(normed, fused.gate_up, fused.gate_up_bias).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, fused.down, fused.down_bias)


def cache_bytes(model: Transformer, rows: int, slots: int) -> int:
    """Memory of the key/value cache."""
    c = model.config
    return 2 * math.prod((c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)) * model.dtype.itemsize
