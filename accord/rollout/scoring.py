"""The one path by which a policy's log-probabilities are computed after sampling: for the self-test, the
reference, old log-probabilities and the update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accord.nn.foreign import ForeignModel
from accord.nn.layout import select_lines
from accord.nn.loading import Model
from accord.nn.logprobs import LogitsProcessor, exact_kl, token_stats
from accord.nn.transformer import Transformer
from accord.rollout.guides import Guide
from accord.rollout.rollout import Rollout


class Scored(NamedTuple):
    logprobs: Tensor  # (B,T) nats, 0 outside the response
    entropy: Tensor  # (B,T) nats, 0 outside the response


def trunk_of(start: Transformer, rollout: Rollout, split: int) -> Tensor:
    """Activations of the frozen starting model at ``split``, (B,T,D), 0 where there is no token."""
    layout = rollout.layout
    return layout.rows(start.lower(start.geometry(layout), split))


def final_states(model: Model, rollout: Rollout, split: int, where: Tensor) -> Tensor:
    """Final hidden states of ``model`` after the tokens that ``where`` (B,T) bool marks, row after row: (n,D).

    From the rollout's trunk if that is cut at ``split``. The last layer is computed for these tokens only.
    """
    if isinstance(model, ForeignModel):
        return model.hidden(rollout.tokens, rollout.positions, rollout.token_mask)[where]
    layout = rollout.layout
    at = model.geometry(layout)
    wanted, again = layout.everywhere.token[where].unique(return_inverse=True)
    if split and rollout.trunk is not None and rollout.trunk_cut == split:
        states = model.upper(layout.lines(rollout.trunk), at, split, wanted)
    else:
        states = model.upper(model.lower(at, 0), at, 0, wanted)
    return select_lines(states, again)  # completions of one prompt share a state


def states_of(model: Model, rollout: Rollout, split: int) -> Tensor:
    """(N,D): the hidden state before each of the N response tokens, row after row."""
    return final_states(model, rollout, split, rollout.before_response)


def spread(values: Tensor, rollout: Rollout) -> Tensor:
    """(N,) values of the response tokens put back to their places, (B,T), 0 elsewhere."""
    chosen = rollout.response_mask
    return torch.zeros(chosen.shape, device=chosen.device, dtype=values.dtype).masked_scatter(chosen, values)


def score_states(
    model: Model,
    rollout: Rollout,
    states: Tensor,
    temperature: float,
    processor: LogitsProcessor | None = None,
    entropic: bool = True,
) -> Scored:
    """Log-probability and entropy at every response token, of the distribution before it. Differentiable; the entropy if ``entropic``.

    ``temperature`` is the one the tokens were sampled at: the policy *is* the tempered distribution.
    """
    stats = token_stats(states, model.output_matrix, rollout.tokens[rollout.response_mask], temperature, processor, entropic)
    return Scored(spread(stats.logprobs, rollout), spread(stats.entropy, rollout))


@torch.no_grad()
def processor_of(guide: Guide, rollout: Rollout) -> LogitsProcessor:
    """What the guide makes of the logits before each response token."""
    if guide.model is None:
        return guide.processor(torch.empty(0), torch.empty(0))
    return guide.processor(states_of(guide.model, rollout, guide.split), guide.model.output_matrix)


def score_rows(model: Model, rollout: Rollout, split: int, temperature: float, guide: Guide | None = None) -> Scored:
    """:func:`score_states` from the tokens."""
    processor = None if guide is None else processor_of(guide, rollout)
    return score_states(model, rollout, states_of(model, rollout, split), temperature, processor)


@torch.no_grad()
def score(model: Model, rollout: Rollout, split: int, temperature: float, token_budget: int, guide: Guide | None = None) -> Scored:
    """:func:`score_rows` of all rows, in micro-batches of at most ``token_budget`` padded tokens."""
    out = [torch.zeros(rollout.tokens.shape, device=rollout.tokens.device) for _ in Scored._fields]
    for rows in rollout.micro_batches(token_budget):
        part = rollout.select(rows)
        for whole, piece in zip(out, score_rows(model, part, split, temperature, guide), strict=True):
            whole[rows, : piece.shape[1]] = piece
    return Scored(*out)


def kl_rows(
    model: Model, rollout: Rollout, states: Tensor, other: Model, other_split: int, temperature: float, reverse: bool = False
) -> Tensor:
    """KL[model || other] over the whole vocabulary at each response token, (B,T) nats; ``reverse`` is KL[other || model].

    Differentiable in ``states`` (the model's own) and the model's output matrix, not in the other model.
    """
    with torch.no_grad():
        theirs = states_of(other, rollout, other_split)
    mine = (states, model.output_matrix)
    first, second = (mine, (theirs, other.output_matrix.detach()))[:: -1 if reverse else 1]
    return spread(exact_kl(*first, *second, temperature), rollout)


@torch.no_grad()
def kl_between(model: Model, other: Model, rollout: Rollout, split: int, other_split: int, temperature: float, token_budget: int) -> Tensor:
    """KL[model || other] over the whole vocabulary at each response token, (B,T) nats, 0 outside."""
    out = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
    for rows in rollout.micro_batches(token_budget):
        part = rollout.select(rows)
        kl = kl_rows(model, part, states_of(model, part, split), other, other_split, temperature)
        out[rows, : part.tokens.shape[1]] = kl.to(out.dtype)
    return out
