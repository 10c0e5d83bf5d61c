"""Low-rank adapters (Hu et al. 2021): y = W x + (alpha / r) B A x, with W frozen. Saved as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from accord.nn.transformer import Linear, Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank difference."""

    def __init__(self, base: Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.rank, self.scale = base, rank, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        """The merged matrix W + (alpha / r) B A, in fp32."""
        return self.base.weight.float() + self.scale * (self.lora_B @ self.lora_A)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale


def add_lora(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """Put an adapter on every attention and MLP matrix of every layer, in place; the rest is frozen."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parent in [m for block in model.model.layers for m in (block.self_attn, block.mlp)]:
            for name in TARGETS:
                layer = getattr(parent, name, None)
                if isinstance(layer, Linear):
                    setattr(parent, name, LoraLinear(layer, rank, alpha))


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def save_lora(model: Transformer, folder: Path, base_model: str) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; ``PeftModel.from_pretrained`` opens them."""
    layers = lora_layers(model)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": getattr(layer, f"lora_{side}").detach().contiguous()
        for name, layer in layers.items()
        for side in "AB"
    }
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
