"""Examples in a model's tokens, and which of them count."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from accord.data.records import Example, Prompt
from accord.errors import UserError
from accord.progress import track
from accord.rollout.rollout import Rollout, Row, from_rows
from accord.supervised.lengths import fitting
from accord.supervised.reading import Reader
from accord.text.chats import Part, encode_chat
from accord.text.tokenizer import Tokenizer


class Encoding(NamedTuple):
    """An example's tokens; ``counted`` is 1 for those that count."""

    id: str
    tokens: array[int]
    counted: bytes


def encode_example(tokenizer: Tokenizer, example: Example) -> Encoding:
    """Its tokens; those count that the assistant says, each time with the token that ends it.

    With a chat template a plain text is what the user says. Without one it is followed by its answer and an end token. A first token
    never counts: nothing stands before it that could tell it.

    Raises:
        UserError: it is a chat, and there is no template; the template does not serve (:func:`accord.text.chats.encode_chat`); or no
            token counts.
    """
    try:
        if tokenizer.has_chat_template:
            parts = encode_chat(tokenizer, example.messages)
        else:
            prompt, answer = tokenizer.encode_prompt(example.content), tokenizer.encode_completion(example.answer, True)
            parts = [Part(prompt, False), Part(answer, True)]
    except UserError as error:
        raise UserError(f"Example '{example.id}': {error}") from None
    tokens = array("q", (i for part in parts for i in part.tokens))
    counted = bytes(part.chosen for part in parts for _ in part.tokens)
    counted = b"\0" + counted[1:]
    if not any(counted):
        raise UserError(f"Example '{example.id}' has no token to learn; delete it.")
    return Encoding(example.id, tokens, counted)


class Encoded:
    """Examples in a policy's tokens.

    Attributes:
        rows: those that are not left out for their length.
        digest: of everything they are; a run that is resumed must find the same.

    Raises:
        UserError: one does not fit the model, or none is left.
    """

    def __init__(self, reader: Reader, examples: Sequence[Example], max_tokens: int | None, what: str = "examples") -> None:
        rows = [encode_example(reader.tokenizer, example) for example in track(examples, f"Encoding {what}", len(examples))]
        rows = fitting(rows, lambda row: len(row.tokens), lambda row: row.id, max_tokens, reader.context, what)
        self._set(rows, reader)

    def _set(self, rows: list[Encoding], reader: Reader) -> None:
        self.rows, self._reader = rows, reader
        found = hashlib.sha256()
        for row in rows:
            found.update(len(row.tokens).to_bytes(8, "little") + row.tokens.tobytes() + row.counted)
        self.digest = found.hexdigest()[:16]

    def only(self, rows: list[Encoding]) -> Encoded:
        """The same policy's, of these rows."""
        some = Encoded.__new__(Encoded)
        some._set(rows, self._reader)
        return some

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counted(self) -> int:
        """Tokens that count, in all."""
        return sum(sum(row.counted) for row in self.rows)

    def rollout(self, numbers: Iterable[int]) -> Rollout:
        """These examples as rows of tensors; ``response_mask`` says which tokens count."""
        rows = []
        for given in (self.rows[i] for i in numbers):
            row = Row(Prompt(given.id, ""), 0)
            row.extend(list(given.tokens), False)
            row.chosen = [bool(counts) for counts in given.counted]
            rows.append(row)
        pad, device = self._reader.tokenizer.pad_id, self._reader.device
        return replace(from_rows(rows, [True] * len(rows), [""] * len(rows), pad, device, sampled=False), step_rewards=None)
