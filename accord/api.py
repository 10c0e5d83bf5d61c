"""The Python calls; the commands are these and nothing more."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accord.config import RLSettings, SampleSettings, build
from accord.data.pairs import grouped_pairs
from accord.data.records import Completion, PairGroup, Prompt, RankedCompletions, split_of
from accord.data.sources import read_completions, read_prompts, write_jsonl
from accord.errors import UserError
from accord.evaluation.compare import Comparison, EvaluationSettings
from accord.evaluation.compare import evaluate as _evaluate
from accord.evaluation.report import write_report
from accord.nn import scratch
from accord.nn.loading import resolve_dtype
from accord.progress import bar, safe_point
from accord.reward.model import RewardModel
from accord.reward.settings import RewardSettings
from accord.reward.sources import Reward, build_reward
from accord.reward.training import RewardReport, train_reward_model
from accord.rl.algorithms import check_model
from accord.rl.trainer import Outcome, check_start, train
from accord.rollout.engine import Engine
from accord.rollout.environments import Environment, checked, make_environment
from accord.rollout.episodes import play
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling
from accord.runs import Run, refuse_existing, repair_lines

CHUNK = 64
"""Prompts sampled and written together; the unit in which sampling is resumed."""


def load(name: str = "smollm2-135m-instruct", dtype: str = "auto") -> Policy:
    """Open the bundled model, a local Hugging Face folder or a Hugging Face id."""
    return Policy.load(name, dtype)


def sample(policy: Policy, prompts: Sequence[Prompt], on_chunk: Any = None, **settings: Any) -> list[Completion]:
    """K completions of each prompt, in the order of the prompts.

    Args:
        on_chunk: called with the completions of every 64 prompts as they are done.
        settings: fields of :class:`accord.config.SampleSettings`, such as ``per_prompt=4``.
    """
    s = build(SampleSettings, settings, "sample")
    engine, out = Engine(policy, s.rows), []
    with bar("Sampling", len(prompts) * s.per_prompt) as progress:
        tokens, clock = 0, time.perf_counter()

        def advance(done: int, new: int) -> None:
            nonlocal tokens
            tokens += new
            if done:
                progress.advance(done, f"{tokens / (time.perf_counter() - clock):.0f} tokens/s")

        for start in range(0, len(prompts), CHUNK):
            safe_point("Completions so far are written.")
            chunk = engine.sample(prompts[start : start + CHUNK], s.per_prompt, s.sampling(), on_progress=advance)
            out.extend(chunk.completions())
            if on_chunk is not None:
                on_chunk(chunk.completions())
    return out


def by_prompt(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    """The K completions of each prompt, by its id."""
    groups: dict[str, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.prompt.id, []).append(completion)
    return groups


def train_reward(
    policy: Policy, pairs: Sequence[PairGroup] | RankedCompletions, *, heldout: float = 0.15, **settings: Any
) -> tuple[RewardModel, RewardReport]:
    """Train a reward model on the policy's trunk; prompts are split by id into training and held-out ones.

    Args:
        pairs: groups (``read_pairs(file)``) or what the feedback stage gave.
        heldout: share of the prompts that is held out to measure on.
        settings: fields of :class:`accord.reward.settings.RewardSettings`.
    """
    s = build(RewardSettings, settings, "reward")
    groups = grouped_pairs(pairs, s.fail_weight) if isinstance(pairs, RankedCompletions) else list(pairs)
    held = [g for g in groups if split_of(g.prompt.id, 0.0, heldout) == "heldout"]
    kept = [g for g in groups if split_of(g.prompt.id, 0.0, heldout) != "heldout"]
    return train_reward_model(policy, kept, held, s)


def train_rl(
    policy: Policy,
    prompts: Sequence[Prompt] | str | Path | None = None,
    reward: Any = None,
    *,
    environment: str | Environment | None = None,
    out: str | Path | None = None,
    validation: Sequence[Prompt] | None = None,
    **settings: Any,
) -> Outcome:
    """Train the policy by reinforcement learning from scores; the aligned policy is in the outcome.

    Args:
        reward: a :class:`RewardModel`, a function ``(prompts, completions) -> scores``, a folder,
            ``module:function``, ``classifier:NAME``, or a list of these with weights (``0.5*NAME``).
        environment: where episodes come from (:mod:`accord.rollout.environments`): its name or the object. It brings
            its prompts and its reward; ``reward`` is added to it.
        out: run folder, new; by default ``runs/rl-DATE-TIME``.
        validation: prompts for the validation score; by default a tenth of ``prompts``, by id.
        settings: fields of :class:`accord.rl.settings.RLSettings`, such as ``kl_target=6.0``.
    """
    s = build(RLSettings, settings, "rl")
    world = make_environment(environment) if isinstance(environment, str) else environment and checked(environment)
    s = for_model(s, policy)
    given = start_prompts(world, prompts, s)
    if world is not None and validation is None:
        validation = given
    elif validation is None:
        given, validation = split_validation(given, s.prompts_per_step)
    if s.dtype != "auto" and resolve_dtype(s.dtype) != policy.model.compute_dtype:
        raise UserError(f"The policy was loaded in another dtype than {s.dtype}; give it to load(): accord.load(name, '{s.dtype}').")
    folder = Path(out) if out is not None else Path("runs") / time.strftime("rl-%Y%m%d-%H%M%S")
    refuse_existing(folder)
    start = policy.frozen()
    check_start(start, given, validation or [], s, world)
    source = build_reward(reward, start, s.reward_timeout, world.name if world else None)
    run = Run.create(folder, {"command": "rl", "model": policy.source, "rl": s.model_dump()})
    return run_rl(run, start, given, source, s, validation, world)


def start_prompts(environment: Environment | None, prompts: Sequence[Prompt] | str | Path | None, settings: RLSettings) -> list[Prompt]:
    """The training prompts: those given, or where an environment's episodes start, as often as fills a step."""
    if prompts is not None:
        return read_prompts(prompts) if isinstance(prompts, (str, Path)) else list(prompts)
    if environment is None:
        raise UserError("No prompts given: use --prompts FILE, or --environment NAME, which brings its own.")
    own = environment.prompts()
    return own * -(-settings.prompts_per_step // len(own))


def run_rl(
    run: Run,
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: RLSettings,
    validation: Sequence[Prompt],
    environment: Environment | None = None,
) -> Outcome:
    """Train within an open run, save the aligned policy to its ``policy/``, and close the reward."""
    try:
        outcome = train(policy, prompts, reward, settings, run, validation, environment)
    finally:
        reward.close()
    outcome.policy.save(run.folder / "policy")
    return outcome


def evaluate(aligned: Policy, against: Policy, prompts: Sequence[Prompt], reward: Any = None, **settings: Any) -> Comparison:
    """Compare two policies on the same prompts with the same luck; fields of ``EvaluationSettings`` as settings."""
    if aligned.tokenizer.fingerprint != against.tokenizer.fingerprint:
        raise UserError("The two models have different tokenizers, so their KL is not defined; compare models of one family.")
    s = build(EvaluationSettings, settings, "evaluation")
    source = None if reward is None else build_reward(reward, against.frozen(), s.reward_timeout)
    try:
        return _evaluate(aligned, against, prompts, source, s)
    finally:
        if source is not None:
            source.close()


def sample_to(path: Path, policy: Policy, prompts: Sequence[Prompt], **settings: Any) -> int:
    """Write completions to a JSONL file, 64 prompts at a time; prompts that are in it already are left out."""
    repair_lines(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    have = read_completions(path) if path.exists() and path.stat().st_size else {}
    per_prompt = build(SampleSettings, settings, "sample").per_prompt
    last = next(reversed(have), None)
    if last is not None and len(have[last]) < per_prompt and all(len(have[key]) == per_prompt for key in have if key != last):
        have.pop(last)  # a write that was cut in the middle of a prompt: that prompt is sampled again
        write_jsonl(path, ({**c.to_json(), "tokens": c.tokens} for group in have.values() for c in group))
    odd = next((key for key, group in have.items() if len(group) != per_prompt), None)
    if odd is not None:
        raise UserError(f"{path} holds {len(have[odd])} completions of '{odd}', not {per_prompt}; choose another --out.")
    todo = [p for p in prompts if p.id not in have]

    def append(chunk: list[Completion]) -> None:
        with path.open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps({**c.to_json(), "tokens": c.tokens}, ensure_ascii=False) + "\n" for c in chunk))

    if todo:
        sample(policy, todo, append, **settings)
    return sum(len(group) for group in have.values()) + len(todo) * per_prompt


@dataclass
class Prepared:
    """Everything ``accord rl`` needs, opened and checked before a run folder exists."""

    settings: RLSettings
    policy: Policy
    prompts: list[Prompt]
    validation: list[Prompt]
    reward: Reward
    environment: Environment | None = None


def prepare_rl(config: dict[str, Any], where: str) -> Prepared:
    """Open what a run's ``config.yaml`` names: model, prompts or environment, reward."""
    world = make_environment(config["environment"]) if config.get("environment") else None
    needed = ("model", "rl") if world is not None else ("model", "prompts", "reward", "rl")
    missing = next((key for key in needed if not config.get(key)), None)
    if missing:
        raise UserError(f"{where} has no '{missing}'; only runs that were started with accord rl can be resumed this way.")
    settings = build(RLSettings, config["rl"], where)
    prompts = start_prompts(world, config.get("prompts"), settings)
    if config.get("validation"):
        validation = read_prompts(config["validation"])
    elif world is not None:
        validation = world.prompts()
    else:
        prompts, validation = split_validation(prompts, settings.prompts_per_step)
    policy = load_start(config["model"], settings.dtype, world)
    settings = for_model(settings, policy)
    check_start(policy, prompts, validation, settings, world)
    reward = build_reward(config.get("reward"), policy, settings.reward_timeout, world.name if world else None)
    return Prepared(settings, policy, prompts, validation, reward, world)


def for_model(settings: RLSettings, policy: Policy) -> RLSettings:
    """The settings as they are used with this model: of one made from scratch nothing is worth freezing.

    Raises:
        UserError: the algorithm or the adaptation does not go with it.
    """
    check_model(settings, policy)
    if policy.source != scratch.NAME:
        return settings
    if settings.adaptation not in ("auto", "full"):
        raise UserError(f"The model 'scratch' trains in full; --adaptation {settings.adaptation} would freeze random weights.")
    return settings.model_copy(update={"adaptation": "full", "top_layers": policy.model.depth})


def load_start(name: str, dtype: str, environment: Environment | None) -> Policy:
    """:func:`load`, where ``scratch`` is a small random model for an environment's alphabet."""
    if name != scratch.NAME:
        return load(name, dtype)
    if environment is None:
        raise UserError("The model 'scratch' is made for an environment's alphabet; give --environment, or another model.")
    policy = Policy.load(str(scratch.scratch_folder(environment.alphabet)), "float32" if dtype == "auto" else dtype)
    policy.source = scratch.NAME
    return policy


def play_episodes(policy: Policy, environment: str | Environment, episodes: int = 1000, temperature: float = 1.0, seed: int = 0) -> Rollout:
    """Let a policy play; ``rollout.step_rewards.sum(-1)`` is what each episode gave."""
    world = make_environment(environment) if isinstance(environment, str) else environment
    own = world.prompts()
    prompts = [own[i % len(own)] for i in range(episodes)]
    return play(Engine(policy, 256), world, prompts, 1, Sampling(temperature, seed=seed))


def finish_rl(run: Run, prepared: Prepared) -> Outcome:
    """Train, or go on training, and write policy and report."""
    p = prepared
    outcome = run_rl(run, p.policy, p.prompts, p.reward, p.settings, p.validation, p.environment)
    write_report(run.folder)
    return outcome


def split_validation(prompts: list[Prompt], least: int) -> tuple[list[Prompt], list[Prompt]]:
    """A tenth of the prompts, by id, for validation, unless too few would be left to train on."""
    held = [p for p in prompts if split_of(p.id, 0.1, 0.0) == "validation"]
    kept = [p for p in prompts if split_of(p.id, 0.1, 0.0) != "validation"]
    return (kept, held) if len(kept) >= least else (prompts, [])
