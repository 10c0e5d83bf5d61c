"""From a name (bundled, folder, Hugging Face id) to a frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accord.errors import UserError, did_you_mean, first_line
from accord.nn import bundled
from accord.nn.foreign import ForeignModel, load_foreign
from accord.nn.memory import keep_freed_memory
from accord.nn.transformer import Transformer
from accord.nn.weights import build, is_native, read_config, read_tensors

Model = Transformer | ForeignModel
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | None = None) -> torch.dtype:
    """bf16 where the processor multiplies it natively (GPUs; CPUs with AMX or AVX512-BF16), else fp32."""
    device = device or default_device()
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def resolve_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """``auto``, ``float32`` or ``bfloat16``."""
    if name == "auto":
        return default_dtype(device)
    if name not in DTYPES:
        raise UserError(f"Unknown dtype '{name}': use auto, float32 or bfloat16.{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class LoadedModel:
    model: Model
    raw: dict[str, Any]
    """``config.json`` as read; what is saved later starts from it."""
    folder: Path


def model_folder(name: str) -> Path:
    """The local folder behind a model's name; downloads a Hugging Face id (``org/name``)."""
    if name == bundled.NAME:
        return bundled.bundled_folder()
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        if not path.exists() and "/" not in name:
            hint = did_you_mean(name, [bundled.NAME])
            raise UserError(f"No model '{name}': not the bundled one ({bundled.NAME}), no such folder.{hint}")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"'{name}' is no local folder, and the Hugging Face hub did not give it ({first_line(error)}). Check the name and the connection, or give a local folder."
        ) from None


def load_model(name: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LoadedModel:
    """Open a model, frozen, in ``dtype`` (default: what the device multiplies fastest).

    Raises:
        UserError: the folder is missing, unreadable or incomplete; the message names the file.
    """
    device = device or default_device()
    if device.type == "cpu":
        keep_freed_memory()
    dtype = dtype or default_dtype(device)
    folder = model_folder(name)
    raw = read_config(folder)
    if is_native(raw):
        model: Model = build(raw, read_tensors(folder), str(folder), dtype)
    else:
        model = load_foreign(folder, torch.float32)  # trained in full, and its reference must be its equal
    return LoadedModel(model.to(device), raw, folder)
