"""Training the reward model on grouped pairs (Ouyang et al. 2022, eq. 1)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from accord.checkpoints import Checkpoints, adam_state, load_adam_state, under
from accord.data.batching import packs
from accord.data.records import PairGroup
from accord.data.statistics import Estimate, bootstrap_ratio
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.nn.weights import sampled_fingerprint
from accord.progress import bar, console, safe_point, several, stop_requested
from accord.reward.comparison import RATE, Comparison, differences, length_slope
from accord.reward.model import RewardModel
from accord.reward.probe import TICKS, fit_probe
from accord.reward.settings import RewardSettings
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import trunk_of

SAVE_EVERY = 60.0
"""Seconds between two checkpoints. When they are written changes nothing of what is computed."""
KEPT = "The reward model's training is kept."


@dataclass(frozen=True)
class RewardReport:
    """How well held-out preferences are predicted.

    Attributes:
        accuracy: share of held-out pair weight ordered rightly; equal scores count half.
        probe: what training began with (:func:`accord.reward.probe.fit_probe`): its ``strength``, its cross-validated ``log_loss`` on the
            training pairs, and its own held-out ``accuracy``; None if it began by chance.
        calibration_error: expected calibration error of sigmoid(difference), ten bins.
        bins: (mean predicted probability, share that came true, pairs) for each bin.
        log_loss: of the held-out pairs, by sigmoid(difference).
        ties: with a model that knows ties: its ``threshold`` (nu, lambda), and the ``predicted`` and actual ``share`` of ties among
            the held-out comparisons.
        length_slope: how much longer completions are preferred in the training pairs (:func:`length_slope`).
        follows_length: how much the scores do: share of the held-out pairs of unequal length whose longer one has the higher score; None where all are of equal length.
    """

    accuracy: Estimate
    probe: dict[str, Any] | None
    train_accuracy: float
    calibration_error: float
    log_loss: float
    bins: list[tuple[float, float, float]]
    losses: list[float]
    train_groups: int
    heldout_groups: int
    heldout_pairs: int
    ties: dict[str, float] | None
    length_slope: float
    follows_length: Estimate | None

    def to_json(self) -> dict[str, Any]:
        follows = self.follows_length and self.follows_length.to_json()
        return {**self.__dict__, "accuracy": self.accuracy.to_json(), "follows_length": follows}


def train_reward_model(
    policy: Policy,
    train: Sequence[PairGroup],
    heldout: Sequence[PairGroup],
    settings: RewardSettings,
    checkpoints: Checkpoints | None = None,
    allow_changes: bool = False,
) -> tuple[RewardModel, RewardReport]:
    """Fit a reward model on the policy's trunk and measure it on held-out prompts.

    The K completions of a prompt stay together: K forward passes serve all their pairs, and the group's
    loss is divided by its pairs. The trunk's activations are computed once and kept.

    Args:
        checkpoints: where training is saved once a minute and where a stop is asked for; it goes on from the newest, with the
            numbers an uninterrupted training would have had.
        allow_changes: start over where the checkpoints are of another training.

    Raises:
        UserError: there are no pairs, a gradient is not finite, or the checkpoints are of another training.
    """
    train, heldout = usable(train, heldout, settings)
    fit = Fit(RewardModel.on(policy, settings.top_layers, settings.seed), train, settings)
    about = {
        "settings": settings.model_dump(exclude={"micro_batch_tokens"}),
        "model": f"{sampled_fingerprint(fit.reward.network)} {policy.model.compute_dtype}",
        "training pairs": digest(train),
        "held-out pairs": digest(heldout),
    }
    if checkpoints:
        fit.restore(checkpoints, about, allow_changes)
    told = KEPT if fit.losses else "Nothing of the reward model has been trained yet."
    fitted, measured = (
        Encoded.of(fit.reward, groups, label, fit.budget, told) for groups, label in ((train, "Trunk"), (heldout, "Trunk held-out"))
    )
    return fit.reward, fit.run(fitted, measured, checkpoints, about)


def usable(train: Sequence[PairGroup], heldout: Sequence[PairGroup], settings: RewardSettings) -> tuple[list[PairGroup], list[PairGroup]]:
    """Those that say something.

    Raises:
        UserError: there are no pairs to train on or to hold out, or the settings train nothing.
    """
    train, heldout = ([g for g in groups if g.pairs or (g.ties and settings.ties != "drop")] for groups in (train, heldout))
    if not settings.epochs and not settings.probe:
        raise UserError("Reward training of 0 epochs without a probe would train nothing; set epochs to 1, or probe to true.")
    if not any(g.pairs for g in train) or not any(g.pairs for g in heldout):
        raise UserError(
            f"Reward training needs pairs to train on (of {several(len(train), 'prompt')}) and to hold out (of {several(len(heldout), 'prompt')}; by id). "
            "Rank more prompts, some dozens at least, or hold out another share of them (heldout)."
        )
    return train, heldout


def digest(groups: Sequence[PairGroup]) -> str:
    """Equal for equal prompts, completions and pairs in the same order."""
    found = hashlib.sha256()
    for g in groups:
        completions = [[c.text, c.finished, c.tokens] for c in g.completions]
        found.update(json.dumps([g.prompt.id, g.prompt.content, completions, g.pairs, g.ties, g.weight]).encode())
    return found.hexdigest()[:16]


class Fit:
    """What changes while a reward model is trained, and so what a checkpoint holds: its trained layers, the tie parameter, Adam, the losses.

    Args:
        groups: what it is going to be trained on; the tie parameter begins with their share of ties.
    """

    def __init__(self, reward: RewardModel, groups: Sequence[PairGroup], settings: RewardSettings) -> None:
        tied, told = (sum(p.weight for g in groups for p in getattr(g, name)) for name in ("ties", "pairs"))
        self.reward, self.settings = reward, settings
        self.comparison = comparison = Comparison(settings, tied / (tied + told))
        self.losses: list[float] = []
        self.probe: dict[str, Any] | None = None
        layers = reward.scalar.trainable()
        extra = {f"comparison/{name}": p for name, p in comparison.to(reward.network.device).named_parameters()}
        self._parameters = {**layers, **extra}
        self._adam = torch.optim.AdamW(
            [
                {"params": list(layers.values()), "rate": settings.learning_rate, "weight_decay": settings.weight_decay},
                {"params": list(extra.values()), "rate": RATE, "weight_decay": 0.0},
            ],
            lr=0.0, betas=(0.9, 0.98), fused=True,
        )  # fmt: skip
        self.budget = TokenBudget(settings.micro_batch_tokens)

    def run(
        self, train: Encoded, heldout: Encoded, checkpoints: Checkpoints | None = None, about: Mapping[str, Any] | None = None
    ) -> RewardReport:
        """All of the training, from where it stands.

        Args:
            about: what a checkpoint says of where it is from.
        """
        settings, kept, saved = self.settings, len(self.losses), time.monotonic()
        slope = length_slope(train.groups, train.lengths)
        if settings.length_control:
            train = replace(train, added=slope * train.rows.response_lengths.float().log())
        if settings.probe and not self.losses:
            self.begin(train, heldout)
        each = math.ceil(len(train.groups) / settings.prompts_per_step)
        steps = settings.epochs * each
        with bar("Reward model", steps) as progress:
            progress.advance(len(self.losses))
            for epoch in range(kept // each, settings.epochs):
                order = np.random.default_rng([settings.seed, epoch]).permutation(len(train.groups))
                for batch in np.array_split(order, each)[len(self.losses) - epoch * each :]:
                    step = len(self.losses)
                    if checkpoints and step > kept and (stop_requested() or time.monotonic() - saved >= SAVE_EVERY):
                        checkpoints.save(step, self.tensors(), {**(about or {}), **self.about()}, None)
                        kept, saved = step, time.monotonic()
                    safe_point(KEPT if checkpoints and step else "Nothing is kept of the reward model.")
                    self.step(train, batch.tolist(), _schedule(step, steps))
                    progress.advance(1, f"loss {np.mean(self.losses[-20:]):.3f}")
        self.reward.scalar.requires_grad_(False)
        scores = train.each(self.reward.raw_scores, self.budget)
        self.reward.mean, self.reward.scale = float(scores.mean()), max(float(scores.std()), 1e-6)
        return self._report(train, heldout, scores, slope)

    @torch.no_grad()
    def begin(self, train: Encoded, heldout: Encoded) -> None:
        """Set the head to the probe of the untrained layers."""
        states = train.each(self.reward.states, self.budget)
        if not bool(torch.isfinite(states).all()):
            raise UserError(
                "Reward training: the starting model's own states are not finite; its weights are damaged, or its precision is too low."
            )
        added = None if train.added is None else train.added[train.rows_of(range(len(train.groups)))]
        with torch.enable_grad(), bar("Probe", TICKS) as progress:

            def tick() -> None:
                progress.advance(1)
                safe_point("Nothing is kept of the reward model.")

            probe = fit_probe(states, train.groups, _starts(train.groups), added, self.settings.seed, tick)
        self.reward.scalar.head.weight.copy_(probe.weight[None])
        self.reward.scalar.head.bias.fill_(probe.bias)
        accuracy = _accuracy(heldout.compared(heldout.each(self.reward.raw_scores, self.budget)))
        self.probe = {"strength": probe.strength, "log_loss": probe.log_loss, "accuracy": accuracy.to_json()}

    def step(self, encoded: Encoded, prompts: list[int], rate: float) -> None:
        """One optimizer step over these prompts' groups. ``rate``: of the learning rate."""
        halved = self.budget.halved
        loss = self.budget.fit(lambda tokens: self._gradients(encoded, prompts, tokens))
        if self.budget.halved > halved:
            console.print(f"[bold yellow]Memory ran out[/]; micro-batches now have {self.budget.tokens} tokens. The gradient is the same.", soft_wrap=True)  # fmt: skip
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise UserError(f"Reward training: the gradient is not finite at step {len(self.losses)}; lower learning_rate.")
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * rate
        self._adam.step()
        self.losses.append(loss)

    def _gradients(self, encoded: Encoded, prompts: list[int], tokens: int) -> float:
        """Accumulate the gradient of the mean over the prompts from nothing; returns that mean."""
        total = 0.0
        self._adam.zero_grad(set_to_none=True)
        for part in encoded.micro_batches(prompts, tokens):
            rows, groups, offsets = encoded.batch(part)
            scores = self.reward.raw_scores(rows)
            if encoded.added is not None:
                scores = scores + encoded.added[encoded.rows_of(part)].to(scores.device)
            loss = self.comparison.loss(scores, groups, offsets) * (len(part) / len(prompts))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _report(self, train: Encoded, heldout: Encoded, train_scores: Tensor, slope: float) -> RewardReport:
        scores = heldout.each(self.reward.raw_scores, self.budget)
        fitted, told = train.compared(train_scores), heldout.compared(scores)
        gaps, weights = np.array([c.difference for c in told]), np.array([c.weight for c in told])
        bins, error = calibration(gaps, weights)
        unequal = [c for c in told if c.longer != 0 and c.difference != 0]
        longer = [c.weight * float((c.difference > 0) == (c.longer > 0)) for c in unequal]
        return RewardReport(
            accuracy=_accuracy(told),
            probe=self.probe,
            train_accuracy=float(np.average([_right(c) for c in fitted], weights=[c.weight for c in fitted])),
            calibration_error=error,
            log_loss=float(np.average(np.logaddexp(0, -gaps), weights=weights)),
            bins=bins,
            losses=self.losses,
            train_groups=len(train.groups),
            heldout_groups=len(heldout.groups),
            heldout_pairs=len(told),
            ties=None if self.settings.ties == "drop" else _ties(self.comparison, told, heldout.compared(scores, ties=True)),
            length_slope=slope,
            follows_length=bootstrap_ratio(longer, [c.weight for c in unequal], [c.prompt for c in unequal]) if unequal else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        out = {f"reward/{name}": p.detach() for name, p in self._parameters.items()}
        return out | {f"optimizer/{name}": t for name, t in adam_state(self._adam, self._parameters).items()}

    def about(self) -> dict[str, Any]:
        return {"losses": self.losses, "probe": self.probe, "micro_batch_tokens": self.budget.tokens if self.budget.halved else None}

    def restore(self, checkpoints: Checkpoints, about: Mapping[str, Any], allow_changes: bool) -> None:
        """Take over the newest checkpoint, if there is one.

        Raises:
            UserError: it is of other settings, another model or other pairs, and changes are not allowed.
        """
        saved = checkpoints.newest()
        if saved is None:
            return
        before = saved.about
        settings = {"probe": False, **before["settings"]}  # there was a time without one
        changed = [f"{n} (it was {v}, it is {about['settings'].get(n)})" for n, v in settings.items() if about["settings"].get(n) != v]
        changed += [f"the {name}" for name in ("model", "training pairs", "held-out pairs") if before.get(name) != about[name]]
        if changed and allow_changes:
            console.print(
                f"The reward model is trained from its start: it was begun with something else ({', '.join(changed)}).", soft_wrap=True
            )
            checkpoints.forget()
            return
        if changed:
            raise UserError(
                f"{checkpoints.root} holds a training that was begun with something else: {', '.join(changed)}. Put that back to go on "
                "with it, or delete that folder to start over."
            )
        for name, p in self._parameters.items():
            p.data.copy_(saved.tensors[f"reward/{name}"])
        load_adam_state(self._adam, self._parameters, under("optimizer/", saved.tensors))
        self.losses, self.probe = list(before["losses"]), before.get("probe")
        self.budget.tokens = min(self.budget.tokens, before["micro_batch_tokens"] or self.budget.tokens)
        console.print(f"Going on with the reward model at step {saved.step}.")


def _schedule(step: int, steps: int) -> float:
    """Warm up over the first tenth, then fall linearly to a tenth."""
    warm = max(steps // 10, 1)
    return (step + 1) / warm if step < warm else 1 - 0.9 * (step - warm) / max(steps - warm, 1)


@dataclass
class Encoded:
    """Groups with the trunk's activations of their completions.

    Attributes:
        rows: of the completions; those of group g begin at ``offsets[g]``. There may be others among them.
        added: (N,) what length adds to each raw score while the reward model is trained.
    """

    groups: Sequence[PairGroup]
    rows: Rollout
    offsets: list[int]
    added: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, reward: RewardModel, groups: Sequence[PairGroup], label: str, budget: TokenBudget, told: str) -> Encoded:
        completions = [c for group in groups for c in group.completions]
        rows = reward.encode(completions)
        start, cut = reward.network, reward.scalar.cut
        rows.trunk_cut = cut
        rows.trunk = trunk = torch.zeros(*rows.tokens.shape, start.config.hidden_size, dtype=start.dtype, device=start.device)

        def fill(tokens: int) -> None:
            with bar(label, len(rows)) as progress:
                for index in rows.micro_batches(tokens):
                    safe_point(told)
                    part = rows.select(index)
                    trunk[index, : part.tokens.shape[1]] = trunk_of(start, part, cut)
                    progress.advance(len(index))

        budget.fit(fill)
        return cls(groups, rows, _starts(groups))

    def subset(self, indices: Sequence[int]) -> Encoded:
        """Some of the groups, with the same rows."""
        return Encoded([self.groups[i] for i in indices], self.rows, [self.offsets[i] for i in indices], self.added)

    def micro_batches(self, indices: Sequence[int], tokens: int) -> list[list[int]]:
        """:func:`accord.data.batching.packs` of the prompts."""
        own = self.rows.lengths.tolist()
        count = lambda i: len(self.groups[i].completions)
        return packs(indices, count, lambda i: max(own[self.offsets[i] : self.offsets[i] + count(i)]), tokens)

    def batch(self, indices: list[int]) -> tuple[Rollout, list[PairGroup], list[int]]:
        groups = [self.groups[i] for i in indices]
        return self.rows.select(self.rows_of(indices)), groups, _starts(groups)

    def rows_of(self, indices: Sequence[int]) -> Tensor:
        """The rows of these groups' completions."""
        return torch.tensor([self.offsets[i] + k for i in indices for k in range(len(self.groups[i].completions))])

    @property
    def lengths(self) -> list[list[int]]:
        """Response tokens of each group's completions."""
        own = self.rows.response_lengths.tolist()
        return [own[at : at + len(g.completions)] for g, at in zip(self.groups, self.offsets, strict=True)]

    @torch.no_grad()
    def each(self, tell: Callable[[Rollout], Tensor], budget: TokenBudget) -> Tensor:
        """(n,...) what is told of the rows, a micro-batch at a time: of the first group's completions, then the second's."""

        def work(tokens: int) -> Tensor:
            parts = self.micro_batches(range(len(self.groups)), tokens)
            return torch.cat([tell(self.batch(part)[0]).float() for part in parts])

        return budget.fit(work)

    def compared(self, scores: Tensor, ties: bool = False) -> list[_Compared]:
        """Every pair, or every tie. ``scores``: (n,) as :meth:`each` gives them."""
        lengths = self.lengths
        return [
            _Compared(group.prompt.id, d, pair.weight, math.log(own[pair.preferred] / own[pair.other]))
            for group, at, own in zip(self.groups, _starts(self.groups), lengths, strict=True)
            if (some := group.ties if ties else group.pairs)
            for pair, d in zip(some, differences(scores, some, at).tolist(), strict=True)
        ]


def _starts(groups: Sequence[PairGroup]) -> list[int]:
    """Where each group's completions begin, one group after the other."""
    return [0, *np.cumsum([len(group.completions) for group in groups])[:-1].tolist()]


class _Compared(NamedTuple):
    prompt: str
    difference: float  # of the scores, preferred minus other
    weight: float
    longer: float  # log of the preferred's length over the other's


def calibration(gaps: np.ndarray, weights: np.ndarray) -> tuple[list[tuple[float, float, float]], float]:
    """Ten bins of (mean predicted probability, share that came true, weight), and the expected calibration error.

    Args:
        gaps: (P,) the preferred's score minus the other's. Each pair is one event, told from the side predicted likelier.
        weights: (P,)
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(gaps))), np.where(gaps == 0, 0.5, gaps > 0)
    bins, error = [], 0.0
    place = np.clip(np.digitize(confidence, np.linspace(0.5, 1.0, 11)) - 1, 0, 9)
    for b in range(10):
        inside = place == b
        if weights[inside].sum() > 0:
            said = float(np.average(confidence[inside], weights=weights[inside]))
            came = float(np.average(right[inside], weights=weights[inside]))
            bins.append((said, came, float(weights[inside].sum())))
            error += abs(said - came) * float(weights[inside].sum() / weights.sum())
    return bins, error


def _right(c: _Compared) -> float:
    return 0.5 if c.difference == 0 else float(c.difference > 0)


def _accuracy(compared: list[_Compared]) -> Estimate:
    return bootstrap_ratio([c.weight * _right(c) for c in compared], [c.weight for c in compared], [c.prompt for c in compared])


def _ties(comparison: Comparison, pairs: list[_Compared], ties: list[_Compared]) -> dict[str, float]:
    every = [*pairs, *ties]
    weights = np.array([c.weight for c in every])
    chances = torch.exp(-comparison.tied(torch.tensor([c.difference for c in every], device=comparison.threshold.device))).cpu().numpy()
    tied = sum(c.weight for c in ties)
    return {
        "threshold": float(comparison.threshold),
        "predicted": float(np.average(chances, weights=weights)),
        "share": tied / weights.sum(),
    }
