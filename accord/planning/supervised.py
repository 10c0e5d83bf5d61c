"""Supervised training (``accord sft``, ``prefer``, ``pretrain``): what is read, its memory, and the pace of reading and learning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from accord.nn.loading import default_device, resolve_dtype
from accord.nn.logprobs import CHUNK
from accord.nn.transformer import ModelConfig, Transformer
from accord.planning.models import MEASURED, Weights, apart, at_depth, kept_by_a_layer, least, matrices, rollout_of, stand_in
from accord.planning.plan import ADAM, Part, Plan, Stage, resident_memory, with_freed
from accord.supervised.comparisons import Judged
from accord.supervised.examples import Encoding
from accord.supervised.imitation import sft_loss
from accord.supervised.preference import ALONE
from accord.supervised.settings import LoopSettings, PreferenceSettings, SFTSettings, TuningSettings
from accord.supervised.training import State

WORK = 1e11
"""Operations of the forward pass that the pace is measured on, about, and"""
LEAST = 512
"""tokens at least."""
WIDEST = 1024
"""Tokens of a row at most."""


@dataclass(frozen=True)
class Work:
    """What is read.

    Attributes:
        steps: optimizer steps.
        step: tokens of one.
        row: tokens of a row, on the mean.
        told: those of a row whose probability is asked for.
        held: tokens that are held out.
        reference: tokens that the reference reads first.
        beside: tokens that are read in a step and not learned from.
        widest: tokens that are computed together in any case.
    """

    steps: int
    step: float
    row: float
    told: float
    held: float = 0.0
    reference: float = 0.0
    beside: float = 0.0
    widest: float = 0.0

    def measured(self, every: int) -> int:
        """How often what is held out is measured."""
        return 1 + math.ceil(self.steps / every)


def work_of_examples(train: Sequence[Encoding], held: Sequence[Encoding], s: SFTSettings) -> Work:
    """Of ``accord sft``."""
    row = _mean(len(r.tokens) for r in train)
    steps = math.ceil(s.epochs * len(train) / s.examples_per_step)
    told, widest = _mean(sum(r.counted) for r in train), max(len(r.tokens) for r in train)
    return Work(steps, s.examples_per_step * row, row, told, sum(len(r.tokens) for r in held), widest=widest)


def work_of_pairs(train: Sequence[Judged], held: Sequence[Judged], s: PreferenceSettings) -> Work:
    """Of ``accord prefer``: a prompt is read once for its completions, which are computed together; by kto also with the completions of another
    prompt, by policy and reference."""
    tokens = [len(j.prompt) + sum(map(len, j.answers)) for j in (*train, *held)]
    step = s.prompts_per_step * _mean(tokens[: len(train)])
    told = _mean(len(answer) for j in train for answer in j.answers)
    return Work(
        steps=math.ceil(s.epochs * len(train) / s.prompts_per_step),
        step=step,
        row=_mean(len(j.prompt) for j in train) + told,
        told=told,
        held=(3 if s.loss == "kto" else 1) * sum(tokens[len(train) :]),
        reference=0 if s.loss in ALONE else sum(tokens),
        beside=2 * step if s.loss == "kto" else 0,
        widest=max(tokens),
    )


def _mean(numbers: Iterable[int]) -> float:
    found = list(numbers)
    return sum(found) / len(found)


def tuning_memory(config: ModelConfig, dtype: torch.dtype, s: LoopSettings, work: Work) -> list[Part]:
    """Its parts. With settings that know no ``adaptation`` the model is new, and all of it trains."""
    w, e, L, D = Weights.of(config), dtype.itemsize, config.num_hidden_layers, config.hidden_size
    kind = s.adaptation if isinstance(s, TuningSettings) else "new"
    top = min(s.top_layers, L) if isinstance(s, TuningSettings) else L
    rank = s.lora_rank if isinstance(s, TuningSettings) else 0
    lora = sum(rank * sum(shape) for shape in matrices(config)) * L
    trained = {"split": top * w.layer + D, "lora": lora}.get(kind, w.total)
    turned = sum(rows * columns for rows, columns in matrices(config)) * (top if kind == "split" else L) if s.optimizer == "muon" else 0
    moments = 8 * trained - 4 * min(turned, trained)  # Muon keeps one of a matrix
    deep = top if kind == "split" else L
    fixed, each = kept_by_a_layer(config, dtype, max(round(work.row), 1))
    fewer = "use --adaptation split with fewer --top-layers" if kind in ("full", "lora") else "lower --top-layers"
    fewer = "use a smaller --size" if kind == "new" else fewer
    return with_freed([
        Part("Python and torch", resident_memory(), "always", ""),
        Part("the model", 0 if kind == "new" else w.total * e, "always", "use --dtype bfloat16, or a smaller model"),
        Part("trained weights and the optimizer's moments", 4 * trained + moments, "always", fewer),
        Part("gradients", 4 * trained, "updating", fewer),
        Part("what a micro-batch keeps for its backward pass", deep * (fixed + each * max(min(s.micro_batch_tokens, work.step), work.widest)), "updating", "lower --micro-batch-tokens"),
        Part("logits", 2 * CHUNK * config.vocab_size * e, "updating", ""),
    ])  # fmt: skip


@dataclass(frozen=True)
class TuningPace:
    """Seconds of a token that is read, of one that is learned, and of an optimizer step whatever it holds."""

    forward: float
    update: float
    step_fixed: float


def measure_tuning(config: ModelConfig, dtype: torch.dtype, device: torch.device, s: LoopSettings, work: Work) -> TuningPace:
    """Some seconds of the run's own code on random models."""
    kind = s.adaptation if isinstance(s, TuningSettings) else "full"
    fewest = min(s.top_layers, config.num_hidden_layers) if isinstance(s, TuningSettings) and kind == "split" else 1
    return at_depth(
        config,
        dtype,
        device,
        fewest,
        lambda model: _measure(model, s, work),
        dtype.itemsize + (ADAM if kind == "full" else 0),
        2 * MEASURED,
    )


def _measure(model: Transformer, s: LoopSettings, work: Work) -> TuningPace:
    if isinstance(s, TuningSettings):
        policy = stand_in(model).adapt(s.adaptation, min(s.top_layers, model.depth), s.lora_rank, s.lora_alpha, s.seed)
    else:
        policy = stand_in(model).adapt("full", 1, 0, 0.0, s.seed)
    width = min(max(round(work.row), 2), WIDEST, model.config.max_position_embeddings)
    told = min(max(round(work.told), 1), width - 1)
    weights = sum(p.numel() for p in model.parameters())
    most = min(s.micro_batch_tokens, max(int(WORK / (2 * weights)), LEAST), round(work.step))
    count = max(most // width, 1)
    rollout = rollout_of(model, count, width - told, told)
    state = State(policy, s)
    state.optimizer.set_rate(0.0)

    def learn(rows: list[int]) -> None:
        some = rollout.select(torch.tensor(rows))

        def accumulate(tokens: int) -> dict[str, float]:
            loss = sft_loss(policy, some, len(rows) * told)
            loss.backward()  # type: ignore[no-untyped-call]
            return {"loss": float(loss.detach())}

        state.optimizer.take(accumulate)

    def read() -> None:
        with torch.no_grad():
            sft_loss(policy, rollout, 1)

    whole, single = least(lambda: learn(list(range(count))), 4), least(lambda: learn([0]))
    return TuningPace(least(read) / (count * width), *apart(whole, single, count, width))


def tuning_seconds(pace: TuningPace, s: LoopSettings, work: Work) -> float:
    """Optimizer steps, what is held out, and the reference."""
    read = work.measured(s.validate_every) * work.held + work.reference + work.steps * work.beside
    return work.steps * (work.step * pace.update + pace.step_fixed) + read * pace.forward


def tuning_stage(name: str, config: ModelConfig, s: LoopSettings, work: Work) -> Stage:
    """Its time, measured."""
    device = default_device()
    pace = measure_tuning(config, resolve_dtype(s.dtype, device), device, s, work)
    return Stage(name, round(work.steps * work.step), tuning_seconds(pace, s, work))


def plan_tuning(name: str, config: ModelConfig, s: LoopSettings, work: Work) -> Plan:
    """Of one of the three commands."""
    device = default_device()
    plan = Plan.of_memory(tuning_memory(config, resolve_dtype(s.dtype, device), s, work), device)
    return replace(plan, stages=[tuning_stage(name, config, s, work)], samples=False) if plan.fits else plan
