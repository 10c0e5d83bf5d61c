"""Training the reward model on grouped pairs (Ouyang et al. 2022, eq. 1)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accord.checkpoints import Checkpoints
from accord.data.records import PairGroup
from accord.data.statistics import Estimate, bootstrap_ratio
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.nn.weights import sampled_fingerprint
from accord.progress import bar, console, safe_point, stop_requested
from accord.reward.model import RewardModel
from accord.reward.settings import RewardSettings
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import trunk_of

SAVE_EVERY = 60.0
"""Seconds between two checkpoints. When they are written changes nothing of what is computed."""
KEPT = "The reward model's training is kept: give the same command again, or go on with the run by accord resume."


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
    checkpoints: Checkpoints | None = None,
) -> tuple[RewardModel, RewardReport]:
    """Fit a reward model on the policy's trunk and measure it on held-out prompts.

    The K completions of a prompt stay together: K forward passes serve all their pairs, and the group's
    loss is divided by its pairs. The trunk's activations are computed once and kept.

    Args:
        checkpoints: where training is saved once a minute and where a stop is asked for; it goes on from the newest, with the
            numbers an uninterrupted training would have had.

    Raises:
        UserError: there are no pairs, a gradient is not finite, or the checkpoints are of another training.
    """
    if not train or not heldout:
        raise UserError(f"Reward training needs pairs to train on ({len(train)} prompts) and to hold out ({len(heldout)}).")
    fit = _Fit(RewardModel.on(policy, settings.top_layers, settings.seed), settings)
    about = {"settings": settings.model_dump(exclude={"micro_batch_tokens"}), "model": sampled_fingerprint(fit.reward.network)}
    about["pairs"] = digest([*train, *heldout])
    if checkpoints:
        fit.restore(checkpoints, about)
    reward, kept, saved = fit.reward, len(fit.losses), time.monotonic()
    sets = [_Encoded.of(reward, groups, label) for groups, label in ((train, "Trunk"), (heldout, "Trunk held-out"))]
    each = math.ceil(len(train) / settings.prompts_per_step)
    steps = settings.epochs * each
    with bar("Reward model", steps) as progress:
        progress.advance(len(fit.losses))
        for step in range(kept, steps):
            if checkpoints and step > kept and (stop_requested() or time.monotonic() - saved >= SAVE_EVERY):
                checkpoints.save(step, fit.tensors(), {**about, "losses": fit.losses}, None)
                kept, saved = step, time.monotonic()
            safe_point(KEPT if checkpoints else "Nothing is kept of the reward model.")
            order = np.random.default_rng([settings.seed, step // each]).permutation(len(train))
            fit.step(sets[0], np.array_split(order, each)[step % each].tolist(), _schedule(step, steps))
            progress.advance(1, f"loss {np.mean(fit.losses[-20:]):.3f}")
    reward.scalar.requires_grad_(False)
    train_scores = sets[0].scores(reward)
    reward.mean, reward.scale = float(train_scores.mean()), max(float(train_scores.std()), 1e-6)
    return reward, _report(reward, sets, train_scores, fit.losses)


def digest(groups: Sequence[PairGroup]) -> str:
    """Equal for equal prompts, completions and pairs in the same order."""
    found = hashlib.sha256()
    for g in groups:
        found.update(json.dumps([g.prompt.id, g.prompt.content, [[c.text, c.finished, c.tokens] for c in g.completions], g.pairs]).encode())
    return found.hexdigest()[:16]


class _Fit:
    """What changes while a reward model is trained, and so what a checkpoint holds: its trained layers, Adam, the losses."""

    def __init__(self, reward: RewardModel, settings: RewardSettings) -> None:
        self.reward, self.settings = reward, settings
        self.losses: list[float] = []
        self._parameters = reward.scalar.trainable()
        self._adam = torch.optim.AdamW(
            list(self._parameters.values()), lr=0.0, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
        )
        self._budget = TokenBudget(settings.micro_batch_tokens)

    def step(self, encoded: _Encoded, prompts: list[int], rate: float) -> None:
        """One optimizer step over these prompts' groups. ``rate``: of the learning rate."""
        halved = self._budget.halved
        loss = self._budget.fit(lambda tokens: self._gradients(encoded, prompts, tokens))
        if self._budget.halved > halved:
            console.print(f"[bold yellow]Memory ran out[/]; micro-batches now have {self._budget.tokens} tokens. The gradient is the same.", soft_wrap=True)  # fmt: skip
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise UserError(f"Reward training: the gradient is not finite at step {len(self.losses)}; lower learning_rate.")
        for group in self._adam.param_groups:
            group["lr"] = self.settings.learning_rate * rate
        self._adam.step()
        self.losses.append(loss)

    def _gradients(self, encoded: _Encoded, prompts: list[int], tokens: int) -> float:
        """Accumulate the gradient of the mean over the prompts from nothing; returns that mean."""
        total = 0.0
        self._adam.zero_grad(set_to_none=True)
        for part in encoded.micro_batches(prompts, tokens):
            rows, groups, offsets = encoded.batch(part)
            loss = pair_loss(self.reward.raw_scores(rows), groups, offsets) * (len(part) / len(prompts))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def tensors(self) -> dict[str, Tensor]:
        out = {f"reward/{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            out |= {f"optimizer/{name}/{key}": torch.as_tensor(value) for key, value in self._adam.state[p].items()}
        return out

    def restore(self, checkpoints: Checkpoints, about: Mapping[str, Any]) -> None:
        """Take over the newest checkpoint, if there is one.

        Raises:
            UserError: it is of other settings, another model or other pairs.
        """
        saved = checkpoints.newest()
        if saved is None:
            return
        before = saved.about
        changed = [
            f"{n} (it was {v}, it is {about['settings'].get(n)})" for n, v in before["settings"].items() if about["settings"].get(n) != v
        ]
        changed += [f"the {name}" for name in ("model", "pairs") if before[name] != about[name]]
        if changed:
            raise UserError(
                f"{checkpoints.root} holds a training that was begun with something else: {', '.join(changed)}. Put that back to go on "
                "with it, or delete that folder to start over."
            )
        for name, p in self._parameters.items():
            p.data.copy_(saved.tensors[f"reward/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self._adam.state[p] = {key: saved.tensors[f"optimizer/{name}/{key}"].to(p.device, copy=True) for key in keys}
        self.losses = list(before["losses"])
        console.print(f"Going on with the reward model at step {saved.step}.")


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
                safe_point(KEPT)
                part = rows.select(index)
                rows.trunk[index, : part.tokens.shape[1]] = trunk_of(start, part, cut)
                progress.advance(len(index))
        sizes = [len(group.completions) for group in groups]
        return cls(groups, rows, [0, *np.cumsum(sizes)[:-1].tolist()])

    def micro_batches(self, indices: list[int], tokens: int) -> list[list[int]]:
        """The prompts in their order, cut where their rows would have more padded tokens than that; a prompt stays whole."""
        parts: list[list[int]] = []
        rows = widest = 0
        for i in indices:
            count = len(self.groups[i].completions)
            longest = int(self.rows.lengths[self.offsets[i] : self.offsets[i] + count].max())
            rows, widest = rows + count, max(widest, longest)
            if parts and rows * widest <= tokens:
                parts[-1].append(i)
            else:
                parts.append([i])
                rows, widest = count, longest
        return parts

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
