"""Prompts to token ids (through the model's chat template) and completions back to text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accord.disk import read_object
from accord.errors import UserError, first_line

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """A Hugging Face tokenizer, narrowed to what accord needs.

    Attributes:
        eos_ids: ids that end a completion. They are part of it: the policy chose them.
        pad_id: fills tensors; never used to decide what is padding.
    """

    def __init__(self, inner: Any, generation_eos: Sequence[int] = ()) -> None:
        self.inner = inner
        if inner.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token, so no completion could ever finish.")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([inner.eos_token_id, *generation_eos]))
        words = type(inner.backend_tokenizer.model).__name__ == "WordLevel" if hasattr(inner, "backend_tokenizer") else False
        known = inner.get_vocab().keys() - inner.get_added_vocab().keys() if words else set()
        # Of a tokenizer with a token a character: what it can read. One with words has a token for the unknown.
        self._alphabet = known if known and all(len(word) == 1 for word in known) else None
        self.pad_id: int = inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        try:
            inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            if not isinstance(inner, PreTrainedTokenizerBase):  # tokenizer_class may name anything that transformers has
                raise TypeError(f"tokenizer_config.json names the class {type(inner).__name__}, which is no tokenizer")
        except Exception as error:  # tokenizer classes raise anything from KeyError to a bare Exception
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"No usable tokenizer in {folder} ({reason}); tokenizer.json belongs beside the weights.") from None
        eos: list[int] = []
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                given = read_object(folder / name).get("eos_token_id")
                ends = given if isinstance(given, list) else [] if given is None else [given]
                if not all(type(end) is int and end >= 0 for end in ends):
                    raise UserError(f"{folder / name}: eos_token_id is {str(given)[:60]!r}; it must be a token's id, or a list of ids.")
                eos += ends
        return cls(inner, eos)

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and ``generation_config.json`` with everything that ends a completion."""
        self.inner.save_pretrained(str(folder))
        ends = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.inner.chat_template)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of a prompt, up to where the completion starts.

        Messages, and a plain text when the model has a chat template, go through the template (a text is
        one user message). Without a template a text is encoded as it stands, and messages are an error.
        """
        if not self.has_chat_template:
            if not isinstance(prompt, str):
                raise UserError("The prompt is a chat, but this model's tokenizer has no chat template; give plain text.")
            return self._ids(prompt, True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        self.check_alphabet(message["content"] for message in messages)
        return self.encode_plain(self.render(messages, True))

    def render(self, messages: Sequence[Message], generation: bool) -> str:
        """A chat as its template writes it. ``generation``: with the opening of an answer.

        Raises:
            UserError: the template refuses it.
        """
        try:
            return str(self.inner.apply_chat_template(list(messages), add_generation_prompt=generation, tokenize=False))
        except Exception as error:  # the template is a program of the model's author
            raise UserError(f"The model's chat template refuses the prompt: {first_line(error)}") from None

    def spans(self, text: str) -> list[tuple[int, tuple[int, int]]] | None:
        """:meth:`encode_plain` with where in the text each token stands; None if the tokenizer cannot tell."""
        if not self.inner.is_fast:
            return None
        try:
            told = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        except Exception as error:
            raise UserError(f"The tokenizer cannot read {text[:60]!r} ({first_line(error)}); copy its files again.") from None
        return list(zip(told["input_ids"], told["offset_mapping"], strict=True))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which special tokens stand already."""
        return self._encode(text, False)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(len(self.inner), 1 + max(self.inner.get_vocab().values()))

    @property
    def digest(self) -> str:
        """Of everything that decides which tokens a text has, and which end it."""
        told = self.inner.backend_tokenizer.to_str() if self.inner.is_fast else self.fingerprint
        return hashlib.sha256(repr((told, self.eos_ids, self.inner.chat_template)).encode()).hexdigest()[:16]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts, several at once; none is a special token, whatever they spell.

        Raises:
            UserError: a tokenizer of characters has no token for one of theirs.
        """
        self.check_alphabet(texts)
        try:
            return [
                list(ids)
                for ids in self.inner(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            ]
        except Exception as error:
            raise UserError(f"The tokenizer cannot read a text ({first_line(error)}); copy its files again.") from None

    def encode_completion(self, text: str, finished: bool) -> list[int]:
        """Ids of a completion, with the end-of-sequence token if it finished by itself."""
        ids = self._ids(text, False)
        return ids + [self.eos_ids[0]] if finished else ids

    def _ids(self, text: str, special: bool) -> list[int]:
        self.check_alphabet([text])
        return self._encode(text, special)

    def check_alphabet(self, texts: Iterable[str]) -> None:
        """Raises:
        UserError: a tokenizer of characters has no token for one of them.
        """
        for text in texts if self._alphabet is not None else ():
            if unknown := set(text) - self._alphabet:  # type: ignore[operator]
                raise UserError(f"{text[:60]!r} has {', '.join(map(repr, sorted(unknown)))}, for which this model has no token.")

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return list(self.inner(text, add_special_tokens=special)["input_ids"])
        except Exception as error:  # of a tokenizer whose settings are damaged: anything
            raise UserError(f"The tokenizer cannot read {text[:60]!r} ({first_line(error)}); copy its files again.") from None

    def encode_turn(self, text: str, ended: bool) -> list[int]:
        """Ids of what another says after the policy's turn, up to where the policy writes again.

        With a chat template it is a user message. ``ended``: the policy wrote an end token itself.
        """
        if not self.has_chat_template:
            return self._ids(text, False)
        marker = "\u2402turn\u2403"
        messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": marker}, {"role": "user", "content": text}]
        rest = str(self.inner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)).partition(marker)[2]
        ids = list(self.inner(rest, add_special_tokens=False)["input_ids"])
        return ids[1:] if ended and ids and ids[0] in self.eos_ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that give the same ids for the same text."""
        vocabulary = sorted(self.inner.get_vocab().items())
        return hashlib.sha256(repr((vocabulary, self.inner.chat_template)).encode()).hexdigest()
