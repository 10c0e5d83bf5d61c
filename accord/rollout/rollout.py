"""What a policy wrote, as tensors. One type for every algorithm.

Rows are right-padded: prompt, completion, padding. Every (B,T) tensor is aligned with ``tokens``: column t
speaks of token t and of the distribution it was drawn from (that is, of the state *before* token t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from accord.data.records import Completion, Prompt, Turn
from accord.nn.layout import Layout


@dataclass
class Rollout:
    """B completions.

    Attributes:
        tokens: (B,T) int64.
        positions: (B,T) int64, 0 for the first token of a row; padding continues the count.
        token_mask: (B,T) bool, True where a token exists.
        response_mask: (B,T) bool, True = a token the policy chose (the end-of-sequence token included).
        engine_logprobs: (B,T) fp32 nats, from the sampler; 0 outside the response.
        finished: (B,) bool, the policy chose an end token; False = truncated by the length limit.
        trunk: (B,T,D) or None, activations of the frozen starting model at layer ``trunk_cut``, kept while
            the policy generated.
        step_rewards: (B,T) or None, what an environment gave at the end of each turn.
        sampled: the policy wrote it just now, so ``engine_logprobs`` are known (else they are 0).
        prompts, indices, texts: for each row its prompt, its number among that prompt's K, its text.
    """

    tokens: Tensor
    positions: Tensor
    token_mask: Tensor
    response_mask: Tensor
    engine_logprobs: Tensor
    finished: Tensor
    prompts: list[Prompt]
    indices: list[int]
    texts: list[str]
    trunk: Tensor | None = None
    trunk_cut: int = 0
    step_rewards: Tensor | None = None
    sampled: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens a row has, prompt included."""
        return self.token_mask.sum(-1)

    @property
    def response_lengths(self) -> Tensor:
        return self.response_mask.sum(-1)

    @cached_property
    def layout(self) -> Layout:
        """Its different tokens: a prompt is there once, whatever the number of its completions."""
        return Layout.of(self.tokens, self.lengths)

    @property
    def before_response(self) -> Tensor:
        """(B,T) bool: the tokens after which the policy chose one."""
        return torch.cat((self.response_mask[:, 1:], torch.zeros_like(self.response_mask[:, :1])), dim=1)

    @property
    def group(self) -> Tensor:
        """(B,) int64: equal for completions of the same prompt."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(p.id, len(numbers)) for p in self.prompts], device=self.tokens.device)

    @property
    def last(self) -> Tensor:
        """(B,) int64: column of the last response token, where the score lands."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (columns * self.response_mask).amax(-1)

    @property
    def at_last(self) -> Tensor:
        """(B,T) bool: the last response token of each row."""
        return torch.zeros_like(self.response_mask).scatter(1, self.last[:, None], True)

    def select(self, rows: Tensor) -> Rollout:
        """These rows, with columns that are padding in all of them cut off."""
        width = int(self.lengths[rows].max())
        changes: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value[rows] if value.ndim == 1 else value[rows, :width]
            elif isinstance(value, list) and value:  # empty where only the tokens are known
                changes[f.name] = [value[i] for i in rows.tolist()]
        return replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Rollout:
        """On that device."""
        changes = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **changes)  # type: ignore[arg-type]

    def micro_batches(self, token_budget: int) -> list[Tensor]:
        """:func:`micro_batches` of the rows, a prompt's completions together."""
        families = self.group.tolist() if self.prompts else range(len(self))
        return micro_batches(self.lengths.tolist(), families, token_budget)

    def turns(self, row: int) -> list[Turn]:
        """An episode's turns: the policy's tokens, what they gave, and what was written to it then."""
        assert self.step_rewards is not None
        out: list[tuple[list[int], float, list[int]]] = []
        closed = True  # a turn ends where the environment writes, or where it gave something
        columns = zip(self.tokens[row].tolist(), self.response_mask[row].tolist(), self.step_rewards[row].tolist(), strict=True)
        for token, chosen, reward in list(columns)[: int(self.lengths[row])]:
            if chosen:
                if closed:
                    out.append(([], 0.0, []))
                tokens, given, reply = out[-1]
                out[-1] = ([*tokens, token], given + reward, reply)
                closed = reward != 0
            elif out:
                out[-1][2].append(token)
                closed = True
        return [Turn(tuple(tokens), reward, tuple(reply)) for tokens, reward, reply in out]

    def completions(self) -> list[Completion]:
        """The rows as records."""
        out = []
        for row in range(len(self)):
            tokens = tuple(self.tokens[row][self.response_mask[row]].tolist())
            out.append(Completion(self.prompts[row], self.texts[row], bool(self.finished[row]), self.indices[row], tokens))
        return out


def micro_batches(lengths: Sequence[int], families: Sequence[int], token_budget: int) -> list[Tensor]:
    """Rows packed so that each pack's padded size stays within the budget.

    Families stay together, as far as the budget lets them: what their rows begin with in common is computed once in a pack.
    They follow each other by their longest row, longest first, so that a pack's rows are of about one length.

    Returns index tensors that together hold every row once. A row longer than the budget stands alone.
    """
    longest: dict[int, int] = {}
    for family, length in zip(families, lengths, strict=True):
        longest[family] = max(length, longest.get(family, 0))
    packs: list[list[int]] = []
    widest = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-longest[families[i]], families[i], -lengths[i])):
        widest = max(widest, lengths[row])
        if packs and widest * (len(packs[-1]) + 1) <= token_budget:
            packs[-1].append(row)
        else:
            packs.append([row])
            widest = lengths[row]
    return [torch.tensor(pack) for pack in packs]


@dataclass
class Row:
    """One episode as lists, a number a token. ``chosen``: the policy's own; ``rewards``: what each gave, if that is known."""

    prompt: Prompt
    index: int
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def extend(self, tokens: Sequence[int], chosen: bool, logprobs: Sequence[float] | None = None) -> None:
        self.tokens += tokens
        self.chosen += [chosen] * len(tokens)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(tokens)
        self.rewards += [0.0] * len(tokens)

    @property
    def end(self) -> int:
        """Where the row ends: after the last token that the policy chose."""
        return len(self.chosen) - self.chosen[::-1].index(True)


def from_rows(rows: Sequence[Row], finished: Sequence[bool], texts: list[str], pad_id: int, device: torch.device, sampled: bool) -> Rollout:
    """Episodes as a rollout, with their ``step_rewards``. Each ends with the policy's last token: what comes after is read by nobody."""
    ends = [row.end for row in rows]
    width = max(ends)

    def table(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*v[:end], *[fill] * (width - end)] for v, end in zip(values, ends, strict=True)], dtype=dtype, device=device)

    columns = torch.arange(width, device=device)[None]
    return Rollout(
        tokens=table([row.tokens for row in rows], pad_id, torch.long),
        positions=columns.expand(len(rows), -1),
        token_mask=columns < torch.tensor(ends, device=device)[:, None],
        response_mask=table([row.chosen for row in rows], False, torch.bool),
        engine_logprobs=table([row.logprobs for row in rows], 0.0, torch.float32),
        finished=torch.tensor(list(finished), device=device),
        prompts=[row.prompt for row in rows],
        indices=[row.index for row in rows],
        texts=texts,
        step_rewards=table([row.rewards for row in rows], 0.0, torch.float32),
        sampled=sampled,
    )


def from_completions(encoded: list[tuple[list[int], list[int]]], completions: list[Completion], pad_id: int) -> Rollout:
    """A rollout of given texts: (prompt ids, completion ids) a row."""
    rows = []
    for (prompt, answer), completion in zip(encoded, completions, strict=True):
        row = Row(completion.prompt, completion.index)
        row.extend(prompt, chosen=False)
        row.extend(answer, chosen=True)
        rows.append(row)
    texts, finished = [c.text for c in completions], [c.finished for c in completions]
    return replace(from_rows(rows, finished, texts, pad_id, torch.device("cpu"), sampled=False), step_rewards=None)
