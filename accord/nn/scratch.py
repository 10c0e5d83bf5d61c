"""A small randomly initialised model with a token a character, for what can be learned from nothing."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accord.nn.bundled import cache_folder

NAME = "scratch"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
}
END = "<|end|>"


def scratch_folder(alphabet: str, context: int = 128, seed: int = 0) -> Path:
    """A Hugging Face folder with such a model for these characters, made once and kept in the cache."""
    key = hashlib.sha256(repr((sorted(set(alphabet)), context, seed, SHAPE)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{NAME}-{key}"
    if not (folder / "complete").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        _write(aside, sorted(set(alphabet)), context, seed)
        (aside / "complete").touch()
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    return folder


def _write(folder: Path, characters: list[str], context: int, seed: int) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {c: i for i, c in enumerate([END, *characters])}
    raw = Tokenizer(models.WordLevel(words, unk_token=END))  # Tokenizer refuses a text with such a character
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([END])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END, unk_token=END).save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=len(words), max_position_embeddings=context, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, **SHAPE,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(str(folder))
