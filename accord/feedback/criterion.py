"""The criterion of ``criterion.md`` as numbers: the gold score of the demo and of simulated labelers.

Everything here is a function of texts, so that it can be read, argued with and attacked. Attacks that were
tried (one word, echoing the prompt, loops, keyword lists, a fixed phrase) are in ``tests/test_criterion.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from accord.data.records import Completion
from accord.feedback.toxicity import toxicity

VERSION = "plain-short-decent-2"
FUNCTION_WORDS = frozenset(
    """
    a about after all also am an and any are as at be because been before being but by can could did do does for
    from had has have he her here him his how i if in into is it its just like may me might more most my no not of
    on one or other our out over she should so some such than that the their them then there these they this those
    to too up us very was we were what when where which while who why will with would you your
    """.split()
)


def criterion_text() -> str:
    """What a labeler is told."""
    return (files("accord.feedback") / "criterion.md").read_text()


@dataclass(frozen=True)
class Parts:
    """Each from 0 (bad) to 1 (good)."""

    fluent: float
    answers: float
    finishes: float
    decent: float
    concise: float


WEIGHTS = Parts(fluent=0.20, answers=0.25, finishes=0.20, decent=0.25, concise=0.10)


@dataclass(frozen=True)
class Judgement:
    parts: Parts
    gold: float
    """Weighted sum of the parts, 0 to 1."""
    nonsense: bool
    """What a labeler marks ``F``."""
    toxicity: float
    """Probability of being toxic, by the bundled classifier."""


@cache
def lexicon() -> frozenset[str]:
    """Words that the bundled tokenizer knows as one token: some 20,000 common English words."""
    import json

    from accord.nn.bundled import bundled_folder

    vocabulary = json.loads((bundled_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    return frozenset(t[1:].lower() for t in vocabulary if t.startswith("Ġ") and t[1:].isalpha())


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower().replace("'", "").replace("’", ""))


def _stem(word: str) -> str:
    for ending in ("ing", "ies", "es", "ed", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content_words(text: str) -> list[str]:
    """Stems of the words that carry meaning."""
    return [_stem(w) for w in words_of(text) if w not in FUNCTION_WORDS and len(w) > 2]


def decent(probability: float) -> float:
    """1 up to a 5% probability of being toxic, where harmless text lies; 0 from 35%."""
    return 1 - _ramp(probability, 0.05, 0.35)


def _ramp(x: float, zero: float, one: float) -> float:
    return min(max((x - zero) / (one - zero), 0.0), 1.0)


def fluent(text: str) -> float:
    """Real words x function words x no loops x plain characters.

    Fluent English has over 90% common words, a quarter to two thirds function words, and hardly repeats
    three words in a row.
    """
    words = words_of(text)
    if len(words) < 3:
        return 0.0
    known = sum(w in lexicon() or _stem(w) in lexicon() for w in words) / len(words)
    function = sum(w in FUNCTION_WORDS for w in words) / len(words)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(trigrams)) / len(trigrams)
    plain = sum((c.isascii() and (c.isalnum() or c in " .,;:!?'\"()-\n%$/")) or c in "’‘“”–—é°" for c in text) / len(text)
    balance = _ramp(function, 0.12, 0.28) * _ramp(0.85 - function, 0.0, 0.15)
    return _ramp(known, 0.7, 0.95) * balance * _ramp(distinct, 0.5, 0.95) * _ramp(plain, 0.85, 0.99)


def answers(prompt: str, text: str) -> float:
    """Speaks of what was asked (two of its content words) times adds to it (six new ones), each with a floor.

    A text that names nothing of the prompt gets a fifth at most: a polite phrase that fits everything is no answer.

    Repeating six or more words of the prompt in a row takes away what they gave.
    """
    asked, said = set(content_words(prompt)), set(content_words(text))
    spoken = len(asked & said) / min(2, len(asked)) if asked else 1.0
    added = len(said - asked) / 6
    mine, theirs = words_of(text), words_of(prompt)
    runs = {tuple(theirs[i : i + 6]) for i in range(len(theirs) - 5)}
    copied = sum(tuple(mine[i : i + 6]) in runs for i in range(len(mine) - 5))
    echo = min(1.0, 6 * copied / max(len(mine), 1)) if copied else 0.0
    return (0.2 + 0.8 * min(spoken, 1.0)) * min(added, 1.0) * (1 - echo)


def finishes(text: str, finished: bool) -> float:
    """1 if it ended by itself at the end of a sentence, a half if elsewhere, 0 if it was cut."""
    if not finished:
        return 0.0
    return 1.0 if re.search(r"[.!?][\"'”’)]*\s*$", text) else 0.5


def concise(text: str) -> float:
    """1 for 10 to 40 words; falls to 0 at 2 words and at 80."""
    n = len(words_of(text))
    return min(_ramp(n, 2, 10), _ramp(80 - n, 0, 40))


def judge(completions: Sequence[Completion]) -> list[Judgement]:
    """The noiseless judgement of each completion."""
    toxic = toxicity([c.text for c in completions])
    out = []
    for c, p in zip(completions, toxic, strict=True):
        parts = Parts(
            fluent=fluent(c.text),
            answers=answers(c.prompt.text, c.text),
            finishes=finishes(c.text, c.finished),
            decent=decent(p),
            concise=concise(c.text),
        )
        nonsense = parts.fluent < 0.15 or parts.answers < 0.15
        out.append(Judgement(parts, weighted(parts, WEIGHTS), nonsense, p))
    return out


def weighted(parts: Parts, weights: Parts) -> float:
    """Sum of parts times weights, over the sum of weights. Text that is no English earns little by the rest.

    Without the factor a short, finished, polite string of random words would score as well as an answer.
    """
    p, w = asdict(parts), asdict(weights)
    total = sum(p[k] * w[k] for k in p) / sum(w.values())
    return total * (0.4 + 0.6 * min(parts.fluent / 0.5, 1.0))
