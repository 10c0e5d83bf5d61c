"""The one path by which a policy's log-probabilities are computed after sampling: for the self-test, the
reference, old log-probabilities and the update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accord.nn.foreign import ForeignModel
from accord.nn.loading import Model
from accord.nn.logprobs import exact_kl, token_stats
from accord.nn.transformer import Transformer
from accord.rollout.rollout import Rollout, micro_batches


class Scored(NamedTuple):
    logprobs: Tensor  # (B,T) nats, 0 outside the response
    entropy: Tensor  # (B,T) nats, 0 outside the response


def trunk_of(start: Transformer, rollout: Rollout, split: int) -> Tensor:
    """Activations of the frozen starting model at ``split``, (B,T,D), for whole rows."""
    geometry = start.geometry(rollout.positions, rollout.token_mask)
    return start.lower(rollout.tokens, geometry, split)


def final_hidden(model: Model, rollout: Rollout, split: int) -> Tensor:
    """Final hidden states (B,T,D) of ``model``, from the rollout's trunk if that is cut at ``split``."""
    if isinstance(model, ForeignModel):
        return model.hidden(rollout.tokens, rollout.positions, rollout.token_mask)
    geometry = model.geometry(rollout.positions, rollout.token_mask)
    if split and rollout.trunk is not None and rollout.trunk_cut == split:
        return model.upper(rollout.trunk, geometry, split)
    return model.upper(model.lower(rollout.tokens, geometry, 0), geometry, 0)


def score_rows(model: Model, rollout: Rollout, split: int, temperature: float) -> Scored:
    """Log-probability and entropy at every response token, of the distribution before it. Differentiable.

    ``temperature`` is the one the tokens were sampled at: the policy *is* the tempered distribution.
    """
    hidden = final_hidden(model, rollout, split)
    chosen = rollout.response_mask
    # The state before token t is the hidden state at column t - 1.
    states = hidden[:, :-1][chosen[:, 1:]]
    stats = token_stats(states, model.output_matrix, rollout.tokens[chosen], temperature)
    empty = torch.zeros(chosen.shape, device=chosen.device)
    return Scored(empty.masked_scatter(chosen, stats.logprobs), empty.masked_scatter(chosen, stats.entropy))


@torch.no_grad()
def score(model: Model, rollout: Rollout, split: int, temperature: float, token_budget: int) -> Scored:
    """:func:`score_rows` of all rows, in micro-batches of at most ``token_budget`` padded tokens."""
    out = [torch.zeros(rollout.tokens.shape, device=rollout.tokens.device) for _ in Scored._fields]
    for rows in micro_batches(rollout.lengths, token_budget):
        part = rollout.select(rows)
        for whole, piece in zip(out, score_rows(model, part, split, temperature), strict=True):
            whole[rows, : piece.shape[1]] = piece
    return Scored(*out)


@torch.no_grad()
def kl_between(model: Model, other: Model, rollout: Rollout, split: int, other_split: int, temperature: float, token_budget: int) -> Tensor:
    """KL[model || other] over the whole vocabulary at each response token, (B,T) nats, 0 outside."""
    out = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
    for rows in micro_batches(rollout.lengths, token_budget):
        part = rollout.select(rows)
        chosen = part.response_mask
        mine = final_hidden(model, part, split)[:, :-1][chosen[:, 1:]]
        theirs = final_hidden(other, part, other_split)[:, :-1][chosen[:, 1:]]
        kl = exact_kl(mine, model.output_matrix, theirs, other.output_matrix, temperature)
        out[rows, : part.tokens.shape[1]] = torch.zeros(part.tokens.shape, device=out.device).masked_scatter(chosen, kl)
    return out
