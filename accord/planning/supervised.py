"""Supervised training (``accord sft``, ``prefer``, ``pretrain``): what is read, its memory, and the pace of reading and learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from accord.data.records import Example, PairGroup, hold_out
from accord.nn.loading import default_device, resolve_dtype
from accord.nn.logprobs import CHUNK
from accord.nn.transformer import ModelConfig, Transformer
from accord.planning.models import MEASURED, Weights, at_depth, kept_by_a_layer, least, look, matrices, rollout_of, stand_in
from accord.planning.plan import ADAM, Part, Plan, Stage, resident_memory, with_freed
from accord.supervised.comparisons import with_pairs
from accord.supervised.examples import encode_example
from accord.supervised.imitation import sft_loss
from accord.supervised.preference import ALONE
from accord.supervised.settings import HELD_OUT, LoopSettings, PreferenceSettings, SFTSettings, TuningSettings
from accord.supervised.training import State
from accord.text.tokenizer import Tokenizer

SOME = 500
"""Rows whose tokens are counted; the others are taken to be like them."""
WORK = 1e11
"""Operations of the forward pass that the pace is measured on, about, and"""
LEAST = 512
"""tokens at least."""
WIDEST = 1024
"""Tokens of a row at most."""
Row = TypeVar("Row")


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
    """

    steps: int
    step: float
    row: float
    told: float
    held: float = 0.0
    reference: float = 0.0

    def measured(self, every: int) -> int:
        """How often what is held out is measured."""
        return 1 + math.ceil(self.steps / every)


def work_of_examples(tokenizer: Tokenizer, examples: Sequence[Example], held: Sequence[Example] | None, s: SFTSettings) -> Work:
    """Of ``accord sft``. ``held``: None holds out a tenth.

    Raises:
        UserError: an example cannot be encoded.
    """
    train, out = hold_out(examples, lambda e: e.id, s.examples_per_step, HELD_OUT) if held is None else (list(examples), list(held))
    rows = [encode_example(tokenizer, example) for example in _some(examples)]
    rows = [row for row in rows if s.max_tokens is None or len(row.tokens) <= s.max_tokens] or rows
    row = sum(len(r.tokens) for r in rows) / len(rows)
    steps = math.ceil(s.epochs * len(train) / s.examples_per_step)
    return Work(steps, s.examples_per_step * row, row, sum(sum(r.counted) for r in rows) / len(rows), len(out) * row)


def work_of_pairs(tokenizer: Tokenizer, groups: Sequence[PairGroup], held: Sequence[PairGroup] | None, s: PreferenceSettings) -> Work:
    """Of ``accord prefer``. ``held``: None holds out those of a tenth of the prompts.

    Raises:
        UserError: there is no pair.
    """
    groups = with_pairs(groups)
    train, out = hold_out(groups, lambda g: g.prompt.id, s.prompts_per_step, HELD_OUT) if held is None else (groups, list(held))
    prompts = answers = rows = 0
    some = _some(groups)
    for group in some:
        prompts += len(tokenizer.encode_prompt(group.prompt.content))
        answers += sum(len(tokenizer.encode_completion(c.text, c.finished)) for c in group.completions)
        rows += len(group.completions)
    each = (prompts + answers) / len(some)  # a prompt is read once for its completions
    told = answers / rows
    steps = math.ceil(s.epochs * len(train) / s.prompts_per_step)
    reference = 0.0 if s.loss in ALONE else (len(train) + len(out)) * each
    return Work(steps, s.prompts_per_step * each, prompts / len(some) + told, told, len(out) * each, reference)


def _some(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[:: max(1, len(rows) // SOME)]


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
        Part("what a micro-batch keeps for its backward pass", deep * (fixed + each * min(s.micro_batch_tokens, work.step)), "updating", "lower --micro-batch-tokens"),
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
    each = max(whole - single, 1e-6) / ((count - 1) * width) if count > 1 else whole / width
    return TuningPace(least(read) / (count * width), each, max(single - each * width, 0.0))


def tuning_seconds(pace: TuningPace, s: LoopSettings, work: Work) -> float:
    """Optimizer steps, what is held out, and the reference."""
    read = work.measured(s.validate_every) * work.held + work.reference
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
    return replace(plan, stages=[tuning_stage(name, config, s, work)]) if plan.fits else plan


def plan_for_sft(model: str, s: SFTSettings, examples: Sequence[Example], held: Sequence[Example] | None) -> Plan | None:
    """Of ``accord sft``; None for a model that accord does not compute itself."""
    looked = look(model)
    return looked and plan_tuning("SFT", looked[0], s, work_of_examples(looked[1], examples, held, s))


def plan_for_preference(model: str, s: PreferenceSettings, groups: Sequence[PairGroup], held: Sequence[PairGroup] | None) -> Plan | None:
    """Of ``accord prefer``; None for a model that accord does not compute itself."""
    looked = look(model)
    return looked and plan_tuning(s.loss.upper(), looked[0], s, work_of_pairs(looked[1], groups, held, s))
