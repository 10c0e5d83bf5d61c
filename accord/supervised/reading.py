"""In whose tokens rows are put: a policy's, or those of one whose weights are not read yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from accord.text.tokenizer import Tokenizer


class Reader(Protocol):
    """A policy, as far as rows ask for it: its tokenizer, the most tokens it was made for, and where its tensors are."""

    tokenizer: Tokenizer

    @property
    def context(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


@dataclass
class Unread:
    """What is known of a policy before its weights are read."""

    tokenizer: Tokenizer
    context: int
    device: torch.device
