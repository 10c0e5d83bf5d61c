"""Training of a reward model: what is read, its memory, and its pace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from accord.data.records import Completion, Pair, PairGroup, Prompt
from accord.nn.loading import default_device
from accord.nn.memory import give_back_freed_memory
from accord.nn.transformer import ModelConfig
from accord.planning.models import Weights, apart, kept_by_a_layer, least, random_model, rollout_of, stand_in
from accord.planning.plan import ADAM, Part, Plan, Stage, resident_memory, with_freed
from accord.progress import track
from accord.reward.model import RewardModel, check_top_layers, encode_completions
from accord.reward.settings import RewardSettings
from accord.reward.training import Encoded, Fit
from accord.rollout.engine import Reader
from accord.rollout.scoring import trunk_of

MOST = 2048
"""Tokens that the pace is measured on, about, and"""
SHALLOW = 4
"""layers of the trunk: each of them takes as long as any other."""


@dataclass(frozen=True)
class Ranked:
    """What is read. Tokens of a prompt count once for its completions.

    Attributes:
        prompts: training prompts.
        train: their tokens with those of their completions, and ``held`` those of held-out ones.
        slots: places whose activations are kept: of every completion, padded to the longest.
        row: tokens of a completion with its prompt, on the mean.
        each: completions of a prompt, on the mean.
        widest: tokens that are computed together in any case: a prompt's completions.
    """

    prompts: int
    train: float
    held: float
    slots: int
    row: float
    each: float
    widest: int

    @classmethod
    def of(cls, reader: Reader, train: Sequence[PairGroup], held: Sequence[PairGroup]) -> Ranked:
        """Of rankings that are there.

        Raises:
            UserError: a prompt or a completion that the model cannot read.
        """
        every = track([*train, *held], "Reading", len(train) + len(held))
        rows = [[(len(p), len(c)) for p, c in encode_completions(reader, g.completions)] for g in every]
        longest = [max(p + c for p, c in own) for own in rows]
        told = [own[0][0] + sum(c for _, c in own) for own in rows]
        n, count = len(train), sum(map(len, rows))
        slots = sum(sum(map(len, rows[of])) * max(longest[of], default=0) for of in (slice(n), slice(n, None)))
        return cls(
            prompts=n,
            train=sum(told[:n]),
            held=sum(told[n:]),
            slots=slots,
            row=sum(p + c for own in rows for p, c in own) / count,
            each=count / len(rows),
            widest=max(len(own) * most for own, most in zip(rows, longest, strict=True)),
        )

    @classmethod
    def like(cls, train: Sequence[int], held: Sequence[int], each: int, new: int) -> Ranked:
        """Of prompts of so many tokens, each with ``each`` completions of ``new``."""
        n, tokens = len(train) + len(held), sum(train) + sum(held)
        read = [float(sum(some) + len(some) * each * new) for some in (train, held)]
        slots = sum(len(some) * each * (max(some, default=0) + new) for some in (train, held))
        widest = each * (max((*train, *held), default=0) + new)
        return cls(len(train), read[0], read[1], slots, tokens / max(n, 1) + new, each, widest)


def reward_memory(config: ModelConfig, dtype: torch.dtype, s: RewardSettings, ranked: Ranked) -> list[Part]:
    """The parts of ``accord reward``. With no epochs only the head is fitted, to the probe."""
    w, e, top = Weights.of(config), dtype.itemsize, s.top_layers
    fixed, each = kept_by_a_layer(config, dtype, max(round(ranked.row), 1))
    trained = top * w.layer + 2 * config.hidden_size + 1  # the last norm, and the head with its bias
    step = min(s.prompts_per_step, max(ranked.prompts, 1)) * ranked.each * ranked.row
    together = max(min(s.micro_batch_tokens, step), ranked.widest)
    fewer = "lower --micro-batch-tokens" if together > ranked.widest else "give fewer completions a prompt, or shorter ones"
    learning = [
        Part("gradients", 4 * trained, "updating", "lower --top-layers"),
        Part("what a micro-batch keeps for its backward pass", top * (fixed + each * together), "updating", fewer),
    ]
    parts = [
        Part("Python and torch", resident_memory(), "always", ""),
        Part("the model", w.total * e, "always", "use a smaller model"),
        Part("trained layers and Adam's moments", trained * (ADAM - 4 if s.epochs else 4), "always", "lower --top-layers"),
        Part("the trunk's activations of every completion", ranked.slots * config.hidden_size * e, "always", "give fewer prompts, or shorter completions"),
        *(learning if s.epochs else []),
    ]  # fmt: skip
    return with_freed(parts, 0.0)  # measured: nothing samples here (bench/LOG.md)


@dataclass(frozen=True)
class RewardPace:
    """Seconds of a token in the trunk, of one that the top reads, of one that it learns from, and of an optimizer step whatever it holds."""

    trunk: float
    read: float
    update: float
    step_fixed: float


def measure_reward(config: ModelConfig, dtype: torch.dtype, device: torch.device, s: RewardSettings, ranked: Ranked) -> RewardPace:
    """Some seconds of the training's own code on a random model whose trunk has few layers."""
    trunk = config.num_hidden_layers - s.top_layers
    cut = min(trunk, SHALLOW)
    model = random_model(config, cut + s.top_layers, dtype, device)
    width = min(max(round(ranked.row), 2), config.max_position_embeddings)
    each = max(min(round(ranked.each), MOST // width), 2)
    count = max(min(s.prompts_per_step, MOST // (each * width)), 1)
    rows = rollout_of(model, count * each, width - 1, 1)

    def read_trunk() -> torch.Tensor:
        with torch.no_grad():
            return trunk_of(model, rows, cut)

    groups = []
    for i in range(count):
        prompt = Prompt(f"p{i}", "")
        groups.append(PairGroup(prompt, tuple(Completion(prompt, "", False, k) for k in range(each)), (Pair(0, 1),)))
    encoded = Encoded(groups, replace(rows, trunk=read_trunk(), trunk_cut=cut), list(range(0, count * each, each)))
    fit = Fit(RewardModel.on(stand_in(model), s.top_layers, s.seed), groups, s)
    step = lambda prompts: fit.step(encoded, prompts, 0.0)
    whole, single = least(lambda: step(list(range(count))), 3), least(lambda: step([0]), 3)
    tokens = count * each * width
    read = least(lambda: encoded.each(fit.reward.raw_scores, fit.budget)) / tokens
    below = least(read_trunk) / tokens * trunk / max(cut, 1)
    give_back_freed_memory()
    return RewardPace(below, read, *apart(whole, single, count, each * width))


def reward_seconds(pace: RewardPace, s: RewardSettings, ranked: Ranked) -> float:
    """The trunk once for everything, the optimizer steps, and the scores that the probe begins with and the report ends with."""
    everything, steps = ranked.train + ranked.held, s.epochs * math.ceil(ranked.prompts / s.prompts_per_step)
    return everything * (pace.trunk + (1 + s.probe) * pace.read) + s.epochs * ranked.train * pace.update + steps * pace.step_fixed


def reward_stage(config: ModelConfig, dtype: torch.dtype, device: torch.device, s: RewardSettings, ranked: Ranked) -> Stage:
    """Its time, measured."""
    pace = measure_reward(config, dtype, device, s, ranked)
    return Stage("reward model", round(ranked.train * s.epochs), reward_seconds(pace, s, ranked))


def plan_reward(config: ModelConfig, dtype: torch.dtype, s: RewardSettings, ranked: Ranked, timed: bool = True) -> Plan:
    """Of ``accord reward``.

    Raises:
        UserError: more layers are to train than the model has.
    """
    check_top_layers(s.top_layers, config.num_hidden_layers)
    device = default_device()
    plan = replace(Plan.of_memory(reward_memory(config, dtype, s, ranked), device), samples=False)
    return replace(plan, stages=[reward_stage(config, dtype, device, s, ranked)]) if timed and plan.fits else plan
