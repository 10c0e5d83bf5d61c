"""accord: bring a language model into accord with what people want.

The calls below are imported when first used, so that ``import accord`` and ``accord --help`` are quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "api",
    "sample": "api",
    "by_prompt": "api",
    "label": "api",
    "train_reward": "api",
    "train_sft": "tuning",
    "train_preference": "tuning",
    "pretrain": "tuning",
    "train_rl": "api",
    "evaluate": "api",
    "compare": "inside.comparison",
    "trace": "inside.trace",
    "read_prompts": "data.sources",
    "read_examples": "data.sources",
    "read_pairs": "data.sources",
    "read_completions": "data.sources",
    "read_rankings": "data.sources",
    "agreement": "feedback.agreement",
    "labeler_weights": "feedback.agreement",
    "simulated_panel": "feedback.panel",
    "Policy": "rollout.policy",
    "RewardModel": "reward.model",
    "Prompt": "data.records",
    "Completion": "data.records",
    "Example": "data.records",
    "Ranking": "data.records",
    "UserError": "errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'accord' has no attribute '{name}'")
    return getattr(import_module(f"accord.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
