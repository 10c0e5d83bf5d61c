"""What a policy wrote, as tensors. One type for every algorithm.

Rows are right-padded: prompt, completion, padding. Every (B,T) tensor is aligned with ``tokens``: column t
speaks of token t and of the distribution it was drawn from (that is, of the state *before* token t).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from accord.data.records import Completion, Prompt


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

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens a row has, prompt included."""
        return self.token_mask.sum(-1)

    @property
    def response_lengths(self) -> Tensor:
        return self.response_mask.sum(-1)

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

    def completions(self) -> list[Completion]:
        """The rows as records."""
        out = []
        for row in range(len(self)):
            tokens = tuple(self.tokens[row][self.response_mask[row]].tolist())
            out.append(Completion(self.prompts[row], self.texts[row], bool(self.finished[row]), self.indices[row], tokens))
        return out


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Rows grouped by length so that a group's padded size stays within the budget; longest first.

    Returns index tensors that together hold every row once. A row longer than the budget stands alone.
    """
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    sizes = lengths.tolist()
    groups: list[list[int]] = []
    for row in order:
        if groups and sizes[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(g) for g in groups]


def from_completions(encoded: list[tuple[list[int], list[int]]], completions: list[Completion], pad_id: int) -> Rollout:
    """A rollout of given texts: (prompt ids, completion ids) a row; log-probabilities are 0 (unknown)."""
    width = max(len(p) + len(c) for p, c in encoded)
    tokens = torch.full((len(encoded), width), pad_id)
    token_mask = torch.zeros_like(tokens, dtype=torch.bool)
    response_mask = torch.zeros_like(token_mask)
    for row, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        token_mask[row, :end] = True
        response_mask[row, len(prompt) : end] = True
    return Rollout(
        tokens=tokens,
        positions=torch.arange(width).expand_as(tokens),
        token_mask=token_mask,
        response_mask=response_mask,
        engine_logprobs=torch.zeros(tokens.shape),
        finished=torch.tensor([c.finished for c in completions]),
        prompts=[c.prompt for c in completions],
        indices=[c.index for c in completions],
        texts=[c.text for c in completions],
    )
