"""What a stage of a recipe leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """What a stage had to reach, what it reached, and what to try if that is not enough."""

    expects: str
    got: str
    passed: bool
    remedy: str


@dataclass
class Done:
    """What a stage leaves: a gate, facts for the report, tokens processed."""

    gate: Gate
    facts: dict[str, Any]
    tokens: int = 0
