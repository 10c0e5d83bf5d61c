"""Architectures that :mod:`accord.nn.transformer` does not compute, run through ``transformers``: slower, never refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accord.errors import UserError, first_line


class ForeignModel(nn.Module):
    """A ``transformers`` causal language model behind the small interface the rest of accord uses.

    It has no split (``depth`` 0): trunk sharing and LoRA need the layers of our own transformer.
    """

    depth = 0

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.compute_dtype = next(inner.parameters()).dtype
        base = self.inner.base_model
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._check_head()

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Final hidden states (B,T,D), with a constant 1 appended where the head has a bias."""
        extra = {"position_ids": positions} if self._takes_positions else {}
        out = self.inner.base_model(input_ids=tokens, attention_mask=mask.long(), use_cache=False, **extra)
        return self._with_one(out.last_hidden_state)

    def advance(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """One decoding step on left-padded rows: last hidden state (B,D) and the grown cache."""
        extra = {"position_ids": positions} if self._takes_positions else {}
        out = self.inner.base_model(input_ids=tokens, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **extra)
        return self._with_one(out.last_hidden_state)[:, -1], out.past_key_values

    @property
    def output_matrix(self) -> Tensor:
        head = self.inner.get_output_embeddings()
        if getattr(head, "bias", None) is None:
            return head.weight
        return torch.cat((head.weight, head.bias[:, None]), dim=-1)

    def _with_one(self, hidden: Tensor) -> Tensor:
        head = self.inner.get_output_embeddings()
        if getattr(head, "bias", None) is None:
            return hidden
        return torch.cat((hidden, torch.ones_like(hidden[..., :1])), dim=-1)

    @torch.no_grad()
    def _check_head(self) -> None:
        tokens = torch.arange(4, device=self.device)[None]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mine = (self.hidden(tokens, tokens, mask) @ self.output_matrix.t()).float()
        theirs = self.inner(input_ids=tokens).logits.float()
        if not torch.allclose(mine, theirs, atol=1e-2, rtol=1e-2):
            kind = getattr(self.inner.config, "model_type", "unknown")
            raise UserError(
                f"Models of type '{kind}' change their logits after the output matrix (scaling or soft-capping); "
                "accord cannot score them yet. Use a model of another type."
            )


def load_foreign(folder: Path, dtype: torch.dtype) -> ForeignModel:
    """Open a model folder through ``transformers``; safetensors only, no remote code."""
    from transformers import AutoModelForCausalLM

    try:
        inner = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # configurations raise anything from KeyError to huggingface_hub's own
        raise UserError(f"transformers cannot open {folder} as a causal language model: {first_line(error)}") from None
    return ForeignModel(inner.requires_grad_(False).eval())
