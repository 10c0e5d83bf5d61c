"""A decoder with a static key/value cache and fused projections, for :class:`Transformer`.

It computes what the transformer computes, one token a row at a time. Rows are independent: each has its
own length, so a finished row's place can be given to the next prompt while the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accord.nn.attention import attend_rows, collect, lay_out
from accord.nn.layout import Layout
from accord.nn.transformer import Block, RMSNorm, Transformer
from accord.rollout.matrices import Matrix, matrix
from accord.rollout.pieces import Place, pieces_for


@dataclass(frozen=True)
class FusedBlock:
    """A block's weights in the compute dtype, query/key/value and gate/up side by side."""

    input_norm: Tensor
    qkv: Matrix
    out: Matrix
    rest_norm: Tensor
    gate_up: Matrix
    down: Matrix
    block: Block  # heads and groups, and which mask and positions apply

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype, precision: str) -> FusedBlock:
        def join(*layers: nn.Module) -> Matrix:
            weights = [layer.weight.detach().to(dtype) for layer in layers]  # type: ignore[operator]
            biases = [] if layers[0].bias is None else [layer.bias.detach().to(dtype) for layer in layers]  # type: ignore[operator]
            return matrix(torch.cat(weights), torch.cat(biases) if biases else None, precision)

        def norm(of: RMSNorm) -> Tensor:
            return of.weight.detach().to(dtype)

        a, m = block.self_attn, block.mlp
        return cls(
            norm(block.input_layernorm),
            join(a.q_proj, a.k_proj, a.v_proj),
            join(a.o_proj),
            norm(block.post_attention_layernorm),
            join(m.gate_proj, m.up_proj),
            join(m.down_proj),
            block,
        )


class Decoder:
    """``rows`` sequences of up to ``slots`` tokens each.

    Frozen blocks are fused once and kept; :meth:`refresh` takes the current weights of the others. Those that
    an ``other`` decoder has fused already are taken over.

    Args:
        precision: ``same`` as the model's, or ``int8`` (:class:`accord.rollout.matrices.Int8`; not the output matrix).
    """

    def __init__(self, model: Transformer, other: Decoder | None = None, precision: str = "same") -> None:
        self.model, self.precision = model, precision
        self.pieces = pieces_for(model.device, model.dtype)
        self._frozen: dict[int, FusedBlock] = {} if other is None else dict(other._frozen)
        self._head: Matrix | None = None if other is None or other.model.output_matrix is not model.output_matrix else other._head
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's current weights."""
        dtype = self.model.dtype
        self.blocks = []
        for block in self.model.blocks:
            if any(p.requires_grad for p in block.parameters()):
                self.blocks.append(FusedBlock.of(block, dtype, self.precision))
            else:
                if id(block) not in self._frozen:
                    self._frozen[id(block)] = FusedBlock.of(block, dtype, self.precision)
                self.blocks.append(self._frozen[id(block)])
        self.matrix = self.model.output_matrix.detach().to(dtype)
        if self._head is None or self.model.output_matrix.requires_grad:
            self._head = matrix(self.matrix, None)
        self.final_norm = self.model.model.norm.weight.detach().to(dtype)

    def allocate(self, rows: int, slots: int) -> None:
        c = self.model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)
        self.keys = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        self.values = torch.zeros_like(self.keys)

    def release(self) -> None:
        """Give back the cache and the copies of weights that train; until the next :meth:`refresh` nothing is decoded."""
        self.keys = self.values = torch.empty(0)
        self.blocks = []
        if self.model.output_matrix.requires_grad:
            self._head = None

    def keep(self, rows: Tensor) -> None:
        """Shrink the cache to these rows, in this order."""
        self.keys, self.values = self.keys[:, rows].contiguous(), self.values[:, rows].contiguous()

    def logits(self, hidden: Tensor) -> Tensor:
        """(B,D) -> (B,V), not yet divided by a temperature."""
        assert self._head is not None
        return self._head(hidden)

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
        layout = Layout.of(tokens, lengths)
        cos, sin = self.model.rotary_emb(layout.positions, self.model.dtype)
        c, everywhere = self.model.config, layout.everywhere
        H, G = c.num_attention_heads, c.num_key_value_heads

        def attention(layer: int, joined: Tensor) -> Tensor:
            block = self.blocks[layer].block
            angles = (cos, sin) if block.self_attn.rotary else (None, None)
            query, key, value = joined.view(len(joined), H + 2 * G, -1).split((H, G, G), dim=1)
            keys, values = lay_out(key, everywhere, *angles), lay_out(value, everywhere)
            self.keys[layer, rows, :, :T] = keys[source]
            self.values[layer, rows, :, :T] = values[source]
            return collect(attend_rows(lay_out(query, layout.home, *angles), keys, values, block.window), layout.home)

        hidden, trunk = self._layers(layout.tokens, layout.positions, split, attention)
        last = everywhere.token[torch.arange(P, device=tokens.device), lengths - 1]
        return hidden[last], layout.rows(trunk)

    def step(self, tokens: Tensor, positions: Tensor, split: int, longest: int) -> tuple[Tensor, Tensor]:
        """Read one token a row. tokens, positions (B,) -> final hidden (B,D), trunk activation (B,D).

        ``longest`` is 1 + the largest position, or more; keys beyond it are not looked at.
        """
        heads = self.model.config.num_attention_heads
        cos, sin = self.model.rotary_emb(positions, self.model.dtype)
        place = Place(positions, cos, sin, longest)

        def attention(layer: int, joined: Tensor) -> Tensor:
            block = self.blocks[layer].block
            cache = self.keys[layer], self.values[layer]
            return self.pieces.attend(joined, *cache, place, heads, block.self_attn.rotary, block.window)

        return self._layers(tokens, positions, split, attention)

    def _layers(self, tokens: Tensor, positions: Tensor, split: int, attention: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """All layers over N tokens. ``attention``: (layer, (N,(H+2G)d)) -> (N,H*d). Returns final hidden and trunk, (N,D)."""
        pieces, eps = self.pieces, self.model.config.rms_norm_eps
        x, change, trunk = self.model.model.embed(tokens, positions, self.model.dtype), None, None
        for layer, fused in enumerate(self.blocks):
            normed = pieces.add_norm(x, change, fused.input_norm, eps)
            if layer == split:
                trunk = x.clone()
            joined = self._query_key_norm(fused.block, fused.qkv(normed))
            change = fused.out(attention(layer, joined))
            normed = pieces.add_norm(x, change, fused.rest_norm, eps)
            change = fused.down(pieces.silu_mul(fused.gate_up(normed)))
        hidden = pieces.add_norm(x, change, self.final_norm, eps)
        return hidden, x if trunk is None else trunk

    def _query_key_norm(self, block: Block, joined: Tensor) -> Tensor:
        attention = block.self_attn
        if not attention.qk_norm:
            return joined
        H, G = attention.heads, attention.groups
        query, key, value = joined.view(len(joined), H + 2 * G, -1).split((H, G, G), dim=1)
        return torch.cat((attention.q_norm(query), attention.k_norm(key), value), dim=1).view(len(joined), -1)


def cache_bytes(model: Transformer, rows: int, slots: int) -> int:
    """Memory of the key/value cache."""
    c = model.config
    return 2 * math.prod((c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)) * model.dtype.itemsize
