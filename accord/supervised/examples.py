"""Examples in a model's tokens, and which of them count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from accord.data.records import Example, Prompt
from accord.errors import UserError
from accord.progress import console
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout, Row, from_rows
from accord.text.chats import encode_chat
from accord.text.tokenizer import Tokenizer


def encode_example(tokenizer: Tokenizer, example: Example) -> Row:
    """Its tokens; ``chosen`` are those that count: what the assistant says, each time with the token that ends it.

    With a chat template a plain text is what the user says. Without one it is followed by its answer and an end token.

    Raises:
        UserError: it is a chat, and there is no template; or the template does not serve (:func:`accord.text.chats.encode_chat`).
    """
    row = Row(Prompt(example.id, example.content), 0)
    try:
        if tokenizer.has_chat_template:
            for part in encode_chat(tokenizer, example.messages):
                row.extend(part.tokens, part.chosen)
        else:
            row.extend(tokenizer.encode_prompt(example.content), False)
            row.extend(tokenizer.encode_completion(example.answer, True), True)
    except UserError as error:
        raise UserError(f"Example '{example.id}': {error}") from None
    return row


class Encoded:
    """Examples in a policy's tokens.

    Attributes:
        rows: those that are not left out for their length.
        digest: of everything they are; a run that is resumed must find the same.

    Raises:
        UserError: one does not fit the model, or none is left.
    """

    def __init__(self, policy: Policy, examples: Sequence[Example], max_tokens: int | None, what: str = "examples") -> None:
        rows = [encode_example(policy.tokenizer, example) for example in examples]
        if max_tokens is not None:
            fitting = [row for row in rows if row.end <= max_tokens]
            if len(fitting) < len(rows):
                console.print(f"{len(rows) - len(fitting)} of {len(rows)} {what} are longer than {max_tokens} tokens and are left out.")
            rows = fitting
        longest = max(rows, key=lambda row: row.end, default=None)
        if longest is None:
            raise UserError(f"There are no {what} to learn from.")
        if longest.end > policy.context:
            over = sum(row.end > policy.context for row in rows)
            raise UserError(
                f"{over} of {len(rows)} {what} exceed the model's context of {policy.context} tokens, such as '{longest.prompt.id}' with "
                f"{longest.end}; shorten them, or leave them out with --max-tokens {policy.context}."
            )
        self.rows, self._policy = rows, policy
        self.digest = hashlib.sha256(repr([(row.tokens, row.chosen) for row in rows]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counted(self) -> int:
        """Tokens that count, in all."""
        return sum(sum(row.chosen) for row in self.rows)

    def rollout(self, numbers: Iterable[int]) -> Rollout:
        """These examples as rows of tensors; ``response_mask`` says which tokens count."""
        rows = [self.rows[i] for i in numbers]
        pad, device = self._policy.tokenizer.pad_id, self._policy.device
        return replace(from_rows(rows, [True] * len(rows), [""] * len(rows), pad, device, sampled=False), step_rewards=None)
