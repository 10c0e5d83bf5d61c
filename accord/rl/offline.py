"""Learning from what was written before: logged completions with scores, a rollout at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from accord.data.batching import in_turn
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

    Attributes:
        digest: of everything in the log; a run that is resumed must find the same.

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
        self.digest = hashlib.sha256(repr(list(logged)).encode()).hexdigest()
        self._rows = [_encode(one, policy) for one in logged]
        self._finished, self._texts = [one.completion.finished for one in logged], [one.completion.text for one in logged]

    def rollout(self, step: int) -> Rollout:
        """The completions of a step, their scores as ``step_rewards``."""
        picked = in_turn(len(self._rows), step, self._size, self._seed)
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
        known = all(0 <= i < size for turn in one.turns for i in (*turn.tokens, *turn.reply))
        if not known or not _in_order([policy.tokenizer.decode(turn.tokens) for turn in one.turns], completion.text):
            raise UserError(
                f"A logged episode of '{completion.prompt.id}' is in another model's tokens ({completion.text[:60]!r}); learn from it "
                "with a model of the same tokenizer."
            )
        row.extend(_prompt(one, policy, sum(len(t.tokens) + len(t.reply) for t in one.turns)), chosen=False)
        for turn in one.turns:
            row.extend(turn.tokens, chosen=True)
            row.rewards[-1] = turn.reward
            row.extend(turn.reply, chosen=False)
        row.rewards[row.end - 1] += one.score - sum(turn.reward for turn in one.turns)  # what other rewards gave
    else:
        answer = policy.tokenizer.encode_completion(completion.text, completion.finished)
        if not answer:
            raise UserError(
                f"A logged completion of '{completion.prompt.id}' is empty and did not finish; there is no token to learn from."
            )
        row.extend(_prompt(one, policy, len(answer)), chosen=False)
        row.extend(answer, chosen=True)
        row.rewards[-1] = one.score
    return row


def _prompt(one: Logged, policy: Policy, answer: int) -> list[int]:
    ids = encode_checked(policy, one.completion.prompt, 0)
    if len(ids) + answer > policy.context:
        raise UserError(
            f"A logged completion of '{one.completion.prompt.id}' has {answer} tokens after a prompt of {len(ids)}; the model's "
            f"context is {policy.context}. Leave it out of the log."
        )
    return ids


def _in_order(pieces: Sequence[str], text: str) -> bool:
    """Whether the pieces stand in the text, one after the other."""
    place = 0
    for piece in pieces:
        found = text.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return True
