"""One file an algorithm: how advantages are formed, its loss, its update. :mod:`accord.rl.registry` lists them."""

from __future__ import annotations

from importlib import import_module

from accord.errors import UserError
from accord.nn.foreign import ForeignModel
from accord.reward.model import ScalarModel
from accord.rl.algorithms.base import Algorithm
from accord.rl.registry import ALGORITHMS
from accord.rl.settings import RLSettings
from accord.rollout.policy import Policy

__all__ = ["Algorithm", "make_algorithm"]


def check_model(settings: RLSettings, policy: Policy) -> None:
    """Refuse an algorithm that needs more of a model than ``transformers`` gives."""
    if ALGORITHMS[settings.algorithm].native and isinstance(policy.model, ForeignModel):
        raise UserError(f"algorithm {settings.algorithm} needs a model that accord computes itself; use another for this one, such as ppo.")


def make_algorithm(settings: RLSettings, policy: Policy, critic: ScalarModel | None) -> Algorithm:
    """The algorithm that the settings name."""
    module, _, name = ALGORITHMS[settings.algorithm].where.partition(":")
    algorithm: Algorithm = getattr(import_module(module), name)(settings, policy, critic)
    return algorithm
