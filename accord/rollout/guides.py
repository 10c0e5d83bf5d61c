"""What makes another distribution of a policy's, while it samples and when its tokens are scored again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from accord.nn.loading import Model
from accord.nn.logprobs import Contrast, EpsilonGreedy, LogitsProcessor, Nucleus


class Guide(Protocol):
    """Attributes:
    model, split: another model that it asks, if any, and where that model's trunk is shared with the policy's.
    """

    @property
    def model(self) -> Model | None: ...
    @property
    def split(self) -> int: ...

    def processor(self, hidden: Tensor, matrix: Tensor) -> LogitsProcessor:
        """For N positions. hidden (N,D), matrix (V,D): the model's final hidden states there and its output matrix."""
        ...


@dataclass(frozen=True)
class Within:
    """Only the tokens that another model finds likely: its smallest set of mass ``top_p``."""

    model: Model
    split: int
    top_p: float

    def processor(self, hidden: Tensor, matrix: Tensor) -> LogitsProcessor:
        return Nucleus(hidden, matrix, self.top_p)


@dataclass(frozen=True)
class Explore:
    """The likeliest token with probability 1 - epsilon, else any."""

    epsilon: float
    model: None = None
    split: int = 0

    def processor(self, hidden: Tensor, matrix: Tensor) -> LogitsProcessor:
        return EpsilonGreedy(self.epsilon)


@dataclass(frozen=True)
class Perturb:
    """A reference, perturbed by ``strength`` times what the policy has learned: z_ref + strength * (z - z_ref)."""

    model: Model
    split: int
    strength: float

    def processor(self, hidden: Tensor, matrix: Tensor) -> LogitsProcessor:
        return Contrast(hidden, matrix, self.strength)
