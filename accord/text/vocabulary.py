"""A tokenizer of one's own, learned from texts: byte-level BPE, or a token a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from accord.errors import UserError

Kind = Literal["bpe", "char"]
END = "<|end|>"
"""Ends a document, and a turn of a chat: what is written ends here. It also fills tensors."""
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (END, *ROLES)
TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
BYTES = 256


class Statistics(NamedTuple):
    """What a tokenizer makes of a text.

    Attributes:
        bytes_per_token: how much of it (UTF-8) a token stands for; more is shorter sequences.
        coverage: share of its characters that can be told at all; with bytes, all.
        used: share of the vocabulary, special tokens aside, that occurs in it.
    """

    tokens: int
    bytes_per_token: float
    coverage: float
    used: float


def learn_tokenizer(texts: Sequence[str], kind: Kind = "bpe", size: int | None = None) -> Any:
    """A ``PreTrainedTokenizerFast`` with an end token, tokens for the roles of a chat, and a template.

    Args:
        kind: ``bpe`` merges the pairs of bytes that stand together most often (Sennrich et al. 2016, over bytes as in Radford et al.
            2019); ``char`` has a token for each character of the texts and can read no other.
        size: tokens in all, special ones included; ``char`` has as many as there are characters.

    Raises:
        UserError: there is no text, or it does not support a vocabulary of this size.
    """
    if not any(text.strip() for text in texts):
        raise UserError("There is no text to learn a tokenizer from.")
    if kind == "char":
        if size is not None:
            raise UserError("A tokenizer of characters has as many tokens as the text has characters; leave out the size.")
        return _fast(_characters(sorted(set().union(*texts))), unknown=END)
    size = 4096 if size is None else size
    if size < BYTES + len(SPECIAL):
        raise UserError(f"A vocabulary of {size} is too small: {BYTES} bytes and {len(SPECIAL)} special tokens are {BYTES + len(SPECIAL)}.")
    raw = _bytes(texts, size)
    if raw.get_vocab_size() < size:
        raise UserError(
            f"These texts support a vocabulary of {raw.get_vocab_size()} tokens (no other two stand together twice), not of {size}; give more text or a smaller size."
        )
    return _fast(raw)


def statistics(tokenizer: Any, texts: Sequence[str]) -> Statistics:
    """Of texts, best of some that the tokenizer was not learned from."""
    characters = sum(map(len, texts))
    if not characters:
        raise UserError("There is no text to measure a tokenizer on.")
    known = {word for word in tokenizer.get_vocab() if len(word) == 1} if tokenizer.unk_token_id is not None else None
    lost = 0 if known is None else sum(character not in known for text in texts for character in text)
    ids = [i for some in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in some]
    ordinary = set(ids) - set(tokenizer.all_special_ids)
    size = sum(len(text.encode()) for text in texts)
    own = len(tokenizer) - len(SPECIAL)
    return Statistics(len(ids), size / len(ids), 1 - lost / characters, len(ordinary) / own)


def _bytes(texts: Sequence[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(_pieces(texts), trainer)
    return raw


def _pieces(texts: Sequence[str], most: int = 2**20) -> Iterator[str]:
    """Long texts a megabyte at a time, cut at the end of a line where there is one."""
    for text in texts:
        start = 0
        while start < len(text):
            end = min(start + most, len(text))
            if end < len(text) and (line := text.rfind("\n", start, end)) > start:
                end = line + 1
            yield text[start:end]
            start = end


def _characters(alphabet: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *alphabet])}, unk_token=END))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(list(SPECIAL))
    return raw


def _fast(raw: Any, unknown: str | None = None) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, pad_token=END, unk_token=unknown, additional_special_tokens=list(ROLES)
    )
    made.chat_template = TEMPLATE
    return made
