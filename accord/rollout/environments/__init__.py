"""Environments: what answers a policy when an episode has several turns, or checks what it wrote.

An environment gives starting prompts and plays one :class:`Game` an episode. Tokens it writes are in the context
but not in ``response_mask``. ``docs/algorithms.md`` shows how to write one; ``module:Class`` names it.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple, Protocol

from accord.data.records import Prompt
from accord.errors import UserError, did_you_mean


class Answer(NamedTuple):
    """What an environment does with a turn."""

    reward: float
    """For the turn just written; lands on its last token."""
    text: str = ""
    """What it says next; not used if the episode is over."""
    over: bool = True


class Game(Protocol):
    """One episode."""

    def answer(self, text: str, finished: bool) -> Answer:
        """Take the policy's turn. ``finished`` is False if the length limit cut it."""
        ...


class Environment(Protocol):
    """Where episodes come from.

    Attributes:
        alphabet: the characters it and a good policy write, if it can be learned from nothing (``--model scratch``).
        turn_tokens: tokens a turn may have at most.
        max_turns: turns an episode may have at most.
    """

    name: str
    alphabet: str
    turn_tokens: int
    max_turns: int

    def prompts(self) -> list[Prompt]:
        """The situations an episode may start from."""
        ...

    def start(self, prompt: Prompt, seed: int) -> Game:
        """An episode; its own luck follows from ``seed``."""
        ...


SHIPPED = {
    "tictactoe": "accord.rollout.environments.tictactoe:Random",
    "tictactoe-perfect": "accord.rollout.environments.tictactoe:Perfect",
    "tictactoe-mixed": "accord.rollout.environments.tictactoe:Mixed",
    "arithmetic": "accord.rollout.environments.arithmetic:Addition",
}


def make_environment(name: str) -> Environment:
    """A shipped environment, or ``package.module:Class`` of one's own, looked up from the current folder too."""
    where = SHIPPED.get(name, name)
    module, _, attribute = where.partition(":")
    if not attribute:
        raise UserError(f"No environment '{name}': there is {', '.join(SHIPPED)}; or give module:Class.{did_you_mean(name, SHIPPED)}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        environment: Environment = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise UserError(f"Environment '{name}' could not be made: {type(error).__name__}: {error}") from None
    return checked(environment)


def checked(environment: Environment) -> Environment:
    """The environment itself, if it has what one must have."""
    name = getattr(environment, "name", type(environment).__name__)
    lacks = [n for n in ("name", "alphabet", "turn_tokens", "max_turns", "prompts", "start") if not hasattr(environment, n)]
    if lacks:
        raise UserError(f"Environment '{name}' lacks {', '.join(lacks)}; see accord.rollout.environments.Environment.")
    if not isinstance(environment.alphabet, str):
        raise UserError(f"Environment '{name}': alphabet is {environment.alphabet!r}; it must be a text with the characters that are used.")
    for limit in ("turn_tokens", "max_turns"):
        if not isinstance(value := getattr(environment, limit), int) or value < 1:
            raise UserError(f"Environment '{name}': {limit} is {value!r}; it must be a whole number above 0.")
    prompts = environment.prompts()
    if not prompts or not all(isinstance(p, Prompt) for p in prompts):
        raise UserError(f"Environment '{name}': prompts() must return a list of accord.Prompt with at least one.")
    return environment
