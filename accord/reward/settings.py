"""The settings of reward-model training: the only place where their defaults stand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RewardSettings(BaseModel):
    """Everything ``accord reward`` can be told about training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_layers: int = Field(6, ge=1, description="Layers that train, counted from the top; the rest is the shared trunk")
    epochs: int = Field(1, ge=0, description="Passes over the training pairs; 0: the probe alone")
    probe: bool = Field(True, description="Begin with the probe of the last layer that predicts the preferences best, not by chance")
    prompts_per_step: int = Field(8, ge=1, description="Prompts an optimizer step, each with all its completions and pairs")
    learning_rate: float = Field(3e-5, gt=0, description="AdamW; warmed up over a tenth of the steps, then falling to a tenth")
    weight_decay: float = Field(0.01, ge=0, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm")
    micro_batch_tokens: int = Field(8192, ge=1, description="Padded tokens computed at once; changes memory, not results")
    ties: Literal["drop", "davidson", "rao-kupper"] = Field(
        "drop", description="What equal ranks teach: nothing (Bradley-Terry), or by a model that knows ties"
    )
    margin: float = Field(0.0, ge=0, description="Score difference asked for each rank of distance beyond the first")
    length_control: bool = Field(
        False, description="Leave to length what length explains: its part is fitted first and left out of the score"
    )
    fail_weight: float = Field(1.0, ge=0, description="Weight of pairs of a ranked completion against one marked F")
    seed: int = Field(0, ge=0, description="Order of the prompts and first weights of the head")
