"""Runs of ``accord sft``, ``prefer`` and ``pretrain``: from files or records to a run folder with a policy and a report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from accord.api import announce, load
from accord.config import build
from accord.data.pairs import grouped_pairs
from accord.data.records import Example, PairGroup, RankedCompletions, hold_out
from accord.data.sources import iter_texts, read_examples, read_pairs, text_files
from accord.disk import file_digest
from accord.errors import UserError
from accord.evaluation.report import write_report
from accord.feedback.given import Given
from accord.nn.bundled import cache_folder
from accord.nn.loading import model_folder, resolve_dtype
from accord.nn.transformer import ModelConfig
from accord.nn.weights import sampled_fingerprint
from accord.planning.models import Weights, look
from accord.planning.plan import Plan
from accord.planning.supervised import Work, plan_tuning, work_of_examples, work_of_pairs
from accord.pretraining.language import Language, new_config, new_policy
from accord.pretraining.settings import PretrainSettings
from accord.pretraining.tokens import Tokens
from accord.progress import console, several
from accord.rollout.policy import Policy
from accord.runs import Run, refuse_existing
from accord.supervised.comparisons import Comparisons
from accord.supervised.examples import Encoded
from accord.supervised.imitation import Imitation
from accord.supervised.preference import Preference
from accord.supervised.reading import Reader, Unread
from accord.supervised.settings import HELD_OUT, LoopSettings, PreferenceSettings, SFTSettings, TuningSettings
from accord.supervised.training import Task, Tuned, tune
from accord.text.tokenizer import Tokenizer


def train_sft(
    policy: Policy,
    examples: Sequence[Example] | str | Path,
    *,
    out: str | Path | None = None,
    validation: Sequence[Example] | str | Path | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    **settings: Any,
) -> Tuned:
    """Supervised fine-tuning: teach the policy to answer as the examples do; the taught policy is in what comes back.

    Args:
        examples: what :func:`accord.read_examples` gives, or a file for it.
        out: run folder, new; by default ``runs/sft-DATE-TIME``.
        validation: examples that are measured on and not learned from; by default a tenth of ``examples``, by id.
        resume: go on with the run in ``out``, if there is one: the same call, repeated until it ends, is the whole run.
        allow_changes: go on although settings or examples are not those the run was started with; its history says so.
        settings: fields of :class:`accord.supervised.settings.SFTSettings`, such as ``epochs=2``.

    Raises:
        UserError: an example does not fit the model, the folder exists, or the run was started with something else.
    """
    s = build(SFTSettings, settings, "sft")

    def task(start: Policy) -> Task:
        given = read_examples(examples) if isinstance(examples, (str, Path)) else list(examples)
        held = read_examples(validation) if isinstance(validation, (str, Path)) else validation
        return imitation(start, given, held, s)

    return _train("sft", policy, s, task, out, resume, allow_changes)


def train_preference(
    policy: Policy,
    pairs: Sequence[PairGroup] | RankedCompletions | str | Path,
    *,
    out: str | Path | None = None,
    validation: Sequence[PairGroup] | str | Path | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    **settings: Any,
) -> Tuned:
    """Learn from preferences without reinforcement learning (DPO, IPO, KTO, ORPO, SimPO); the policy is in what comes back.

    Args:
        pairs: what :func:`accord.read_pairs` gives, a file for it, or what the feedback stage gave.
        out: run folder, new; by default ``runs/prefer-DATE-TIME``.
        validation: pairs that are measured on and not learned from; by default those of a tenth of the prompts, by id.
        resume, allow_changes: as in :func:`train_sft`.
        settings: fields of :class:`accord.supervised.settings.PreferenceSettings`, such as ``loss="ipo"``.

    Raises:
        UserError: a completion does not fit the model, the folder exists, or the run was started with something else.
    """
    s = build(PreferenceSettings, settings, "prefer")

    def task(start: Policy) -> Task:
        if isinstance(pairs, RankedCompletions):
            given = grouped_pairs(pairs, s.fail_weight)
        else:
            given = read_pairs(pairs) if isinstance(pairs, (str, Path)) else list(pairs)
        held = read_pairs(validation) if isinstance(validation, (str, Path)) else validation
        return preference(start, given, held, s)

    return _train("prefer", policy, s, task, out, resume, allow_changes)


def pretrain(
    tokenizer: str | Path,
    text: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    validation: Sequence[str | Path] = (),
    most: int | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    **settings: Any,
) -> Tuned:
    """Train a language model from nothing; the policy is in what comes back.

    Args:
        tokenizer: folder of one (``accord tokenizer``), or of a model.
        text: files, folders and ``hf:`` datasets (:func:`accord.data.sources.iter_texts`).
        out: run folder, new; by default ``runs/pretrain-DATE-TIME``.
        validation: texts that are measured on and not learned from; by default some of ``text``.
        most: documents of each source.
        resume, allow_changes: as in :func:`train_sft`.
        settings: fields of :class:`accord.pretraining.settings.PretrainSettings`, such as ``size="15m"``.

    Raises:
        UserError: there is no text, the folder exists, or the run was started with something else.
    """
    s = build(PretrainSettings, settings, "pretrain")
    folder, resume = folder_of("pretrain", out, resume)
    config = {
        "command": "pretrain", "tokenizer": str(tokenizer), "text": list(map(str, text)), "validation": list(map(str, validation)),
        "most": most, "pretrain": s.model_dump(),
    }  # fmt: skip
    return carry_out(folder, config, prepare(config, "pretrain"), resume, allow_changes)


def _train(
    command: str,
    policy: Policy,
    settings: TuningSettings,
    task: Callable[[Policy], Task],
    out: str | Path | None,
    resume: bool,
    allow_changes: bool,
) -> Tuned:
    if settings.dtype != "auto" and resolve_dtype(settings.dtype) != policy.model.compute_dtype:
        raise UserError(f"The policy was loaded in another dtype than {settings.dtype}; give it to load(): accord.load(name, '{settings.dtype}').")  # fmt: skip
    folder, resume = folder_of(command, out, resume)
    start = policy.frozen()
    prepared = Prepared(settings, start, adapted(start, settings), task(start))
    return carry_out(folder, {"command": command, "model": policy.source, command: settings.model_dump()}, prepared, resume, allow_changes)


def folder_of(command: str, out: str | Path | None, resume: bool) -> tuple[Path, bool]:
    """Where a run is, and whether it is there already."""
    if resume and out is None:
        raise UserError("resume goes on with the run in a folder; name it: out='runs/mine'.")
    folder = Path(out) if out is not None else Path("runs") / time.strftime(f"{command}-%Y%m%d-%H%M%S")
    resume = resume and (folder / "config.yaml").is_file()
    if not resume:
        refuse_existing(folder)
    return folder, resume


def carry_out(folder: Path, config: dict[str, Any], prepared: Prepared, resume: bool, allow_changes: bool) -> Tuned:
    """Run it, or go on with it. ``config``: what the folder's ``config.yaml`` says."""
    run = Run.go_on(folder, config, allow_changes) if resume else Run.create(folder, config)
    try:
        return finish(run, prepared)
    finally:
        run.close()


def imitation(reader: Reader, examples: Sequence[Example], validation: Sequence[Example] | None, settings: SFTSettings) -> Imitation:
    """The task of ``accord sft``. ``validation``: None holds out a tenth of the examples (:func:`accord.data.records.hold_out`)."""
    if validation is not None:
        held = Encoded(reader, validation, settings.max_tokens, "validation examples") if validation else None
        return Imitation(Encoded(reader, examples, settings.max_tokens), held, settings)
    every = Encoded(reader, examples, settings.max_tokens)
    kept, out = hold_out(every.rows, lambda row: row.id, settings.examples_per_step, HELD_OUT)
    return Imitation(every.only(kept), every.only(out) if out else None, settings)


def compared(
    reader: Reader, pairs: Sequence[PairGroup], validation: Sequence[PairGroup] | None, settings: PreferenceSettings
) -> tuple[Comparisons, Comparisons | None]:
    """What ``accord prefer`` learns from and is measured on. ``validation``: None holds out the pairs of a tenth of the prompts
    (:func:`accord.data.records.hold_out`)."""
    if validation is not None:
        held = Comparisons(reader, validation, settings.max_tokens, "validation pairs") if validation else None
        return Comparisons(reader, pairs, settings.max_tokens), held
    every = Comparisons(reader, pairs, settings.max_tokens)
    kept, out = hold_out(every.judged, lambda one: one.group.prompt.id, settings.prompts_per_step, HELD_OUT)
    return every.only(kept), every.only(out) if out else None


def preference(policy: Policy, pairs: Sequence[PairGroup], validation: Sequence[PairGroup] | None, settings: PreferenceSettings) -> Preference:  # fmt: skip
    """The task of ``accord prefer`` (:func:`compared`)."""
    return Preference(policy, *compared(policy, pairs, validation, settings), settings)


@dataclass
class Prepared:
    """Everything a run needs, opened and checked before its folder exists.

    Attributes:
        start: what the run begins with, and the reference.
        policy: what trains.
    """

    settings: LoopSettings
    start: Policy
    policy: Policy
    task: Task


def prepare(config: Mapping[str, Any], where: str, planned: bool = False) -> Prepared:
    """Open what a run's ``config.yaml`` names: model, and examples or preferences.

    Args:
        planned: print what the run will need, and refuse it if it cannot fit, before the model is read.
    """
    ready = _read(config, where)
    if planned:
        announce(None, ready.plan())
    return ready.prepared()


def plan_tuning_run(config: Mapping[str, Any], where: str) -> Plan | None:
    """Of a run of what its ``config.yaml`` says; None for a model that accord does not compute itself."""
    return _read(config, where).plan()


class Ready(NamedTuple):
    """A run whose rows are read and checked, and whose weights are not."""

    plan: Callable[[], Plan | None]
    prepared: Callable[[], Prepared]


def _read(config: Mapping[str, Any], where: str) -> Ready:
    command = str(config["command"])
    of = {"sft": "examples", "prefer": "pairs", "pretrain": "text"}[command]
    if not config.get(of) and not (command == "prefer" and (config.get("rankings") or config.get("store"))):
        call = {"sft": "train_sft", "prefer": "train_preference", "pretrain": "pretrain"}[command]
        raise UserError(f"{where} has no '{of}': the run was started from Python, and goes on there, by the same {call}(...) with resume=True.")  # fmt: skip
    for key in (command, "tokenizer" if command == "pretrain" else "model"):
        if not config.get(key) and not (key == command and config.get(key) == {}):
            raise UserError(f"{where} has no '{key}'; a run's config.yaml has.")
    if command == "pretrain":
        return _language(config, where)
    if command == "sft":
        return _examples(config, build(SFTSettings, config["sft"], where))
    return _pairs(config, build(PreferenceSettings, config["prefer"], where))


def _examples(config: Mapping[str, Any], s: SFTSettings) -> Ready:
    examples = read_examples(config["examples"])
    held = read_examples(config["validation"]) if config.get("validation") else None
    shape, reader, start = _opened(config["model"], s)
    task = imitation(reader, examples, held, s)

    def prepared() -> Prepared:
        policy = start()
        return Prepared(s, policy, adapted(policy, s), task)

    work = work_of_examples(task.train.rows, task.heldout.rows if task.heldout else [], s)
    return Ready(lambda: _plan("SFT", shape, s, work), prepared)


def _pairs(config: Mapping[str, Any], s: PreferenceSettings) -> Ready:
    groups = Given(*map(config.get, Given._fields)).groups(s.fail_weight)
    validation = read_pairs(config["validation"]) if config.get("validation") else None
    shape, reader, start = _opened(config["model"], s)
    train, held = compared(reader, groups, validation, s)

    def prepared() -> Prepared:
        policy = start()
        return Prepared(s, policy, adapted(policy, s), Preference(policy, train, held, s))

    work = work_of_pairs(train.judged, held.judged if held else [], s)
    return Ready(lambda: _plan(s.loss.upper(), shape, s, work), prepared)


def _plan(name: str, shape: ModelConfig | None, s: TuningSettings, work: Work) -> Plan | None:
    return None if shape is None else plan_tuning(name, shape, s, work)


def _opened(model: str, s: TuningSettings) -> tuple[ModelConfig | None, Reader, Callable[[], Policy]]:
    """A model's shape, whose tokens rows are put in, and how its weights are read; one that accord does not compute itself is read now."""
    looked = look(model)
    if looked is None:
        policy = load(model, s.dtype)
        return None, policy, lambda: policy
    shape, tokenizer = looked
    return shape, Unread.of(shape, tokenizer), lambda: load(model, s.dtype)


def _language(config: Mapping[str, Any], where: str) -> Ready:
    settings = build(PretrainSettings, config["pretrain"], where)
    folder = Path(config["tokenizer"])
    tokenizer = Tokenizer.load(folder if folder.is_dir() else model_folder(config["tokenizer"]))
    most = config.get("most")
    text = corpus(config["text"], tokenizer, most)
    if config.get("validation"):
        train, held = text.whole(), corpus(config["validation"], tokenizer, most).whole()
    else:
        train, held = text.split()
    shape = new_config(tokenizer, settings)[1]
    weights = Weights.of(shape).total
    task = Language(train, held, settings)
    console.print(
        f"{weights / 1e6:.1f} M weights; {several(len(text), 'document')}, "
        f"{train.told / 1e6:.2f} M tokens ({train.bytes / train.told:.2f} bytes each); {task.steps} steps of {settings.tokens_per_step} tokens.",
        soft_wrap=True,
    )  # fmt: skip
    row = task.each / len(task.train)
    work = Work(task.steps, settings.tokens_per_step, row, row - 1, float(task.heldout.sizes.sum()))

    def prepared() -> Prepared:
        start = new_policy(tokenizer, settings)
        return Prepared(settings, start, start, task)

    return Ready(lambda: plan_tuning("pretraining", shape, settings, work), prepared)


def corpus(sources: Sequence[str], tokenizer: Tokenizer, most: int | None) -> Tokens:
    """Texts in tokens, kept in accord's cache: files by what is in them, datasets by their names.

    Raises:
        UserError: there is no text.
    """
    about = [*map(str, sources), *map(file_digest, text_files(sources)), tokenizer.digest, most]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return Tokens.of(iter_texts(sources, most), tokenizer, cache_folder() / f"tokens-{key}", key)


def adapted(start: Policy, settings: TuningSettings) -> Policy:
    """A policy that starts from ``start`` and of which that trains which the settings say."""
    top = settings.top_layers if settings.adaptation == "split" else 1  # where nothing is split off it means nothing
    return start.adapt(settings.adaptation, top, settings.lora_rank, settings.lora_alpha, settings.seed)


def finish(run: Run, prepared: Prepared) -> Tuned:
    """Train, or go on training, and write policy and report."""
    run.agree("inputs", {"model": sampled_fingerprint(prepared.start.model), **prepared.task.digests}, "to read")
    tuned = tune(prepared.policy, prepared.task, prepared.settings, run)
    tuned.policy.save(run.folder / "policy")
    write_report(run.folder)
    if prepared.start is prepared.policy:  # a model from nothing: from here on it is what others start from
        tuned.policy = replace(tuned.policy, model=tuned.policy.model.requires_grad_(False), adaptation="frozen")
    return tuned
