"""What a model computes from a text, step by step, each with its shape and its formula.

The transformer is computed here once more, written out line by line in fp32, as a teacher would write it on a board; that it gives
the logits of :class:`accord.nn.transformer.Transformer` is tested. Models that accord does not compute itself are asked through
``transformers``. Letters in shapes: T tokens, V vocabulary, D width, L layers, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.errors import UserError, first_line
from accord.nn.attention import attention_bias
from accord.nn.foreign import ForeignModel
from accord.nn.fused import plain_rotate
from accord.nn.transformer import Block, Transformer, sinusoids
from accord.rollout.policy import Policy

MOST = 128
"""Tokens: what a page can hold."""
NEAREST = 6
SHOWN = 20
"""Next tokens that are listed at each place."""
TEMPERATURES = tuple(round(0.1 * step, 1) for step in range(1, 31))
Matrix = list[list[float]]


@dataclass
class Step:
    """A layer.

    Attributes:
        attention: (H,T,T) softmax(Q K^T / sqrt(d)), 0 above the diagonal.
        shapes: of what the layer computes, by name.
        window: how many of the latest tokens are looked at; None is all.
        by_attention, by_mlp: (T,) length of what each adds to the residual stream.
        after: (T,D) the residual stream after the layer; None where it is not known.
    """

    attention: Tensor
    shapes: dict[str, list[int]]
    window: int | None
    by_attention: Tensor | None
    by_mlp: Tensor | None
    after: Tensor | None


@dataclass
class Trace:
    """Everything that is shown of a text.

    Attributes:
        pieces: each token's own text.
        embedded: (T,D) the embeddings, before any position is added.
        positions: what tells a token its place: ``kind``, ``formula``, ``rows`` (T,C) of what is drawn, and what its columns are.
        logits: (T,V) fp32, of what follows each token.
    """

    model: str
    about: dict[str, Any]
    text: str
    ids: list[int]
    pieces: list[str]
    embedded: Tensor
    positions: dict[str, Any]
    layers: list[Step]
    final: Tensor
    logits: Tensor
    policy: Policy


@torch.no_grad()
def trace(policy: Policy, text: str, chat: bool = False) -> Trace:
    """Compute it.

    Args:
        chat: the text is what a user says, and the model's template is put around it.

    Raises:
        UserError: the text has no token, more than :data:`MOST`, or more than the model's context.
    """
    tokenizer = policy.tokenizer
    if chat and not tokenizer.has_chat_template:
        raise UserError("The model's tokenizer has no chat template; leave out --chat.")
    ids = tokenizer.encode_prompt(text) if chat else tokenizer.encode_plain(text)
    if not ids:
        raise UserError("The text has no tokens; give a word or more.")
    most = min(MOST, policy.context)
    if len(ids) > most:
        raise UserError(f"The text has {len(ids)} tokens; a page holds {most}. Give a shorter one.")
    pieces = [str(tokenizer.inner.decode([i])) for i in ids]
    tokens = torch.tensor(ids, device=policy.device)
    model = policy.model
    about: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": model.output_matrix.shape[0]}
    if isinstance(model, ForeignModel):
        embedded, positions, layers, final, logits = _foreign(model, tokens)
    else:
        embedded, positions, layers, final, logits = _own(model, tokens)
    width = embedded.shape[1]
    about |= {"layers": len(layers), "width": width, "heads": layers[0].attention.shape[0], "kind": policy.raw.get("model_type")}
    return Trace(policy.source, about, text, ids, pieces, embedded, positions, layers, final, logits, policy)


def _own(model: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Any], list[Step], Tensor, Tensor]:
    places = torch.arange(len(tokens), device=tokens.device)
    backbone = model.model
    embedded = backbone.embed_tokens(tokens).float()
    x = backbone.embed(tokens, places, torch.float32)
    cos, sin = model.rotary_emb(places, torch.float32)
    positions = _positions(model, places, cos)
    layers = []
    for block in model.blocks:
        step, x = _layer(block, x, places, cos, sin)
        layers.append(step)
    final = backbone.norm(x)
    return embedded, positions, layers, final, final @ model.output_matrix.float().t()


def _layer(block: Block, x: Tensor, places: Tensor, cos: Tensor, sin: Tensor) -> tuple[Step, Tensor]:
    """x + attention(norm(x)), then x + mlp(norm(x)), written out."""
    a = block.self_attn
    T = len(x)
    normed = block.input_layernorm(x)
    query, key, value = (p(normed).view(T, -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))  # (T,H,d), (T,G,d), (T,G,d)
    if a.qk_norm:
        query, key = a.q_norm(query), a.k_norm(key)
    if a.rotary:
        query, key = (plain_rotate(h, cos[:, None], sin[:, None]) for h in (query, key))
    shapes = {"Q": [a.heads, T, a.head_dim], "K": [a.groups, T, a.head_dim], "V": [a.groups, T, a.head_dim]}
    key, value = (h.repeat_interleave(a.heads // a.groups, dim=1).transpose(0, 1) for h in (key, value))  # (H,T,d)
    scores = query.transpose(0, 1) @ key.transpose(1, 2) / math.sqrt(a.head_dim)  # (H,T,T)
    attention = (scores + attention_bias(places, places, block.window)).softmax(-1)
    mixed = (attention @ value).transpose(0, 1).reshape(T, -1)
    change = a.o_proj(mixed)
    x = x + change
    m = block.mlp
    inner = block.post_attention_layernorm(x)
    wide = torch.nn.functional.silu(m.gate_proj(inner)) * m.up_proj(inner)
    added = m.down_proj(wide)
    shapes |= {"scores": list(scores.shape), "mlp": list(wide.shape), "residual": list(x.shape)}
    return Step(attention, shapes, block.window, change.norm(dim=-1), added.norm(dim=-1), x + added), x + added


def _positions(model: Transformer, places: Tensor, cos: Tensor) -> dict[str, Any]:
    kind = model.config.positions
    if kind == "rotary":
        half = cos.shape[1] // 2
        return {
            "kind": "rotary", "rows": cos[:, :half], "columns": "pair of channels",
            "formula": "each pair of channels of Q and K turns by the angle m·θᵢ, θᵢ = θ^(−2i/d); drawn is cos(m·θᵢ)",
            "shape": [len(places), half],
        }  # fmt: skip
    added = model.model.embed_positions(places).float() if kind == "learned" else sinusoids(places, model.config.hidden_size)
    formula = (
        "xₘ = E[idₘ] + P[m], P is learned"
        if kind == "learned"
        else "xₘ = E[idₘ] + P[m], P[m, 2i] = sin(m / 10000^(2i/D)), P[m, 2i+1] = cos(…)"
    )
    return {"kind": kind, "rows": added, "columns": "channel", "formula": formula, "shape": list(added.shape)}


def _foreign(model: ForeignModel, tokens: Tensor) -> tuple[Tensor, dict[str, Any], list[Step], Tensor, Tensor]:
    inner = model.inner
    before = inner.config._attn_implementation
    try:
        inner.set_attn_implementation("eager")
        out = inner(input_ids=tokens[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    except Exception as error:  # each architecture has its own reasons
        raise UserError(f"transformers does not show the inside of this model ({first_line(error)}); take another.") from None
    finally:
        inner.set_attn_implementation(before)
    if not out.attentions or any(a is None for a in out.attentions):
        raise UserError("This model has layers without attention, so there is nothing to draw of them; take another.")
    embedded = inner.get_input_embeddings()(tokens).float()
    layers = []
    streams = [*(state[0].float() for state in out.hidden_states[1:-1]), None]  # the last of them is after the final norm
    for attention, after in zip(out.attentions, streams, strict=True):
        shapes = {"scores": list(attention.shape[1:]), "residual": list(embedded.shape)}
        layers.append(Step(attention[0].float(), shapes, None, None, None, after))
    positions: dict[str, Any] = {
        "kind": "its own",
        "rows": None,
        "columns": "",
        "formula": "as this architecture has it; computed by transformers",
        "shape": [],
    }
    return embedded, positions, layers, out.hidden_states[-1][0].float(), out.logits[0].float()
