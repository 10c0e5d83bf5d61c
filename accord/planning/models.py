"""A model without its weights: its shape, what it is made of, what its layers keep, and a random one like it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from accord.data.records import Prompt
from accord.nn.layout import Layout
from accord.nn.loading import model_folder
from accord.nn.memory import give_back_freed_memory, keep_freed_memory
from accord.nn.transformer import Block, Geometry, ModelConfig, Transformer
from accord.nn.weights import is_native, parse_config, read_config
from accord.progress import track
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout, Row, from_rows
from accord.text.tokenizer import Tokenizer

MEASURED = 2 * 2**30
"""Bytes of weights: a larger model's pace is taken from two with fewer layers."""
AnyPace = TypeVar("AnyPace")


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of one layer, of the embedding, of the whole model."""

    layer: int
    embedding: int
    total: int

    @classmethod
    def of(cls, config: ModelConfig) -> Weights:
        with torch.device("meta"):
            model = Transformer(config)
        layer = sum(p.numel() for p in model.blocks[0].parameters())
        return cls(layer, model.output_matrix.numel(), sum(p.numel() for p in model.parameters()))


def kept_by_a_layer(config: ModelConfig, dtype: torch.dtype, width: int) -> tuple[float, float]:
    """Bytes that a trained layer keeps for its backward pass: whatever comes in, and a token in rows of ``width``."""
    model = random_model(replace(config, vocab_size=1), 1, dtype)  # the embedding has no part in it
    block = model.blocks[0].float().requires_grad_(True)
    counts = [saved_by(block, model.geometry(layout_of(rows, width)), config.hidden_size, dtype) for rows in (1, 2)]
    return 2 * counts[0] - counts[1], (counts[1] - counts[0]) / width


def layout_of(rows: int, width: int) -> Layout:
    """Of rows that have no beginning in common."""
    return Layout.of(torch.arange(rows * width).view(rows, width), torch.full((rows,), width))


def saved_by(block: Block, at: Geometry, hidden: int, dtype: torch.dtype) -> float:
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(torch.zeros(len(at.layout), hidden, dtype=dtype, requires_grad=True), at)
        del out
    return float(sum(storages.values()))


def matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's matrices."""
    D, q, kv, inner = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim, config.intermediate_size  # fmt: skip
    return [(D, q), (D, kv), (D, kv), (q, D), (D, inner), (D, inner), (inner, D)]


def random_model(config: ModelConfig, layers: int, dtype: torch.dtype, device: torch.device | None = None) -> Transformer:
    """A frozen model of that shape with fewer layers and weights of no meaning."""
    if device is None or device.type == "cpu":
        keep_freed_memory()  # as where a real one is loaded
    few = replace(config, num_hidden_layers=layers, windowed=config.windowed[:layers], rotary=config.rotary[:layers])
    with torch.device("meta"):
        model = Transformer(few)
    model = model.to(dtype).to_empty(device=device or torch.device("cpu"))
    if few.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device=device or "cpu").manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02, generator=generator)
    model.rotary_emb = type(model.rotary_emb)(few).to(device or torch.device("cpu"))
    model.compute_dtype = dtype
    return model.requires_grad_(False)


def look(model: str) -> tuple[ModelConfig, Tokenizer] | None:
    """A model's shape and tokenizer, without its weights."""
    folder = model_folder(model)
    raw = read_config(folder)
    return (parse_config(raw, str(folder / "config.json")), Tokenizer.load(folder)) if is_native(raw) else None


def lengths_of(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt."""
    return [len(tokenizer.encode_prompt(prompt.content)) for prompt in prompts]


class _Tokens(SimpleNamespace):
    """Enough of one to sample ids that never end."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def stand_in(model: Transformer) -> Policy:
    """A policy that is no one's, of a random model."""
    tokenizer: Any = _Tokens(pad_id=0, eos_ids=(-1,), fingerprint="")
    return Policy(model, tokenizer, {}, "calibration", model, trunk_layers=model.depth)


def rollout_of(model: Transformer, count: int, prompt: int, new: int) -> Rollout:
    """``count`` completions of different prompts."""
    rows = []
    for i in range(count):
        row = Row(Prompt(f"p{i}", ""), 0)
        row.extend([(i + k) % model.config.vocab_size for k in range(prompt)], chosen=False)
        row.extend([(3 * i + k) % model.config.vocab_size for k in range(new)], chosen=True)
        rows.append(row)
    return replace(from_rows(rows, [False] * count, [""] * count, 0, model.device, sampled=False), step_rewards=None)


def least(work: Callable[[], Any], repeats: int = 2) -> float:
    """Seconds of the fastest of some runs: the first may warm something up."""
    laps = []
    for _ in range(repeats):
        clock = time.perf_counter()
        work()
        laps.append(time.perf_counter() - clock)
    return min(laps)


def apart(whole: float, single: float, count: int, width: int) -> tuple[float, float]:
    """Seconds of a token, and of a step whatever it holds, from those of a step on ``count`` rows of ``width`` tokens and of one on a single row."""
    each = max(whole - single, 1e-6) / ((count - 1) * width) if count > 1 else whole / width
    return each, max(single - each * width, 0.0)


def at_depth(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    fewest: int,
    measure: Callable[[Transformer], AnyPace],
    each: float,
    most: float = MEASURED,
) -> AnyPace:
    """What ``measure``, whose numbers grow in a line with the layers, tells of a model of that shape; of one whose weights are too large,
    along the line through two with fewer layers.

    Args:
        fewest: layers that it needs.
        each: bytes that a weight takes while it is measured, and ``most`` that all may.
    """
    size, depth = Weights.of(config), config.num_hidden_layers
    affordable = int((most - size.embedding * each) // (size.layer * each))
    few, many = (depth, depth) if affordable >= depth or fewest + 1 >= depth else (fewest, max(affordable, fewest + 2))
    paces = []
    for layers in track(sorted({few, many}), "Measuring the pace", len({few, many})):
        paces.append(measure(random_model(config, layers, dtype, device)))
        give_back_freed_memory()
    return paces[0] if len(paces) == 1 else along(paces[0], paces[1], (depth - few) / (many - few))


def along(first: AnyPace, second: AnyPace, share: float) -> AnyPace:
    """The line through two, at 0 and at 1."""
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return type(first)(*(max(x + (y - x) * share, 1e-9) for x, y in pairs))
