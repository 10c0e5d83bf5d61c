"""The settings of supervised fine-tuning: the only place where their defaults stand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RATES = {"full": 2e-5, "split": 5e-5, "lora": 2e-4}
"""Learning rates by what trains."""


class SFTSettings(BaseModel):
    """Everything ``accord sft`` can be told about training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(1.0, gt=0, allow_inf_nan=False, description="Passes over the examples; 0.5 takes half of them")
    examples_per_step: int = Field(16, ge=1, description="Examples an optimizer step")
    adaptation: Literal["full", "split", "lora"] = Field(
        "full", description="What trains: all weights (full), the top layers (split), or adapters (lora)"
    )
    top_layers: int = Field(6, ge=1, description="Layers that train (adaptation split)")
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters")
    lora_alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="Adapters are scaled by alpha / rank")
    learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="AdamW, at its highest; off: 2e-5 for all weights, 5e-5 for the top layers, 2e-4 for adapters",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the learning rate falls to a tenth")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which it rises first")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="Gradients are scaled down to this norm")
    max_nonfinite: int = Field(3, ge=1, description="Stop after this many steps in a row whose gradient is not finite (none is ever taken)")
    max_tokens: int | None = Field(
        None, ge=2, description="Leave out examples of more tokens than this; off: one that exceeds the model's context is an error"
    )
    micro_batch_tokens: int = Field(4096, ge=1, description="Tokens computed at once; changes memory, not the gradient")
    validate_every: int = Field(50, ge=1, description="Steps between measurements on the held-out examples")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints; the newest two and the best are kept")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Dtype of the computation; trained weights are kept in float32"
    )
    seed: int = Field(0, ge=0, description="Order of the examples, first weights of adapters")

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return self.learning_rate if self.learning_rate is not None else RATES[self.adaptation]
