"""Which tokens of a chat are the assistant's own, for any chat template.

A template is a program that writes a text around what was said; it does not say who wrote which part. So it is run with a mark in
the place of each thing the assistant said: what stands between the marks is the template's, and each answer begins where the
template's opening of a new answer ends (``add_generation_prompt``) and ends with the first end-of-sequence token after it, which
the model must write itself to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from accord.errors import UserError
from accord.text.tokenizer import Message, Tokenizer


class Part(NamedTuple):
    """A stretch of tokens; ``chosen``: the assistant's own, what a model is to learn to write."""

    tokens: list[int]
    chosen: bool


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Part]:
    """The tokens of a chat, in stretches that are the assistant's or not; the last one is the assistant's.

    Each stretch is encoded by itself, as it is when a prompt is given and an answer sampled.

    Raises:
        UserError: the chat does not end with the assistant, or the template refuses it, changes what the assistant says, or does
            not end an answer with an end-of-sequence token.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the chat ends with the user; what is imitated is the assistant's last answer, so end with one")
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    between, said = _around(tokenizer, messages, said)
    opening = _opening(tokenizer, messages)
    parts: list[Part] = []
    text = between[0]
    for answer, after in zip(said, between[1:], strict=True):
        start = text.rfind(opening) + len(opening) if opening and opening in text else len(text)
        ends = [place + len(end) for end in _ends(tokenizer) if (place := after.find(end)) >= 0]
        if not ends:
            raise UserError(
                "the chat template does not end what the assistant says with an end-of-sequence token "
                f"({', '.join(_ends(tokenizer))}), so the model would never learn to stop"
            )
        parts.append(Part(tokenizer.encode_plain(text[:start]), False))
        parts.append(Part(tokenizer.encode_plain(text[start:] + answer + after[: min(ends)]), True))
        text = after[min(ends) :]
    bos = tokenizer.inner.bos_token_id
    if bos is not None and parts[0].tokens[:2] == [bos, bos]:
        raise UserError("the chat begins with two beginning-of-sequence tokens; the template writes one, so take it out of the message")
    return parts


def _around(tokenizer: Tokenizer, messages: Sequence[Message], said: list[str]) -> tuple[list[str], list[str]]:
    """What the template writes before, between and after the assistant's answers, and the answers as it writes them."""
    marks = [f"\u2402{k}\u2403" for k in range(len(said))]
    numbers = iter(range(len(said)))
    marked = [{**m, "content": marks[next(numbers)]} if m["role"] == "assistant" else m for m in messages]
    rest, between = tokenizer.render(marked, False), []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise UserError("the chat template leaves out something the assistant says; train on a part of the chat that it keeps")
        between.append(before)
    between.append(rest)
    whole = tokenizer.render(messages, False)
    for variant in (said, [one.strip() for one in said]):  # many templates trim what is said
        if whole == between[0] + "".join(answer + after for answer, after in zip(variant, between[1:], strict=True)):
            return between, variant
    raise UserError("the chat template changes what the assistant says, so it is not clear what to learn; take out what it drops")


def _opening(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """What the template writes to open a new answer."""
    first = next(k for k, m in enumerate(messages) if m["role"] == "assistant")
    if not first:
        return ""  # the assistant speaks first
    closed, opened = (tokenizer.render(messages[:first], generation) for generation in (False, True))
    return opened.removeprefix(closed) if opened.startswith(closed) else ""


def _ends(tokenizer: Tokenizer) -> list[str]:
    return [str(tokenizer.inner.convert_ids_to_tokens(i)) for i in tokenizer.eos_ids]
