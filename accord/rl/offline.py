"""Learning from what was written before: logged completions with scores, a rollout at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accord.data.records import Logged
from accord.errors import UserError
from accord.reward.sources import EnvironmentSource, Reward
from accord.rl.settings import RLSettings
from accord.rollout.engine import encode_checked
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout, Row, from_rows

SCORE = "logged"
"""What the logged score is called among the parts of the reward."""


class Log:
    """Logged completions in the policy's tokens; every one once in a seeded order, then all again in another.

    Raises:
        UserError: fewer than a step takes, or one that does not fit the model.
    """

    def __init__(self, logged: Sequence[Logged], policy: Policy, settings: RLSettings) -> None:
        self._size = settings.prompts_per_step * settings.completions_per_prompt
        if len(logged) < self._size:
            raise UserError(
                f"{len(logged)} logged completions are fewer than a step takes ({self._size}); add some or lower prompts_per_step."
            )
        self._policy, self._seed = policy, settings.seed
        self._rows = [_encode(one, policy) for one in logged]
        self._finished, self._texts = [one.completion.finished for one in logged], [one.completion.text for one in logged]

    def rollout(self, step: int) -> Rollout:
        """The completions of a step, their scores as ``step_rewards``."""
        picked = []
        for place in range(step * self._size, (step + 1) * self._size):
            epoch, index = divmod(place, len(self._rows))
            picked.append(int(np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))[index]))
        return from_rows(
            [self._rows[i] for i in picked], [self._finished[i] for i in picked], [self._texts[i] for i in picked],
            self._policy.tokenizer.pad_id, self._policy.device, sampled=False,
        )  # fmt: skip

    @staticmethod
    def reward() -> Reward:
        """The logged scores."""
        return Reward([(1.0, EnvironmentSource(SCORE))])


def _encode(one: Logged, policy: Policy) -> Row:
    completion, size = one.completion, len(policy.tokenizer.inner)
    row = Row(completion.prompt, completion.index)
    if one.turns:
        wrong = next((i for turn in one.turns for i in (*turn.tokens, *turn.reply) if not 0 <= i < size), None)
        if wrong is not None:
            raise UserError(
                f"A logged episode of '{completion.prompt.id}' has the token {wrong}, which this model has not: another model played it."
            )
        row.extend(encode_checked(policy, completion.prompt, sum(len(t.tokens) + len(t.reply) for t in one.turns)), chosen=False)
        for turn in one.turns:
            row.extend(turn.tokens, chosen=True)
            row.rewards[-1] = turn.reward
            row.extend(turn.reply, chosen=False)
        row.rewards[_last(row)] += one.score - sum(turn.reward for turn in one.turns)  # what other rewards gave
    else:
        answer = policy.tokenizer.encode_completion(completion.text, completion.finished)
        row.extend(encode_checked(policy, completion.prompt, len(answer)), chosen=False)
        row.extend(answer, chosen=True)
        row.rewards[-1] = one.score
    return row


def _last(row: Row) -> int:
    """Where the last token stands that the policy chose."""
    return len(row.chosen) - 1 - row.chosen[::-1].index(True)
