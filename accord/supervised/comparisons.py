"""Preferences in a model's tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accord.data.batching import packs
from accord.data.records import Completion, PairGroup
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.nn.loading import Model
from accord.progress import bar, safe_point, track
from accord.rollout.engine import encode_named
from accord.rollout.rollout import Rollout, from_completions
from accord.rollout.scoring import score_states, states_of
from accord.supervised.lengths import fitting
from accord.supervised.reading import Reader
from accord.text.tokenizer import Tokenizer


def sequence_logprobs(model: Model, rollout: Rollout) -> Tensor:
    """(B,) log p(completion | prompt), nats: summed over the response tokens. Differentiable."""
    states = states_of(model, rollout, 0)
    return score_states(model, rollout, states, 1.0, entropic=False).logprobs.sum(-1)


@dataclass(frozen=True)
class Judged:
    """A prompt's completions in tokens, and what is said of them."""

    group: PairGroup
    prompt: list[int]
    answers: list[list[int]]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(map(len, self.answers))

    @property
    def labels(self) -> list[float]:
        """Of each completion, for losses that know no pairs: the weight of the pairs it wins minus that of those it loses, as a share
        of the most that any has; above 0 is desirable, 0 is neither."""
        net = [0.0] * len(self.answers)
        for pair in self.group.pairs:
            net[pair.preferred] += pair.weight
            net[pair.other] -= pair.weight
        most = max(map(abs, net))
        return [value / most if most else 0.0 for value in net]


class Comparisons:
    """Prompts with compared completions, in a policy's tokens.

    Attributes:
        judged: those that have a pair and are not left out for their length.
        digest: of everything they are.

    Raises:
        UserError: one does not fit the model, or none is left.
    """

    def __init__(self, reader: Reader, groups: Sequence[PairGroup], max_tokens: int | None, what: str = "pairs") -> None:
        found = [judge(reader.tokenizer, group) for group in track(groups, f"Encoding {what}", len(groups)) if group.pairs]
        if not found:
            raise UserError(f"The {what} say of no two completions which is preferred (ties teach nothing here); give some that do.")
        named = f"prompts of the {what}, each with its longest completion,"
        found = fitting(found, lambda one: one.longest, lambda one: one.group.prompt.id, max_tokens, reader.context, named)
        self._set(found, reader)

    def _set(self, judged: Sequence[Judged], reader: Reader) -> None:
        self.judged, self._reader = list(judged), reader
        self.digest = hashlib.sha256(json.dumps([[j.prompt, j.answers, j.group.pairs, j.group.weight] for j in judged]).encode()).hexdigest()[:16]  # fmt: skip

    def only(self, judged: Sequence[Judged]) -> Comparisons:
        """The same policy's, of these prompts."""
        some = Comparisons.__new__(Comparisons)
        some._set(judged, self._reader)
        return some

    def __len__(self) -> int:
        return len(self.judged)

    def packs(self, numbers: Iterable[int], tokens: int, answers_of: Mapping[int, int] | None = None) -> list[list[int]]:
        """These prompts, longest first, in micro-batches of at most so many padded tokens; a prompt's completions stay together.

        Args:
            answers_of: whose completions each prompt has instead of its own.
        """
        theirs = lambda i: self.judged[i if answers_of is None else answers_of[i]].answers
        longest = lambda i: len(self.judged[i].prompt) + max(map(len, theirs(i)))
        return packs(sorted(numbers, key=lambda i: -longest(i)), lambda i: len(theirs(i)), longest, tokens)

    def rollout(self, numbers: Iterable[int], answers_of: Iterable[int] | None = None) -> Rollout:
        """The completions of these prompts as rows, those of a prompt together.

        Args:
            answers_of: whose completions each prompt has instead of its own, cut where the context ends.
        """
        encoded, completions = [], list[Completion]()
        numbers = list(numbers)
        for i, other in zip(numbers, numbers if answers_of is None else answers_of, strict=True):
            prompt, theirs = self.judged[i].prompt, self.judged[other]
            room = self._reader.context - len(prompt)
            encoded += [(prompt, answer[:room]) for answer in theirs.answers]
            completions += theirs.group.completions
        return from_completions(encoded, completions, self._reader.tokenizer.pad_id).to(self._reader.device)

    @torch.no_grad()
    def logprobs(self, model: Model, budget: TokenBudget, what: str) -> list[Tensor]:
        """Of each prompt, (K,) fp32: log p of its completions under a model."""
        out: list[Tensor] = [torch.empty(0)] * len(self)

        def work(tokens: int) -> None:
            with bar(what, len(self)) as progress:
                for part in self.packs(range(len(self)), tokens):
                    safe_point("Nothing has been trained since the last checkpoint.")
                    told = sequence_logprobs(model, self.rollout(part))
                    for i, some in zip(part, told.split([len(self.judged[i].answers) for i in part]), strict=True):
                        out[i] = some
                    progress.advance(len(part))

        budget.fit(work)
        return out


def judge(tokenizer: Tokenizer, group: PairGroup) -> Judged:
    """A group in tokens.

    Raises:
        UserError: a completion is empty, or the prompt cannot be encoded.
    """
    answers = [list(c.tokens) or tokenizer.encode_completion(c.text, c.finished) for c in group.completions]
    if [] in answers:
        raise UserError(f"Prompt '{group.prompt.id}', completion {answers.index([])} is empty; there is nothing to prefer.")
    return Judged(group, encode_named(tokenizer, group.prompt), answers)
