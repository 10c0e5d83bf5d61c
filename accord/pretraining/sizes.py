"""Shapes of models, by name."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from accord.errors import UserError, did_you_mean


class Size(NamedTuple):
    """Layers, width, query heads, the key/value heads that they share with grouped attention, width of the gated MLP, and the
    learning rate that goes with it."""

    layers: int
    width: int
    heads: int
    groups: int
    hidden: int
    rate: float

    def weights(self, vocabulary: int, grouped: bool = False) -> int:
        """Parameters with a vocabulary, whose embedding is also the output matrix."""
        shared = (self.groups if grouped else self.heads) * (self.width // self.heads)
        layer = 2 * self.width * (self.width + shared) + 3 * self.width * self.hidden + 2 * self.width
        return self.layers * layer + self.width + vocabulary * self.width


SIZES = {
    "0.5m": Size(4, 96, 3, 1, 256, 3e-3),
    "1m": Size(4, 128, 4, 1, 384, 3e-3),
    "2m": Size(6, 160, 5, 1, 448, 2e-3),
    "5m": Size(6, 256, 8, 2, 704, 1.5e-3),
    "15m": Size(8, 384, 6, 2, 1024, 1e-3),
    "40m": Size(12, 512, 8, 2, 1408, 8e-4),
    "100m": Size(14, 768, 12, 4, 2048, 6e-4),
    "350m": Size(27, 1024, 16, 4, 2816, 3e-4),
}
"""Named by their weights without the embedding."""


def size_of(name: str) -> Size:
    """Raises:
    UserError: there is none of that name.
    """
    if name not in SIZES:
        raise UserError(f"Unknown size '{name}': use {', '.join(SIZES)}.{did_you_mean(name, SIZES)}")
    return SIZES[name]


def config_of(
    size: Size, vocabulary: int, context: int, end: int, grouped: bool = False, positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
) -> dict[str, Any]:  # fmt: skip
    """A ``config.json``: with rotary positions a Llama, which ``transformers`` opens; with others a model of accord's own."""
    shape = {
        "vocab_size": vocabulary, "hidden_size": size.width, "intermediate_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.groups if grouped else size.heads, "head_dim": size.width // size.heads,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": end, "rope_theta": 10000.0,
    }  # fmt: skip
    if positions == "rotary":
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape}
    return {"model_type": "accord", **shape, "positions": positions}


def table(vocabulary: int, context: int) -> list[tuple[str, ...]]:
    """Rows for people: name, shape, weights, memory (of weights, gradients and Adam's two moments in fp32), compute a token, learning rate."""
    out = list[tuple[str, ...]]()
    for name, size in SIZES.items():
        weights = size.weights(vocabulary)
        flops = 6 * weights + 6 * size.layers * context * size.width  # of causal attention half the places
        out.append((
            name, f"{size.layers} x {size.width}, {size.heads} heads", f"{weights / 1e6:.1f} M", f"{16 * weights / 1e9:.2f} GB",
            f"{flops / 1e9:.2f} GFLOP", f"{size.rate:g}",
        ))  # fmt: skip
    return out
