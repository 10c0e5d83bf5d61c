"""The settings of pretraining: the only place where their defaults stand."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from accord.errors import UserError
from accord.pretraining.sizes import SIZES, size_of
from accord.supervised.settings import LoopSettings


class PretrainSettings(LoopSettings):
    """Everything ``accord pretrain`` can be told about training."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)

    size: str = Field("5m", description=f"Of the model: {', '.join(SIZES)} (--sizes shows what each needs)")
    positions: Literal["rotary", "learned", "sinusoidal"] = Field(
        "rotary", description="How a token knows its place; a model with other than rotary ones opens in accord only"
    )
    attention: Literal["multi-head", "grouped"] = Field("multi-head", description="Whether query heads share key and value heads")
    context: int = Field(256, ge=2, description="Tokens that the model can look back on")
    tokens: int | None = Field(None, ge=1, description="Train on so many tokens in all, instead of epochs")
    tokens_per_step: int = Field(8192, ge=1, description="Tokens an optimizer step; documents are not filled up to it")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False, description="Of the weights, at each step, times the learning rate")
    micro_batch_tokens: int = Field(8192, ge=1, description="Tokens computed at once; changes memory, not the gradient")
    validate_every: int = Field(100, ge=1, description="Steps between measurements on what is held out, each with samples")
    samples: int = Field(4, ge=0, description="Texts written each time, from nothing")
    sample_tokens: int = Field(100, ge=1, description="Their length limit")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints; the newest two and the best are kept")

    @model_validator(mode="after")
    def _check(self) -> PretrainSettings:
        try:
            size_of(self.size)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.tokens_per_step < self.context:
            raise ValueError(f"tokens_per_step is {self.tokens_per_step}; it must be the context ({self.context}) or more")
        return self

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return self.learning_rate if self.learning_rate is not None else size_of(self.size).rate
