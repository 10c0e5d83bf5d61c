"""The settings of supervised fine-tuning and of learning from pairs: the only place where their defaults stand."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Loss = Literal["dpo", "ipo", "kto", "orpo", "simpo"]
HELD_OUT = 500
"""Rows that are held out at most, unless they are given."""
BETAS: dict[Loss, float] = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}


class LoopSettings(BaseModel):
    """What every kind of training by this loop can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    """Adam's."""

    epochs: float = Field(1.0, gt=0, allow_inf_nan=False, description="Passes over the data; 0.5 takes half of it")
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False, description="At its highest; off: one that goes with what trains")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="AdamW, or Muon for the layers' matrices and AdamW for the rest")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the learning rate falls to its last value")
    final_rate: float = Field(0.1, ge=0, le=1, description="Share of the learning rate that is left at the end")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which it rises first")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Of the weights, at each step, times the learning rate")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="Gradients are scaled down to this norm")
    max_nonfinite: int = Field(3, ge=1, description="Stop after this many steps in a row whose gradient is not finite (none is ever taken)")
    micro_batch_tokens: int = Field(4096, ge=1, description="Tokens computed at once; changes memory, not the gradient")
    validate_every: int = Field(50, ge=1, description="Steps between measurements on what is held out")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints; the newest two and the best are kept")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Dtype of the computation; trained weights are kept in float32"
    )
    seed: int = Field(0, ge=0, description="Order of the data, first weights")

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        raise NotImplementedError


class TuningSettings(LoopSettings):
    """What every kind of supervised training of a model that is there already can be told."""

    rates: ClassVar[dict[str, float]]
    """Learning rates by what trains."""

    adaptation: Literal["full", "split", "lora"] = Field(
        "full", description="What trains: all weights (full), the top layers (split), or adapters (lora)"
    )
    top_layers: int = Field(6, ge=1, description="Layers that train (adaptation split)")
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters")
    lora_alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="Adapters are scaled by alpha / rank")
    max_tokens: int | None = Field(
        None, ge=2, description="Leave out rows of more tokens than this; off: one that exceeds the model's context is an error"
    )

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return self.learning_rate if self.learning_rate is not None else self.rates[self.adaptation]


class SFTSettings(TuningSettings):
    """Everything ``accord sft`` can be told about training."""

    rates: ClassVar[dict[str, float]] = {"full": 2e-5, "split": 5e-5, "lora": 2e-4}

    examples_per_step: int = Field(16, ge=1, description="Examples an optimizer step")


class PreferenceSettings(TuningSettings):
    """Everything ``accord prefer`` can be told about training."""

    rates: ClassVar[dict[str, float]] = {"full": 2e-6, "split": 1e-5, "lora": 5e-5}

    loss: Loss = Field("dpo", description="What is made of a pair (docs/prefer.md)")
    beta: float | None = Field(
        None, gt=0, allow_inf_nan=False,
        description="dpo, ipo, kto: strength of the leash to the reference; simpo: scale of the reward; orpo: weight of the odds ratio; off: 0.1, of simpo 2",
    )  # fmt: skip
    gamma: float = Field(1.0, ge=0, allow_inf_nan=False, description="simpo: margin by which the preferred is to win")
    desirable_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="kto: weight of completions to prefer")
    undesirable_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="kto: weight of completions to avoid")
    fail_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Weight of pairs of a ranked completion against one marked F")
    prompts_per_step: int = Field(8, ge=1, description="Prompts an optimizer step, each with all its completions and pairs")

    @property
    def strength(self) -> float:
        """beta, or the loss's own default."""
        return self.beta if self.beta is not None else BETAS[self.loss]
