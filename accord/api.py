"""The Python calls; the commands are these and nothing more."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accord.checkpoints import until_done
from accord.config import FeedbackSettings, RLSettings, SampleSettings, build
from accord.data.pairs import group_pairs, scored_by_rank
from accord.data.records import Completion, Logged, PairGroup, Prompt, RankedCompletions, hold_out, split_of
from accord.data.sources import read_completions, read_logged, read_prompts, read_rankings
from accord.disk import append_lines, repair_lines, write_lines
from accord.errors import UserError, needs
from accord.evaluation.compare import Comparison, EvaluationSettings
from accord.evaluation.compare import evaluate as _evaluate
from accord.evaluation.report import write_report
from accord.feedback.panel import simulated_panel
from accord.nn import scratch
from accord.nn.loading import resolve_dtype
from accord.nn.transformer import Transformer
from accord.nn.weights import sampled_fingerprint
from accord.planning.models import look
from accord.planning.plan import Plan
from accord.planning.reinforcement import plan_for_rl
from accord.planning.reward import Ranked, plan_reward
from accord.progress import bar, console, safe_point
from accord.reward.model import RewardModel, not_computed
from accord.reward.settings import RewardSettings
from accord.reward.sources import Reward, RewardModelSource, build_reward
from accord.reward.training import RewardReport, train_reward_model, usable
from accord.rl.algorithms import check_model
from accord.rl.trainer import Outcome, check_offline, check_start, train
from accord.rollout.engine import Engine
from accord.rollout.environments import Environment, checked, make_environment
from accord.rollout.episodes import play
from accord.rollout.guides import Perturb
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling
from accord.runs import Run, refuse_existing
from accord.supervised.reading import Unread

CHUNK = 64
"""Prompts sampled and written together; the unit in which sampling is resumed."""


def load(name: str = "smollm2-135m-instruct", dtype: str = "auto") -> Policy:
    """Open the bundled model, a local Hugging Face folder or a Hugging Face id."""
    return Policy.load(name, dtype)


def sample(
    policy: Policy, prompts: Sequence[Prompt], on_chunk: Any = None, *, reference: Policy | None = None, **settings: Any
) -> list[Completion]:
    """K completions of each prompt, in the order of the prompts.

    Args:
        on_chunk: called with the completions of every 64 prompts as they are done.
        reference: sample from this policy moved by ``strength`` times what ``policy`` has learned since, logit by logit:
            z_ref + strength * (z - z_ref). 0 is the reference, 1 the policy, above 1 is further than it went.
        settings: fields of :class:`accord.config.SampleSettings`, such as ``per_prompt=4``.
    """
    s = build(SampleSettings, settings, "sample")
    guide = perturbed(policy, reference, s.strength)
    engine, out = Engine(policy, s.rows), []
    with bar("Sampling", len(prompts) * s.per_prompt) as progress:
        tokens, clock = 0, time.perf_counter()

        def advance(done: int, new: int) -> None:
            nonlocal tokens
            tokens += new
            if done:
                progress.advance(done, f"{tokens / (time.perf_counter() - clock):.0f} tokens/s")

        for start in range(0, len(prompts), CHUNK):
            safe_point(f"Completions are written {CHUNK} prompts at a time; those that were are kept.")
            chunk = engine.sample(prompts[start : start + CHUNK], s.per_prompt, s.sampling(), on_progress=advance, guide=guide)
            out.extend(chunk.completions())
            if on_chunk is not None:
                on_chunk(chunk.completions())
    return out


def perturbed(policy: Policy, reference: Policy | None, strength: float) -> Perturb | None:
    """The guide that moves a reference by ``strength`` times what the policy has learned; None without a reference."""
    if reference is None:
        if strength != 1:
            raise UserError("strength says how far to move from a reference to the model; give the reference too.")
        return None
    if reference.tokenizer.fingerprint != policy.tokenizer.fingerprint:
        raise UserError("The model and its reference have different tokenizers; take the model it was trained from.")
    if reference.model.output_matrix.shape[0] != policy.model.output_matrix.shape[0] or reference.context < policy.context:
        raise UserError("The reference has fewer tokens or a shorter context than the model; take the model it was trained from.")
    return Perturb(reference.model, 0, strength)


def by_prompt(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    """The K completions of each prompt, by its id."""
    groups: dict[str, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.prompt.id, []).append(completion)
    return groups


def label(completions: Mapping[str, Sequence[Completion]], store: str | Path = "labels.db", **settings: Any) -> RankedCompletions:
    """People rank completions on a page; returns when enough of them are ranked.

    Args:
        completions: by prompt id (:func:`by_prompt`).
        store: where labels are kept; what is there already counts.
        settings: of :class:`accord.config.FeedbackSettings`: ``overlap``, ``enough``, ``accounts``, ``host``, ``port``.

    Raises:
        UserError: the page cannot be served, or ``accord[label]`` is not installed.
    """
    wanted = build(FeedbackSettings, {**settings, "labelers": "web"}, "label")
    with needs("label"):
        from accord.feedback.web.collect import collect
    rankings = collect(str(store), completions, wanted)
    ranked = {r.prompt_id for r in rankings}
    return RankedCompletions({key: list(group) for key, group in completions.items() if key in ranked}, rankings)


def rank(completions: Mapping[str, Sequence[Completion]], store: str | Path, settings: FeedbackSettings) -> RankedCompletions:
    """People rank (:func:`label`), or the simulated panel does, as the settings say."""
    if settings.labelers == "web":
        return label(completions, store, **settings.model_dump(exclude={"labelers"}))
    return simulated_panel(settings.panel, settings.seed).rank({key: list(group) for key, group in completions.items()})


def train_reward(
    policy: Policy,
    pairs: Sequence[PairGroup] | RankedCompletions,
    *,
    heldout: float = 0.15,
    labeler_weights: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> tuple[RewardModel, RewardReport]:
    """Train a reward model on the policy's trunk; prompts are split by id into training and held-out ones.

    Args:
        pairs: groups (``read_pairs(file)``) or what the feedback stage gave.
        heldout: share of the prompts that is held out to measure on.
        labeler_weights: what each labeler's rankings count for (``accord.labeler_weights(rankings)``); with rankings only.
        out: a new folder to save it in. Training is then saved beside it on the way (``OUT.training``), and the same call goes on
            from there.
        settings: fields of :class:`accord.reward.settings.RewardSettings`.
    """
    s = build(RewardSettings, settings, "reward")
    if out is not None:
        out = refuse_reward(Path(out))
    if isinstance(pairs, RankedCompletions):
        groups = group_pairs(pairs.completions, pairs.rankings, s.fail_weight, labeler_weights)
    elif labeler_weights is not None:
        raise UserError("Labelers' weights weigh rankings; pairs have no labelers any more.")
    else:
        groups = list(pairs)
    kept, held = without(groups, heldout)
    return train_reward_model(policy, kept, held, s) if out is None else save_reward(out, policy, kept, held, s)


def without(groups: Sequence[PairGroup], heldout: float) -> tuple[list[PairGroup], list[PairGroup]]:
    """Those to train on, and the share, by prompts' ids, that is held out.

    Raises:
        UserError: it is no share.
    """
    if not 0 < heldout < 1:
        raise UserError(f"heldout is {heldout:g}; it is a share of the prompts, above 0 and below 1.")
    out = {g.prompt.id for g in groups if split_of(g.prompt.id, 0.0, heldout) == "heldout"}
    return [g for g in groups if g.prompt.id not in out], [g for g in groups if g.prompt.id in out]


def plan_reward_run(model: str, groups: Sequence[PairGroup], heldout: float, settings: RewardSettings) -> Plan:
    """Of ``accord reward``.

    Raises:
        UserError: there are too few pairs, a prompt or completion that the model cannot read, or a model that accord does not compute itself.
    """
    looked = look(model)
    if looked is None:
        raise not_computed(f"that of the model {model}")
    config, tokenizer = looked
    reader = Unread.of(config, tokenizer)
    ranked = Ranked.of(reader, *usable(*without(groups, heldout), settings))
    return plan_reward(config, resolve_dtype("auto", reader.device), settings, ranked)


def save_reward(
    out: Path,
    policy: Policy,
    train: Sequence[PairGroup],
    heldout: Sequence[PairGroup],
    settings: RewardSettings,
    again: bool = False,
    allow_changes: bool = False,
) -> tuple[RewardModel, RewardReport]:
    """Train a reward model, or go on with what ``OUT.training`` holds of it, and save it in ``out``.

    Args:
        again: ``out`` may be there, of an attempt that ended before this was known to be done.
        allow_changes: start over where what is held was begun with something else.
    """
    with until_done(beside(out)) as checkpoints:
        if out.exists() and not again:  # another process has been faster
            raise _there_already(out)
        model, report = train_reward_model(policy, train, heldout, settings, checkpoints, allow_changes)
        model.save(out, report.to_json())
    return model, report


def beside(out: Path) -> Path:
    """Where the checkpoints of a reward model are while it is trained."""
    return out.with_name(out.name + ".training")


def refuse_reward(out: Path) -> Path:
    """The absolute path of a new reward model. What a process left that ended after it had saved it is dropped.

    Raises:
        UserError: there is something already; a reward model is never saved over another.
    """
    out = out.expanduser().resolve()
    if out.exists():
        if out.name:  # which / has not
            with suppress(UserError), until_done(beside(out)):  # not while another process is at it, nor what is not ours
                pass
        raise _there_already(out)
    return out


def _there_already(out: Path) -> UserError:
    return UserError(f"{out} already exists; choose another --out or delete it.")


def train_rl(
    policy: Policy,
    prompts: Sequence[Prompt] | str | Path | None = None,
    reward: Any = None,
    *,
    environment: str | Environment | None = None,
    completions: str | Path | Sequence[Logged] | RankedCompletions | None = None,
    out: str | Path | None = None,
    validation: Sequence[Prompt] | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    **settings: Any,
) -> Outcome:
    """Train the policy by reinforcement learning from scores; the aligned policy is in the outcome.

    Args:
        reward: a :class:`RewardModel`, a function ``(prompts, completions) -> scores``, a folder,
            ``module:function``, ``classifier:NAME``, or a list of these with weights (``0.5*NAME``).
        environment: where episodes come from (:mod:`accord.rollout.environments`): its name or the object. It brings
            its prompts and its reward; ``reward`` is added to it.
        completions: what an offline algorithm (ilql) learns from: completions with scores, or with rankings, or a file.
            ``reward`` and ``validation`` are then only for the validation score.
        out: run folder, new; by default ``runs/rl-DATE-TIME``.
        validation: prompts for the validation score; by default a tenth of ``prompts``, by id.
        resume: go on with the run in ``out``, if there is one: the same call, repeated until it ends, is the whole run.
        allow_changes: go on although settings, prompts or reward are not those the run was started with; its history says so.
        settings: fields of :class:`accord.rl.settings.RLSettings`, such as ``kl_target=6.0``.
    """
    s = build(RLSettings, settings, "rl")
    if resume and out is None:
        raise UserError("resume goes on with the run in a folder; name it: out='runs/mine'.")
    world = make_environment(environment) if isinstance(environment, str) else environment and checked(environment)
    s = for_model(s, policy)
    check_offline(s, completions is not None)
    logged = logged_completions(completions)
    if completions is not None and prompts is not None:
        raise UserError("Logged completions bring their prompts; give either, not both.")
    given = [] if completions is not None else start_prompts(world, prompts, s)
    if completions is not None:
        validation = validation_of(reward, world, validation)
    elif world is not None and validation is None:
        validation = given
    elif validation is None:
        given, validation = hold_out(given, lambda p: p.id, s.prompts_per_step)
    if s.dtype != "auto" and resolve_dtype(s.dtype) != policy.model.compute_dtype:
        raise UserError(f"The policy was loaded in another dtype than {s.dtype}; give it to load(): accord.load(name, '{s.dtype}').")
    folder = Path(out) if out is not None else Path("runs") / time.strftime("rl-%Y%m%d-%H%M%S")
    resume = resume and (folder / "config.yaml").is_file()
    if not resume:
        refuse_existing(folder)
    start = policy.frozen()
    check_start(start, given, validation or [], s, world, logged)
    source = judge(reward, start, s, world, logged)
    config = {"command": "rl", "model": policy.source, "rl": s.model_dump()}
    try:
        run = Run.go_on(folder, config, allow_changes) if resume else Run.create(folder, config)
    except UserError:
        source.close()
        raise
    try:
        return run_rl(run, start, given, source, s, validation, world, logged)
    finally:
        run.close()


def judge(reward: Any, start: Policy, settings: RLSettings, environment: Environment | None, logged: Sequence[Logged]) -> Reward:
    """What scores completions. With logged ones, which have their scores, there may be no other."""
    if logged and reward is None and environment is None:
        return Reward([])
    own = environment.name if environment else None
    return build_reward(reward, start, settings.reward_timeout, own, settings.reward_memory)


def validation_of(reward: Any, environment: Environment | None, validation: Sequence[Prompt] | None) -> list[Prompt]:
    """The validation prompts of offline training: those given, or the environment's; none where nothing could score them."""
    if environment is not None:
        return list(environment.prompts() if validation is None else validation)
    if validation and reward is None:
        raise UserError("Validation prompts need a reward that scores their completions; give one, or leave them out.")
    if reward is not None and not validation:
        raise UserError("The log has its scores; a reward is for the validation only, so give validation prompts too, or leave it out.")
    return list(validation or [])


def logged_completions(given: str | Path | Sequence[Logged] | RankedCompletions | None, rankings: str | None = None) -> list[Logged]:
    """Completions with scores: as given, or of a file, or by how they were ranked."""
    if given is None:
        if rankings:
            raise UserError("--rankings speak of completions; give them too: --completions FILE.")
        return []
    if isinstance(given, RankedCompletions):
        return _compared(scored_by_rank(given.completions, given.rankings))
    if isinstance(given, (str, Path)):
        if not rankings:
            return read_logged(given)
        return _compared(scored_by_rank(read_completions(given, with_tokens=False), read_rankings(rankings)))
    return list(given)


def _compared(scored: list[Logged]) -> list[Logged]:
    if not scored:
        raise UserError("The rankings compare no two completions, so no scores follow from them.")
    return scored


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
    logged: Sequence[Logged] = (),
) -> Outcome:
    """Train within an open run, save the aligned policy to its ``policy/``, and close the reward."""
    try:
        run.agree("inputs", digests(policy, prompts, reward, validation, environment), "to read")
        outcome = train(policy, prompts, reward, settings, run, validation, environment, logged)
    finally:
        reward.close()
    outcome.policy.save(run.folder / "policy")
    return outcome


def digests(
    policy: Policy, prompts: Sequence[Prompt], reward: Reward, validation: Sequence[Prompt], environment: Environment | None
) -> dict[str, str]:
    """What a run learns from: its model, prompts and reward models by digest, its rewards and environment by name. Functions may
    be mended on the way."""

    def of(some: Sequence[Prompt]) -> str:
        return hashlib.sha256(json.dumps([[p.id, p.content] for p in some]).encode()).hexdigest()[:16]

    found = {"model": sampled_fingerprint(policy.model), "prompts": of(prompts), "validation": of(validation)}
    for number, (weight, source) in enumerate(reward.sources, 1):
        what = sampled_fingerprint(source.model.scalar) if isinstance(source, RewardModelSource) else source.name
        found[f"reward {number}"] = f"{weight:g}*{what}"
    if environment is not None:
        found["environment"] = environment.name
    return found


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


def sample_to(path: Path, policy: Policy, prompts: Sequence[Prompt], reference: Policy | None = None, **settings: Any) -> int:
    """Write completions to a JSONL file, 64 prompts at a time; prompts that are in it already are left out."""
    if path.suffix != ".jsonl":
        raise UserError(f"{path} does not end in .jsonl, which is what is written, and what can be read again; give --out {path}.jsonl.")
    path.parent.mkdir(parents=True, exist_ok=True)
    repair_lines(path)
    have = read_completions(path) if path.exists() and path.stat().st_size else {}
    s = build(SampleSettings, settings, "sample")
    per_prompt, mark = s.per_prompt, {"sampling": sampling_mark(policy, reference, s)}
    if have and first_row(path).get("sampling", mark["sampling"]) != mark["sampling"]:
        raise UserError(f"{path} was sampled from another model or with other settings; choose another --out.")
    last = next(reversed(have), None)
    if last is not None and len(have[last]) < per_prompt and all(len(have[key]) == per_prompt for key in have if key != last):
        have.pop(last)  # a write that was cut in the middle of a prompt: that prompt is sampled again
        write_lines(path, ({**c.to_json(), "tokens": c.tokens, **mark} for group in have.values() for c in group))
    odd = next((key for key, group in have.items() if len(group) != per_prompt), None)
    if odd is not None:
        raise UserError(f"{path} holds {len(have[odd])} completions of '{odd}', not {per_prompt}; choose another --out.")
    todo = [p for p in prompts if p.id not in have]

    def append(chunk: list[Completion]) -> None:
        append_lines(path, ({**c.to_json(), "tokens": c.tokens, **mark} for c in chunk))

    if todo:
        sample(policy, todo, append, reference=reference, **settings)
    return sum(len(group) for group in have.values()) + len(todo) * per_prompt


def sampling_mark(policy: Policy, reference: Policy | None, settings: SampleSettings) -> str:
    """Equal for completions that were sampled alike: by the weights of model and reference, wherever they are, and the settings."""
    models = tuple(sampled_fingerprint(p.model) for p in (policy, reference) if p)
    about = (models, settings.model_dump(exclude={"per_prompt", "rows"}))
    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]


def first_row(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as handle:
        row: dict[str, Any] = json.loads(handle.readline())
    return row


@dataclass
class Prepared:
    """Everything ``accord rl`` needs, opened and checked before a run folder exists."""

    settings: RLSettings
    policy: Policy
    prompts: list[Prompt]
    validation: list[Prompt]
    reward: Reward
    environment: Environment | None = None
    logged: Sequence[Logged] = ()


def prepare_rl(config: dict[str, Any], where: str, planned: bool = False) -> Prepared:
    """Open what a run's ``config.yaml`` names: model, prompts or environment, reward.

    Args:
        planned: print what the run will need, and refuse it if it cannot fit, before the model is read.
    """
    world = make_environment(config["environment"]) if config.get("environment") else None
    offline = bool(config.get("completions") or config.get("rankings"))
    needed = ("model", "rl") if world is not None or offline else ("model", "prompts", "reward", "rl")
    missing = next((key for key in needed if not config.get(key)), None)
    if missing:
        raise UserError(
            f"{where} has no '{missing}': the run was started from Python, and goes on there, by the same train_rl(...) with resume=True."
        )
    settings = build(RLSettings, config["rl"], where)
    check_offline(settings, offline)
    logged = logged_completions(config.get("completions"), config.get("rankings"))
    if offline and config.get("prompts"):
        raise UserError("--completions bring their prompts; leave out --prompts (validation prompts are --validation).")
    prompts = [] if offline else start_prompts(world, config.get("prompts"), settings)
    if offline:
        given = read_prompts(config["validation"]) if config.get("validation") else None
        validation = validation_of(config.get("reward"), world, given)
    elif config.get("validation"):
        validation = read_prompts(config["validation"])
    elif world is not None:
        validation = world.prompts()
    else:
        prompts, validation = hold_out(prompts, lambda p: p.id, settings.prompts_per_step)
    if planned and config["model"] == scratch.NAME:  # a megabyte, and its pace is the environment's
        console.print(f"[dim]{settings.arithmetic()}[/]", soft_wrap=True)
    elif planned:
        untimed = world is not None or offline
        announce(settings, plan_for_rl(config["model"], settings, [*prompts, *validation], config.get("reward") or [], untimed))
    policy = load_start(config["model"], settings.dtype, world)
    settings = for_model(settings, policy)
    check_start(policy, prompts, validation, settings, world, logged)
    reward = judge(config.get("reward"), policy, settings, world, logged)
    return Prepared(settings, policy, prompts, validation, reward, world, logged)


def plan_rl_run(config: dict[str, Any], where: str) -> tuple[RLSettings, Plan | None]:
    """Settings and plan of a run of ``accord rl`` with prompts, of what its ``config.yaml`` says."""
    if config.get("environment") or config.get("completions"):
        raise UserError(f"{where} is of an environment or of a log: accord rl prints its memory when it starts; its time only a try tells.")
    settings = build(RLSettings, config["rl"], where)
    prompts = start_prompts(None, config.get("prompts"), settings)
    return settings, plan_for_rl(config["model"], settings, prompts, config.get("reward") or [])


def announce(settings: RLSettings | None, plan: Plan | None) -> None:
    """Print the batch sizes of reinforcement learning and what the run will need.

    Raises:
        UserError: it needs more memory than there is.
    """
    if settings is not None:
        console.print(f"[dim]{settings.arithmetic()}[/]", soft_wrap=True)
    if plan is None:
        console.print("[dim]accord does not compute this model itself, so it cannot tell beforehand what it will need.[/]", soft_wrap=True)
        return
    plan.show()
    plan.check()


def for_model(settings: RLSettings, policy: Policy) -> RLSettings:
    """The settings as they are used with this model: of one made from scratch nothing is worth freezing.

    Raises:
        UserError: the algorithm or the adaptation does not go with it.
    """
    check_model(settings, policy)
    if policy.source != scratch.NAME:
        small = (
            isinstance(policy.model, Transformer)
            and policy.model.depth < settings.top_layers == RLSettings.model_fields["top_layers"].default
        )
        return (
            settings.model_copy(update={"adaptation": "full", "top_layers": policy.model.depth})
            if small and settings.adaptation == "auto"
            else settings
        )
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
    outcome = run_rl(run, p.policy, p.prompts, p.reward, p.settings, p.validation, p.environment, p.logged)
    write_report(run.folder)
    return outcome
