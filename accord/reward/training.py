"""Training the reward model on grouped pairs (Ouyang et al. 2022, eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accord.data.records import PairGroup
from accord.data.statistics import Estimate, bootstrap_ratio
from accord.errors import UserError
from accord.progress import bar, safe_point
from accord.reward.model import RewardModel
from accord.reward.settings import RewardSettings
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import trunk_of


@dataclass(frozen=True)
class RewardReport:
    """How well held-out preferences are predicted.

    Attributes:
        accuracy: share of held-out pair weight ordered rightly; equal scores count half.
        calibration_error: expected calibration error of sigmoid(difference), ten bins.
        bins: (mean predicted probability, share that came true, pairs) for each bin.
    """

    accuracy: Estimate
    train_accuracy: float
    calibration_error: float
    log_loss: float
    bins: list[tuple[float, float, float]]
    losses: list[float]
    train_groups: int
    heldout_groups: int
    heldout_pairs: int

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "accuracy": self.accuracy.to_json()}


def pair_loss(scores: Tensor, groups: Sequence[PairGroup], offsets: Sequence[int]) -> Tensor:
    """Mean over groups of the weighted mean over a group's pairs of -log sigmoid(r_preferred - r_other).

    Args:
        scores: (N,) raw scores; group g's completions start at ``offsets[g]``.
    """
    total = scores.new_zeros(())
    for group, at in zip(groups, offsets, strict=True):
        better = torch.tensor([at + i for i, _, _ in group.pairs], device=scores.device)
        worse = torch.tensor([at + j for _, j, _ in group.pairs], device=scores.device)
        weight = torch.tensor([w for _, _, w in group.pairs], device=scores.device)
        losses = -F.logsigmoid(scores[better] - scores[worse])
        total = total + (losses * weight).sum() / weight.sum()
    return total / len(groups)


def train_reward_model(
    policy: Policy,
    train: Sequence[PairGroup],
    heldout: Sequence[PairGroup],
    settings: RewardSettings,
) -> tuple[RewardModel, RewardReport]:
    """Fit a reward model on the policy's trunk and measure it on held-out prompts.

    The K completions of a prompt stay together: K forward passes serve all their pairs, and the group's
    loss is divided by its pairs. The trunk's activations are computed once and kept.
    """
    if not train or not heldout:
        raise UserError(f"Reward training needs pairs to train on ({len(train)} prompts) and to hold out ({len(heldout)}).")
    epochs, learning_rate = settings.epochs, settings.learning_rate
    reward = RewardModel.on(policy, settings.top_layers, settings.seed)
    sets = [_Encoded.of(reward, groups, label) for groups, label in ((train, "Trunk"), (heldout, "Trunk held-out"))]
    parameters = list(reward.scalar.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True)
    steps = epochs * math.ceil(len(train) / settings.prompts_per_step)
    losses: list[float] = []
    with bar("Reward model", steps) as progress:
        for epoch in range(epochs):
            order = np.random.default_rng([settings.seed, epoch]).permutation(len(train))
            for batch in np.array_split(order, math.ceil(len(train) / settings.prompts_per_step)):
                safe_point("The reward model is trained again on resume.")
                for g in optimizer.param_groups:
                    g["lr"] = learning_rate * _schedule(len(losses), steps)
                rows, groups, offsets = sets[0].batch(batch.tolist())
                loss = pair_loss(reward.raw_scores(rows), groups, offsets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                if not torch.isfinite(norm):
                    raise UserError(f"Reward training: the gradient is not finite at step {len(losses)}; lower learning_rate.")
                optimizer.step()
                losses.append(float(loss.detach()))
                progress.advance(1, f"loss {np.mean(losses[-20:]):.3f}")
    reward.scalar.requires_grad_(False)
    train_scores = sets[0].scores(reward)
    reward.mean, reward.scale = float(train_scores.mean()), max(float(train_scores.std()), 1e-6)
    return reward, _report(reward, sets, train_scores, losses)


def _schedule(step: int, steps: int) -> float:
    """Warm up over the first tenth, then fall linearly to a tenth."""
    warm = max(steps // 10, 1)
    return (step + 1) / warm if step < warm else 1 - 0.9 * (step - warm) / max(steps - warm, 1)


@dataclass
class _Encoded:
    groups: Sequence[PairGroup]
    rows: Rollout
    offsets: list[int]

    @classmethod
    @torch.no_grad()
    def of(cls, reward: RewardModel, groups: Sequence[PairGroup], label: str) -> _Encoded:
        completions = [c for group in groups for c in group.completions]
        rows = reward.encode(completions)
        start, cut = reward.network, reward.scalar.cut
        rows.trunk_cut = cut
        rows.trunk = torch.zeros(*rows.tokens.shape, start.config.hidden_size, dtype=start.dtype, device=start.device)
        with bar(label, len(rows)) as progress:
            for index in rows.micro_batches(8192):
                safe_point("The reward model is trained again on resume.")
                part = rows.select(index)
                rows.trunk[index, : part.tokens.shape[1]] = trunk_of(start, part, cut)
                progress.advance(len(index))
        sizes = [len(group.completions) for group in groups]
        return cls(groups, rows, [0, *np.cumsum(sizes)[:-1].tolist()])

    def batch(self, indices: list[int]) -> tuple[Rollout, list[PairGroup], list[int]]:
        groups = [self.groups[i] for i in indices]
        rows = [self.offsets[i] + k for i in indices for k in range(len(self.groups[i].completions))]
        sizes = [len(group.completions) for group in groups]
        return self.rows.select(torch.tensor(rows)), groups, [0, *np.cumsum(sizes)[:-1].tolist()]

    def scores(self, reward: RewardModel) -> Tensor:
        return reward.logits(self.rows) + reward.mean

    def differences(self, scores: Tensor) -> list[tuple[str, float, float]]:
        """(prompt id, score of the preferred minus the other, weight) for every pair."""
        out = []
        for group, at in zip(self.groups, self.offsets, strict=True):
            for i, j, w in group.pairs:
                out.append((group.prompt.id, float(scores[at + i] - scores[at + j]), w))
        return out


def _report(reward: RewardModel, sets: list[_Encoded], train_scores: Tensor, losses: list[float]) -> RewardReport:
    train = sets[0].differences(train_scores)
    heldout = sets[1].differences(sets[1].scores(reward))
    gaps = np.array([d for _, d, _ in heldout])
    weights = np.array([w for _, _, w in heldout])
    right = np.where(gaps == 0, 0.5, gaps > 0)
    accuracy = bootstrap_ratio((right * weights).tolist(), weights.tolist(), [p for p, _, _ in heldout])
    # Each pair is one event "the first of the two is preferred"; told from the side predicted likelier.
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    bins, error = [], 0.0
    edges = np.linspace(0.5, 1.0, 11)
    place = np.clip(np.digitize(confidence, edges) - 1, 0, 9)
    for b in range(10):
        inside = place == b
        if weights[inside].sum() > 0:
            said = float(np.average(confidence[inside], weights=weights[inside]))
            came = float(np.average(right[inside], weights=weights[inside]))
            bins.append((said, came, float(weights[inside].sum())))
            error += abs(said - came) * float(weights[inside].sum() / weights.sum())
    train_right = [0.5 if d == 0 else float(d > 0) for _, d, _ in train]
    return RewardReport(
        accuracy=accuracy,
        train_accuracy=float(np.average(train_right, weights=[w for _, _, w in train])),
        calibration_error=error,
        log_loss=float(np.average(np.logaddexp(0, -gaps), weights=weights)),
        bins=bins,
        losses=losses,
        train_groups=len(sets[0].groups),
        heldout_groups=len(sets[1].groups),
        heldout_pairs=len(heldout),
    )
