"""Which tokens of a chat are the assistant's own, for any chat template.

A template is a program that writes a text around what was said; it does not say who wrote which part. But a model is sampled from
what the template writes when it is asked to open a new answer (``add_generation_prompt``). So an answer begins where that text ends,
which the whole chat must begin with, and ends with the end-of-sequence token after it, which the model must write itself to stop.
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

    They are those of the whole text, as a prompt is encoded; where a token would reach over the beginning or the end of an answer,
    each stretch is encoded by itself, as an answer is when it is sampled.

    Raises:
        UserError: the chat does not end with the assistant, or the template refuses it, changes what the assistant says, opens an answer
            otherwise than when it is sampled, or does not end one with an end-of-sequence token.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the chat ends with the user; what is imitated is the assistant's last answer, so end with one")
    tokenizer.check_alphabet(m["content"] for m in messages)
    whole, edges = tokenizer.render(messages, False), [0]
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _start(tokenizer, messages[:number], whole, message["content"])
            edges += [start, _end(tokenizer, whole, start, message["content"])]
    parts = _parts(tokenizer, whole, edges)
    bos = tokenizer.inner.bos_token_id
    if bos is not None and parts[0].tokens[:2] == [bos, bos]:
        raise UserError("the chat begins with two beginning-of-sequence tokens; the template writes one, so take it out of the message")
    return parts


def _start(tokenizer: Tokenizer, before: Sequence[Message], whole: str, answer: str) -> int:
    """Where an answer begins: after what it is sampled from."""
    if not before:  # the assistant speaks first, and nothing opens that
        return max(whole.find(answer.strip()), 0)
    opened = tokenizer.render(before, True)
    if not whole.startswith(opened):
        raise UserError(
            "the chat template writes the answer otherwise than it asks for one, so what is learned would not be what is sampled "
            f"(it asks for one by {opened[-40:]!r}); use another template"
        )
    return len(opened)


def _end(tokenizer: Tokenizer, whole: str, start: int, answer: str) -> int:
    """Where it ends: after the end-of-sequence token that follows it."""
    ends = [str(tokenizer.inner.convert_ids_to_tokens(i)) for i in tokenizer.eos_ids]
    said = False
    for variant in (answer, answer.strip()):  # many templates trim what is said
        place = whole.find(variant, start)
        while place >= 0:
            said, rest = True, whole[place + len(variant) :]
            blank = len(rest) - len(rest.lstrip())
            found = next((end for end in ends if rest.startswith(end, blank)), None)
            if found is not None:
                return place + len(variant) + blank + len(found)
            place = whole.find(variant, place + 1)
    if said:
        raise UserError(
            f"the chat template does not end what the assistant says with an end-of-sequence token ({', '.join(ends)}), so the model would "
            "never learn to stop"
        )
    raise UserError(
        "the chat template changes what the assistant says, or leaves out some of it (such as the thoughts of an earlier answer), so it is "
        "not clear what to learn; take out what it drops"
    )


def _parts(tokenizer: Tokenizer, whole: str, edges: Sequence[int]) -> list[Part]:
    """``edges``: where what is not the assistant's begins, and what is, in turn; and where the last of it ends."""
    stretches = list(zip(edges, edges[1:], strict=False))
    spans = tokenizer.spans(whole[: edges[-1]])
    if spans is None or any(a < edge < b for _, (a, b) in spans for edge in edges):
        return [Part(tokenizer.encode_plain(whole[a:b]), k % 2 == 1) for k, (a, b) in enumerate(stretches)]
    return [Part([i for i, (start, _) in spans if a <= start < b], k % 2 == 1) for k, (a, b) in enumerate(stretches)]
