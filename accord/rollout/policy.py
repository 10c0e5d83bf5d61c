"""A policy: a language model, its tokenizer, and how it is adapted.

Adaptation decides what trains:

- ``split``: the layers from ``split`` upwards; those below (the trunk) are frozen and *shared* with the
  reference, the critic and the reward model, so that their work on the trunk is done once.
- ``lora``: low-rank adapters on every layer; the frozen matrices under them are the reference's own.
- ``full``: every weight; the reference is the frozen original.

In each case ``start`` is the policy as it started, and serves as the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accord.disk import whole_folder
from accord.errors import UserError
from accord.nn.foreign import ForeignModel
from accord.nn.loading import Model, load_model, resolve_dtype
from accord.nn.lora import add_lora, lora_layers, save_lora
from accord.nn.transformer import Transformer
from accord.nn.weights import build, merged_state, save_folder
from accord.text.tokenizer import Tokenizer

Module = TypeVar("Module", bound=nn.Module)
ADAPTATIONS = ("split", "lora", "full")


@dataclass
class Policy:
    """See the module's docstring.

    Attributes:
        model: the current weights.
        start: the frozen starting weights (the same object while nothing trains).
        split: layers of ``model`` below this index are ``start``'s own; 0 when nothing is shared.
        trunk_layers: where ``start`` is cut for critics and reward models that sit on its trunk.
        source: the name it was loaded under; where ``raw`` (config.json) and the tokenizer came from.
    """

    model: Model
    tokenizer: Tokenizer
    raw: dict[str, Any]
    source: str
    start: Model
    adaptation: str = "frozen"
    split: int = 0
    trunk_layers: int = 0

    @classmethod
    def load(cls, name: str, dtype: str = "auto", device: str | None = None) -> Policy:
        """Open a bundled model, a local folder or a Hugging Face id. ``device``: a GPU if there is one, unless given."""
        place = None if device is None else torch.device(device)
        loaded = load_model(name, resolve_dtype(dtype, place), place)
        tokenizer = Tokenizer.load(loaded.folder)
        return cls(loaded.model, tokenizer, loaded.raw, name, loaded.model, trunk_layers=loaded.model.depth)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int:
        """The most tokens the model was made for."""
        for key in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(self.raw.get(key), int):
                return int(self.raw[key])
        return 2048

    def adapt(self, adaptation: str, top_layers: int, lora_rank: int, lora_alpha: float, seed: int) -> Policy:
        """A trainable policy that starts from this one; this one is its reference and stays as it is."""
        if adaptation not in ADAPTATIONS:
            raise UserError(f"Unknown adaptation '{adaptation}'; use {', '.join(ADAPTATIONS)}.")
        if self.model is not self.start:
            return self.frozen().adapt(adaptation, top_layers, lora_rank, lora_alpha, seed)
        start = self.model
        if isinstance(start, ForeignModel):
            if adaptation != "full":
                kind = self.raw.get("model_type")
                raise UserError(f"accord does not compute '{kind}' models itself, so it cannot {adaptation} them; use --adaptation full.")
            return self._with(copy.deepcopy(start).float().requires_grad_(True), "full", 0, 0)
        if not 1 <= top_layers <= start.depth:
            raise UserError(f"top_layers is {top_layers}; this model has {start.depth} layers, so use 1 to {start.depth}.")
        cut = start.depth - top_layers
        if adaptation == "lora":
            model = share_layers(start, start.depth)
            model.model.layers = nn.ModuleList(_shell(block) for block in start.model.layers)
            add_lora(model, lora_rank, lora_alpha, seed)
            return self._with(model, "lora", 0, cut)
        if adaptation == "full":
            model = copy.deepcopy(start).float().requires_grad_(True)
            if model.config.tie_word_embeddings:
                model.lm_head.weight = model.model.embed_tokens.weight
            return self._with(model, "full", 0, cut)
        return self._with(share_layers(start, cut), "split", cut, cut)

    def frozen(self) -> Policy:
        """This policy with its current weights fixed (adapters merged), to start another training from."""
        if self.model is self.start:
            return self
        if isinstance(self.model, ForeignModel):
            model: Model = copy.deepcopy(self.model).requires_grad_(False)
        else:
            model = build(self.raw, merged_state(self.model), self.source, self.model.compute_dtype).to(self.device)
        return Policy(model, self.tokenizer, self.raw, self.source, model, trunk_layers=model.depth)

    def snapshot(self) -> Model:
        """The current weights as a model of its own; what does not train is shared, not copied."""
        return snapshot_of(self.model)

    def _with(self, model: Model, adaptation: str, split: int, trunk_layers: int) -> Policy:
        model.compute_dtype = self.model.compute_dtype
        return Policy(model, self.tokenizer, self.raw, self.source, self.model, adaptation, split, trunk_layers)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that train, by name; a checkpoint holds these."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: str | Path) -> None:
        """Write a folder that ``transformers`` opens; for LoRA also ``adapter/``, which PEFT opens."""
        with whole_folder(Path(folder)) as aside:
            if isinstance(self.model, ForeignModel):
                self.model.inner.save_pretrained(str(aside))  # type: ignore[operator]
            else:
                save_folder(aside, self.raw, merged_state(self.model))
                if lora_layers(self.model):
                    save_lora(self.model, aside / "adapter", self.source)
            self.tokenizer.save(aside)


def share_layers(start: Transformer, cut: int) -> Transformer:
    """A model whose layers below ``cut`` are ``start``'s own objects and whose rest is a trainable fp32 copy.

    The output matrix is shared and frozen with the embedding.
    """
    model = copy.copy(start)
    model._modules = dict(start._modules)
    backbone = copy.copy(start.model)
    backbone._modules = dict(start.model._modules)
    layers = [b if i < cut else copy.deepcopy(b).float().requires_grad_(True) for i, b in enumerate(start.model.layers)]
    backbone._modules["layers"] = nn.ModuleList(layers)
    backbone._modules["norm"] = copy.deepcopy(start.model.norm).float().requires_grad_(cut < start.depth)
    model._modules["model"] = backbone
    return model


def snapshot_of(module: Module) -> Module:
    """A frozen copy that shares what does not train: whole layers, and parameters."""
    still = [m for m in module.modules() if m is not module and not any(p.requires_grad for p in m.parameters())]
    memo: dict[int, object] = {id(x): x for x in [*still, *(p for p in module.parameters() if not p.requires_grad)]}
    return copy.deepcopy(module, memo).requires_grad_(False)


def tensors_of(snapshot: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those parameters of a snapshot that a checkpoint holds: the ones that train in what it was taken of."""
    parameters = dict(snapshot.named_parameters())
    return {name: parameters[name].detach() for name in names}


def take_over(snapshot: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a snapshot the parameters that :func:`tensors_of` gave."""
    parameters = dict(snapshot.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)


def _shell(block: nn.Module) -> nn.Module:
    """A block with its own children list over the same frozen weights, for adapters to be put in."""
    memo = {id(p): p for p in block.parameters()}
    return copy.deepcopy(block, memo)
