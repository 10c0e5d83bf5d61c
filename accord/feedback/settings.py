"""Settings of the labeling queue."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class QueueSettings(BaseModel):
    """How items are given out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overlap: int = Field(1, ge=1, description="Labelers who rank each prompt")
    lease: float = Field(1800.0, gt=0, description="Seconds that an opened item is kept for its labeler")
    gold_share: float = Field(0.05, ge=0, le=0.5, description="Share of items with a known answer that are mixed in")
    repeat_share: float = Field(0.05, ge=0, le=0.5, description="Share of items that a labeler sees a second time")
    repeat_after: int = Field(10, ge=1, description="Items between an item and its repetition, at least")
    seed: int = Field(0, ge=0, description="Order of items of one priority, and which known ones and repetitions are mixed in")
