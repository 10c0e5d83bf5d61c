"""Questions with an answer that can be checked: sums of two digits."""

from __future__ import annotations

import re

from accord.data.records import Prompt
from accord.rollout.environments import Answer


class Sum:
    """One question."""

    def __init__(self, right: int) -> None:
        self._right = right

    def answer(self, text: str, finished: bool) -> Answer:
        """1 if the text is the sum and nothing else, else 0."""
        return Answer(float(text.strip() == str(self._right)))


class Addition:
    """``3+4=``: 55 sums of one digit each whose result has one too."""

    name = "arithmetic"
    alphabet = "0123456789+="
    turn_tokens = 2
    max_turns = 1

    def prompts(self) -> list[Prompt]:
        return [Prompt(f"{a}+{b}", f"{a}+{b}=") for a in range(10) for b in range(10 - a)]

    def start(self, prompt: Prompt, seed: int) -> Sum:
        a, b = re.findall(r"\d", prompt.text)
        return Sum(int(a) + int(b))
