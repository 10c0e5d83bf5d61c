"""Grammars whose texts can be written by chance, read back, and whose entropy is known.

A node writes text, reads it, and knows how many bits its choices are and how many bytes it writes on average. Choices are uniform and
bind attributes, which later nodes refer to: a story's hero keeps its name. Every attribute is as likely to have any of its values, and
how many options a node has does not depend on them; so expectations add up, and entropy and length are exact (no sampling).

A grammar is unambiguous if every text it writes is read in one way; then the entropy of the texts is that of the choices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Attributes = Mapping[str, str]


class Node:
    """A part of a text."""

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        """By chance; binds what it chooses. What is bound already is taken."""
        raise NotImplementedError

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        """Every way to read it from there: where it ends, and what is bound then."""
        raise NotImplementedError

    @property
    def bits(self) -> float:
        """Entropy of its choices, given what is bound."""
        return 0.0

    @property
    def length(self) -> float:
        """Expected bytes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Node):
    """These characters, ASCII."""

    said: str

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        return self.said

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        if text.startswith(self.said, at):
            yield at + len(self.said), bound

    @property
    def length(self) -> float:
        return float(len(self.said))


@dataclass(frozen=True)
class Sequence_(Node):
    """One after the other."""

    parts: tuple[Node, ...]

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        return "".join(part.write(luck, bound) for part in self.parts)

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        def rest(number: int, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
            if number == len(self.parts):
                yield at, bound
                return
            for end, now in self.parts[number].read(text, at, bound):
                yield from rest(number + 1, end, now)

        yield from rest(0, at, bound)

    @cached_property
    def bits(self) -> float:  # type: ignore[override]
        return math.fsum(part.bits for part in self.parts)

    @cached_property
    def length(self) -> float:  # type: ignore[override]
        return math.fsum(part.length for part in self.parts)


@dataclass(frozen=True)
class OneOf(Node):
    """One of several, each as likely; with a ``name``, which one is bound (by its key)."""

    options: Mapping[str, Node]
    name: str = ""

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        key = luck.choice(list(self.options))
        if self.name:
            bound[self.name] = key
        return self.options[key].write(luck, bound)

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        for key, option in self.options.items():
            yield from option.read(text, at, {**bound, self.name: key} if self.name else bound)

    @cached_property
    def bits(self) -> float:  # type: ignore[override]
        return math.log2(len(self.options)) + math.fsum(o.bits for o in self.options.values()) / len(self.options)

    @cached_property
    def length(self) -> float:  # type: ignore[override]
        return math.fsum(o.length for o in self.options.values()) / len(self.options)


@dataclass(frozen=True)
class Word(Node):
    """One of these words, each as likely, bound to ``name`` if it has one."""

    words: Sequence[str]
    name: str = ""

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        if self.name in bound:
            return bound[self.name]
        word = luck.choice(list(self.words))
        if self.name:
            bound[self.name] = word
        return word

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        for word in self.words:
            if text.startswith(word, at):
                yield at + len(word), {**bound, self.name: word} if self.name else bound

    @property
    def bits(self) -> float:
        return math.log2(len(self.words))

    @property
    def length(self) -> float:
        return math.fsum(map(len, self.words)) / len(self.words)


@dataclass(frozen=True)
class Again(Node):
    """What ``name`` is bound to; ``words`` are what it may be, and one of them is as likely as another."""

    name: str
    words: Sequence[str]

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        return bound[self.name]

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        if text.startswith(bound[self.name], at):
            yield at + len(bound[self.name]), bound

    @property
    def length(self) -> float:
        return math.fsum(map(len, self.words)) / len(self.words)


@dataclass(frozen=True)
class Hidden(Node):
    """A choice that is not written, bound to ``name``; it shows in what depends on it."""

    name: str
    values: Sequence[str]

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        if self.name not in bound:
            bound[self.name] = luck.choice(list(self.values))
        return ""

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        for value in self.values:
            yield at, {**bound, self.name: value}

    @property
    def bits(self) -> float:
        return math.log2(len(self.values))

    @property
    def length(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Depending(Node):
    """What goes with the value of ``name``. All have equally many bits."""

    name: str
    options: Mapping[str, Node]

    def __post_init__(self) -> None:
        if len({round(option.bits, 9) for option in self.options.values()}) > 1:
            raise ValueError(f"what depends on {self.name} has different entropies")

    def write(self, luck: random.Random, bound: dict[str, str]) -> str:
        return self.options[bound[self.name]].write(luck, bound)

    def read(self, text: str, at: int, bound: Attributes) -> Iterator[tuple[int, Attributes]]:
        yield from self.options[bound[self.name]].read(text, at, bound)

    @property
    def bits(self) -> float:
        return next(iter(self.options.values())).bits

    @cached_property
    def length(self) -> float:  # type: ignore[override]
        return math.fsum(o.length for o in self.options.values()) / len(self.options)


def sequence(*parts: Node | str) -> Sequence_:
    """One after the other; a string is a :class:`Text`."""
    return Sequence_(tuple(Text(part) if isinstance(part, str) else part for part in parts))


def readings(node: Node, text: str) -> list[Attributes]:
    """Every way to read the whole text; of an unambiguous grammar none, where the text is not of it, or one."""
    return [bound for end, bound in node.read(text, 0, {}) if end == len(text)]
