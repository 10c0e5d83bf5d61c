"""Hugging Face folders in and out of :class:`accord.nn.transformer.Transformer`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from accord.errors import UserError
from accord.nn.lora import LoraLinear
from accord.nn.transformer import ModelConfig, Transformer

NATIVE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""``model_type`` values that :class:`Transformer` computes itself."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, or a :class:`UserError` that says what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"Model folder {folder} does not exist. Give the bundled name, a folder or a Hugging Face id.")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"Model folder {folder} has no config.json; is it the folder that save_pretrained wrote?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the model again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path} names no model_type; it is not a transformers model.")
    return config


def is_native(config: dict[str, Any]) -> bool:
    """Whether our transformer computes this architecture exactly (activation and positions included)."""
    return config["model_type"] in NATIVE and config.get("hidden_act", "silu") == "silu"


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Translate ``config.json`` (transformers 4 and 5 spellings) to a :class:`ModelConfig`."""
    kind, layers = raw["model_type"], raw["num_hidden_layers"]
    heads = raw["num_attention_heads"]
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    window = raw.get("sliding_window") if kind == "mistral" or raw.get("use_sliding_window") else None
    types = raw.get("layer_types")
    if window is None:
        windowed: tuple[bool, ...] = (False,) * layers
    elif types:
        windowed = tuple(t == "sliding_attention" for t in types)
    else:
        first = raw.get("max_window_layers", 0) if kind.startswith("qwen") else 0
        windowed = tuple(i >= first for i in range(layers))
    no_rope = raw.get("no_rope_layers") if kind == "smollm3" else None
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=kind,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=_even(raw.get("head_dim") or raw["hidden_size"] // heads),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        sliding_window=window,
        windowed=windowed,
        rotary=tuple(bool(r) for r in no_rope) if no_rope else (),
        rope=rope,
    )


def _even(head_dim: int) -> int:
    if head_dim % 2:
        raise UserError(f"config.json: heads are {head_dim} wide, and rotary positions turn pairs of channels; the width must be even.")
    return head_dim


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files. Pickled weights are refused, never opened."""
    files = sorted(folder.glob("*.safetensors"))
    files = [f for f in files if not f.name.startswith("adapter_")]
    if not files:
        raise UserError(f"Model folder {folder} has no *.safetensors file; save it with save_pretrained(safe_serialization).")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():
                    tensors[name] = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or not a safetensors file ({error}); copy or download it again.") from None
    return tensors


def build(raw: dict[str, Any], tensors: dict[str, Tensor], where: str, dtype: torch.dtype) -> Transformer:
    """A frozen :class:`Transformer` with these weights; heads of other tasks (``score.*``) are left out."""
    try:
        config = parse_config(raw)
    except KeyError as error:
        raise UserError(f"{where}: config.json has no field {error}.") from None
    with torch.device("meta"):
        model = Transformer(config)
    wanted = dict(model.named_parameters())
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    elif "lm_head.weight" not in tensors and "score.weight" in tensors:  # a reward model has no language head
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UserError(f"{where} lacks {len(missing)} weights, first {missing[0]}; the file is incomplete or of another model.")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, config.json says {tuple(parameter.shape)}.")
    model.load_state_dict({name: tensors[name].to(dtype) for name in wanted}, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rotary_emb = type(model.rotary_emb)(config)
    model.compute_dtype = dtype
    return model.requires_grad_(False).eval()


def merged_state(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names, adapters merged, tied weights once."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.weight.detach()
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias.detach()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name and ".base." not in name:
            state[name] = tensor.detach()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tensor.contiguous().cpu() for name, tensor in state.items()}


def save_folder(folder: Path, raw: dict[str, Any], state: dict[str, Tensor], **changes: Any) -> None:
    """Write ``model.safetensors`` and ``config.json`` so that ``transformers`` opens them.

    Tensors keep their dtypes (a trained top in fp32 over a bf16 trunk loses nothing); config.json says
    fp32 then, to which bf16 widens without loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {t.dtype for t in state.values()}
    name = "float32" if len(dtypes) > 1 else str(next(iter(dtypes))).removeprefix("torch.")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**raw, "dtype": name, **changes}
    for stale in ("quantization_config", "_name_or_path", "torch_dtype"):
        config.pop(stale, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fingerprint(module: nn.Module | dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of all weights: two models with the same print are the same."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
