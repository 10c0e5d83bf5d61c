"""In whose tokens rows are put: a policy's, or those of one whose weights are not read yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from accord.nn.loading import default_device
from accord.nn.transformer import ModelConfig
from accord.rollout.engine import Reader as PromptReader
from accord.text.tokenizer import Tokenizer


class Reader(PromptReader, Protocol):
    """A policy, as far as rows ask for it: its tokenizer, the most tokens it was made for, and where its tensors are."""

    @property
    def device(self) -> torch.device: ...


@dataclass
class Unread:
    """What is known of a policy before its weights are read."""

    tokenizer: Tokenizer
    context: int
    device: torch.device

    @classmethod
    def of(cls, config: ModelConfig, tokenizer: Tokenizer) -> Unread:
        """Of a model that will be read onto this machine's device."""
        return cls(tokenizer, config.max_position_embeddings, default_device())
