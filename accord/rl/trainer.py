"""Reinforcement learning from scores: the loop that reads as its algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from accord.checkpoints import Saved, under
from accord.data.batching import in_turn
from accord.data.records import Logged, Prompt
from accord.errors import Diverged, UserError
from accord.nn.budget import TokenBudget
from accord.nn.foreign import ForeignModel
from accord.nn.transformer import Transformer
from accord.progress import bar, safe_point, stop_requested, to_the_end
from accord.reward.functions import rejected_rows, told
from accord.reward.model import RewardModel, ScalarModel
from accord.reward.sources import Reward, RewardModelSource
from accord.rl.algorithms import Algorithm, make_algorithm
from accord.rl.experience import Experience, score_rollout
from accord.rl.kl import AdaptiveKL, FixedKL, KLController
from accord.rl.offline import Log
from accord.rl.optimize import PolicyOptimizer
from accord.rl.registry import ALGORITHMS
from accord.rl.selftest import self_test
from accord.rl.settings import RLSettings
from accord.rl.watch import Watch, measure
from accord.rollout.engine import Engine, encode_checked
from accord.rollout.environments import Environment
from accord.rollout.episodes import begin, play
from accord.rollout.guides import Guide
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling

ROLLBACKS = 3
"""Times a run goes back to a checkpoint with half the learning rates before it stops (``on_divergence``)."""
OFFLINE = [name for name, spec in ALGORITHMS.items() if spec.offline]


class Recorder(Protocol):
    """Where a run is written (:class:`accord.runs.Run`)."""

    def log(self, step: int, stats: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None: ...
    def warn(self, step: int, name: str, text: str) -> None: ...
    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], score: float | None) -> None: ...
    def latest(self) -> Saved | None: ...
    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def amend(self, step: int, stats: Mapping[str, float]) -> None: ...


@dataclass
class Outcome:
    """``stopped`` says why: max_steps, stop_at_score or kl_stop."""

    policy: Policy
    stopped: str
    steps: int


def check_offline(settings: RLSettings, logged: bool) -> None:
    """Refuse an offline algorithm without a log, and a log for another."""
    offline = ALGORITHMS[settings.algorithm].offline
    if offline and not logged:
        raise UserError(f"{settings.algorithm} learns offline, so it needs logged completions: give --completions FILE.")
    if logged and not offline:
        raise UserError(f"{settings.algorithm} learns from its own completions; logged ones are for {', '.join(OFFLINE)}.")


def check_start(
    start: Policy,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt],
    settings: RLSettings,
    environment: Environment | None = None,
    logged: Sequence[Logged] = (),
) -> None:
    """Everything that can be refused before a run folder is made and a token is sampled."""
    check_offline(settings, bool(logged))
    if logged:
        Log(logged, start, settings)
    elif len(prompts) < settings.prompts_per_step:
        raise UserError(
            f"{len(prompts)} training prompts are fewer than prompts_per_step ({settings.prompts_per_step}); add prompts or lower it."
        )
    if settings.stop_at_score is not None and not validation:
        raise UserError("stop_at_score looks at the validation score, and there are no validation prompts; give --validation.")
    room = settings.max_new_tokens if environment is None else environment.turn_tokens
    for prompt in [*prompts, *validation]:
        encode_checked(start, prompt, room)  # too long is told now, not at step 30
        if environment is not None:
            begin(environment, prompt, 0)
    if settings.rollout_weights != "same" and not isinstance(start.model, Transformer):
        raise UserError(
            f"accord does not compute this model itself, so it cannot sample with {settings.rollout_weights} weights; use --rollout-weights same."
        )
    if isinstance(start.model, Transformer) and settings.top_layers > start.model.depth:
        depth = start.model.depth
        raise UserError(f"top_layers is {settings.top_layers}; this model has {depth} layers, so use 1 to {depth}.")


def train(
    start: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: RLSettings,
    run: Recorder,
    validation: Sequence[Prompt] = (),
    environment: Environment | None = None,
    logged: Sequence[Logged] = (),
) -> Outcome:
    """Train a policy that starts from ``start``, under a KL leash to it.

    Continues from the run's latest checkpoint, if it has one, with the numbers an uninterrupted run would
    have had. With an ``environment``, a rollout is its episodes, and ``reward`` includes what it gives. An offline
    algorithm's rollouts are of ``logged`` completions, with their own scores; ``reward`` then scores the validation.
    """
    check_start(start, prompts, validation, settings, environment, logged)
    log, judge = (Log(logged, start, settings), Log.reward()) if logged else (None, reward)
    halvings = 0
    while True:
        state = State.begin(start, judge, settings, "" if log is None else log.digest, run)
        try:
            return _train(state, prompts, reward, judge, run, validation, environment, log, halvings)
        except Diverged as error:
            if settings.on_divergence == "stop":
                raise
            halvings = state.optimizer.halvings + 1
            if halvings > ROLLBACKS:
                raise UserError(f"{error} It went back {ROLLBACKS} times with lower learning rates already.") from None
        del state  # before there is another


def _train(
    state: State,
    prompts: Sequence[Prompt],
    reward: Reward,
    judge: Reward,
    run: Recorder,
    validation: Sequence[Prompt],
    environment: Environment | None,
    log: Log | None,
    halvings: int,
) -> Outcome:
    """From the run's latest checkpoint to the end. ``halvings``: the least that learning rates are halved.

    Raises:
        Diverged: the numbers are not finite any more; nothing was saved of that.
    """
    settings = state.settings
    policy, critic, optimizer, kl, algorithm, watch = state.policy, state.critic, state.optimizer, state.kl, state.algorithm, state.watch
    saved = run.latest()
    first = kept = state.restore(saved)
    if saved is not None and saved.about.get("stopped") and saved.about.get("stopped_at") == state.limit(saved.about["stopped"]):
        return Outcome(policy, str(saved.about["stopped"]), first)
    if halvings > optimizer.halvings:
        optimizer.halvings, optimizer.in_a_row = halvings, 0
        run.warn(first, "rollback", f"training diverged; it goes on from here with learning rates times {0.5**halvings:g}.")
    engine = Engine(policy, settings.rows, settings.rollout_weights)
    checker = engine if settings.rollout_weights == "same" else Engine(policy, settings.rows)  # validation is of the policy as saved
    held = list(validation)[: settings.validation_prompts]
    stopped: str | None = "max_steps" if first >= settings.max_steps else None
    step = first
    if saved is not None and saved.about.get("validation_due"):
        score = state.validate(checker, held, reward, environment)
        run.amend(first - 1, {"validation_score": score})
        stopped = stopped or stop_reason(settings, first, {"kl": -math.inf, "validation_score": score})
        run.save(first, state.tensors(), state.about(stopped), score)
    with bar(settings.algorithm.upper(), settings.max_steps) as progress:
        progress.advance(first)
        while stopped is None:
            clock, failed, guide = Clock(), None, algorithm.guide()
            counted = state.rejections.rejected, state.rejections.asked
            try:
                if log is not None:
                    rollout = log.rollout(step)
                else:
                    batch = batch_of(prompts, step, settings)
                    rollout = roll(engine, environment, batch, settings.completions_per_prompt, settings.sampling(step), guide)
                clock.lap("rollout")
                scored = score_rollout(policy, critic, judge, rollout, settings, guide, algorithm.old_model(policy), state.budget)
                state.rejections.count(step, scored, run)
                if not bool(scored.valid.any()):
                    raise UserError(f"Step {step}: the reward skipped every completion (None), so there is nothing to learn from.")
            except Diverged:
                raise
            except UserError:  # the reward failed, or a stop was asked for: what was learned before this step is kept
                state.rejections.rejected, state.rejections.asked = counted
                if step > kept:
                    run.save(step, state.tensors(), state.about(None), None)
                raise
            if step == 0:
                test = self_test(policy, scored, settings)
                run.log(-1, {f"self_test/{k}": v[0] for k, v in test._asdict().items()}, [])
            clock.lap("score")
            experience = algorithm.advantages(scored, kl.coef)
            stats = measure(experience, kl.coef)
            optimizer.set_step(step)
            stats |= algorithm.update(policy, critic, optimizer, experience, step)
            optimizer.release()
            clock.lap("update")
            kl.update(stats["kl"], len(rollout))
            stats |= watch.check(step, stats)
            if state.budget.halved:
                watch.once(step, "memory", f"memory ran out; micro-batches now have {state.budget.tokens} tokens. The gradient is the same. Set micro_batch_tokens to that to save the attempts.")  # fmt: skip
            stats |= {"skipped_updates": float(optimizer.skipped), "tokens": float(rollout.response_mask.sum())}
            if held and ((step + 1) % settings.validate_every == 0 or step + 1 == settings.max_steps):
                try:
                    stats["validation_score"] = state.validate(checker, held, reward, environment)
                except Diverged:
                    raise
                except UserError as error:  # it is made up for on resume
                    failed = error
                clock.lap("validate")
            run.log(step, stats | clock.laps, rows_of(experience, step))
            left_out = f" updates not taken {optimizer.skipped}" if optimizer.skipped else ""
            progress.advance(1, f"score {stats['score']:.2f} KL {stats['kl']:.1f}{left_out}")
            step += 1
            stopped = stop_reason(settings, step, stats)
            if step % settings.checkpoint_every == 0 or stopped or failed or stop_requested():
                tensors = state.tensors()
                if not all(bool(t.isfinite().all()) for t in tensors.values()):
                    raise Diverged(f"Step {step - 1}: a weight is not finite any more, so nothing is saved of it.")
                run.save(step, tensors, state.about(None if failed else stopped, failed is not None), stats.get("validation_score"))
                kept = step
            if failed:
                raise failed
            if not stopped:
                safe_point("Training is saved.")
            del scored, experience  # with what they hold of the old policy
    return Outcome(policy, stopped, step)


def roll(
    engine: Engine, environment: Environment | None, prompts: Sequence[Prompt], each: int, sampling: Sampling, guide: Guide | None = None
) -> Rollout:
    """Completions of the prompts, or an environment's episodes that start from them."""
    if environment is not None:
        return play(engine, environment, prompts, each, sampling, guide)
    return engine.sample(prompts, each, sampling, keep_trunk=True, guide=guide)


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"seconds/{name}"] = now - self._last
        self._last = now


def batch_of(prompts: Sequence[Prompt], step: int, settings: RLSettings) -> list[Prompt]:
    """The prompts of a step: every prompt once in a seeded order, then all again in another order."""
    return [prompts[i] for i in in_turn(len(prompts), step, settings.prompts_per_step, settings.seed)]


def stop_reason(settings: RLSettings, done: int, stats: Mapping[str, float]) -> str | None:
    """Why training ends after ``done`` steps, or None if it goes on."""
    if settings.stop_at_score is not None and stats.get("validation_score", -math.inf) >= settings.stop_at_score:
        return "stop_at_score"
    if settings.kl_stop is not None and stats["kl"] >= settings.kl_stop:
        return "kl_stop"
    return "max_steps" if done >= settings.max_steps else None


def rows_of(e: Experience, step: int) -> list[dict[str, Any]]:
    """Every completion of a step with its scores, for completions.jsonl."""
    kl = e.kl.sum(-1).tolist()
    return [
        {
            "step": step,
            **completion.to_json(),
            "tokens": len(completion.tokens),
            "score": float(e.scores[row]) if bool(e.valid[row]) else None,
            "parts": {name: values[row] for name, values in e.parts.items()},
            "kl": round(kl[row], 4),
            **(
                {}
                if e.rollout.step_rewards is None or not e.rollout.sampled
                else {"turns": [turn.to_json() for turn in e.rollout.turns(row)]}
            ),
        }
        for row, completion in enumerate(e.rollout.completions())
    ]


@dataclass
class Rejections:
    """Completions that a reward failed on, over the run. One is no reason to stop; past a share of them, something is broken."""

    limit: float
    rejected: int = 0
    asked: int = 0

    def count(self, step: int, scored: Experience, run: Recorder) -> None:
        """Add a step's, with the cause of each in ``rejects.jsonl``.

        Raises:
            UserError: there are too many: past the limit once 100 were asked for, or half of a step.
        """
        rollout, rejects = scored.rollout, scored.rejects
        here = len(rejected_rows(rejects))
        self.rejected, self.asked = self.rejected + here, self.asked + len(rollout)
        if not rejects:
            return
        rows = [
            {"step": step, "reward": r.reward, "id": rollout.prompts[r.row].id, "completion": rollout.indices[r.row],
             "cause": r.cause, "prompt": rollout.prompts[r.row].text, "text": rollout.texts[r.row]} for r in rejects
        ]  # fmt: skip
        run.append("rejects.jsonl", rows)
        if here > len(rollout) / 2 or (self.asked >= 100 and self.rejected > self.limit * self.asked):
            raise UserError(
                f"Step {step}: {told(rejects, len(rollout))}. In all {self.rejected} of {self.asked}; more than max_rejected allows "
                f"({self.limit:g}). Each is in rejects.jsonl with its cause; mend the reward, then go on with accord resume."
            )


@dataclass
class State:
    """Everything that changes while training, and so everything a checkpoint holds.

    Random numbers are not among it: each is drawn from the seed and the step it is for.
    """

    policy: Policy
    critic: ScalarModel | None
    optimizer: PolicyOptimizer
    kl: KLController
    algorithm: Algorithm
    settings: RLSettings
    log: str
    rejections: Rejections
    watch: Watch
    budget: TokenBudget

    @classmethod
    def begin(cls, start: Policy, reward: Reward, settings: RLSettings, log: str = "", run: Recorder | None = None) -> State:
        native = isinstance(start.model, Transformer)
        adaptation = settings.adaptation if settings.adaptation != "auto" else "split" if native else "full"
        policy = start.adapt(adaptation, settings.top_layers, settings.lora_rank, settings.lora_alpha, settings.seed)
        critic = make_critic(policy, reward, settings.seed) if settings.needs_critic else None
        groups = {"policy": (policy.trainable(), settings.learning_rate)}
        if critic is not None:
            groups["critic"] = (critic.trainable(), settings.critic_learning_rate)
        kl: KLController = FixedKL(settings.kl_coef)
        if settings.kl_target is not None:
            kl = AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        budget = TokenBudget(settings.micro_batch_tokens)
        return cls(
            policy,
            critic,
            PolicyOptimizer(groups, settings, budget),
            kl,
            make_algorithm(settings, policy, critic),
            settings,
            log,
            Rejections(settings.max_rejected),
            Watch(settings, run.warn if run is not None else lambda step, name, text: None),
            budget,
        )

    def validate(self, engine: Engine, held: Sequence[Prompt], reward: Reward, environment: Environment | None) -> float:
        """Mean score of one completion of each validation prompt, with the same luck every time."""
        with to_the_end():  # a stop waits: the step that has just been made is whole with its validation
            rollout = roll(engine, environment, held, 1, self.settings.sampling(-1))
            scored = reward(rollout)
        return float(scored.total[scored.valid].mean())

    def tensors(self) -> dict[str, Tensor]:
        out = {f"policy/{n}": p.detach() for n, p in self.policy.trainable().items()}
        if self.critic is not None:
            out |= {f"critic/{n}": p.detach() for n, p in self.critic.trainable().items()}
        out |= {f"algorithm/{n}": t for n, t in self.algorithm.tensors().items()}
        return out | {f"optimizer/{n}": t for n, t in self.optimizer.state().items()}

    def limit(self, stopped: str) -> float | None:
        """The setting that ended the run: with another one it goes on."""
        value: float | None = getattr(self.settings, stopped)
        return value

    def about(self, stopped: str | None, validation_due: bool = False) -> dict[str, Any]:
        """What a checkpoint holds besides tensors. A run that ended by ``max_steps`` may be given more of them."""
        ended = stopped if stopped != "max_steps" else None
        return {
            "kl": self.kl.state(),
            "skipped": self.optimizer.skipped,
            "in_a_row": self.optimizer.in_a_row,
            "halvings": self.optimizer.halvings,
            "watch": self.watch.state(),
            "micro_batch_tokens": self.budget.tokens if self.budget.halved else None,
            "stopped": ended,
            "stopped_at": self.limit(ended) if ended else None,
            "validation_due": validation_due,
            "algorithm": self.algorithm.about(),
            "log": self.log,
            "rejections": [self.rejections.rejected, self.rejections.asked],
        }

    def restore(self, saved: Saved | None) -> int:
        """Take over a checkpoint; returns the step to go on with.

        Raises:
            UserError: the checkpoint is of other settings (another adaptation, other layers).
        """
        if saved is None:
            return 0
        if saved.about.get("log", "") != self.log:
            raise UserError("The logged completions are not those that the run has learned from so far; give it the same file again.")
        critic = {} if self.critic is None else self.critic.trainable()
        for prefix, parameters in (("policy", self.policy.trainable()), ("critic", critic)):
            for name, parameter in parameters.items():
                tensor = saved.tensors.get(f"{prefix}/{name}")
                if tensor is None or tensor.shape != parameter.shape:
                    raise UserError(
                        f"The checkpoint of step {saved.step} does not fit the settings ({prefix} {name}); "
                        "adaptation, top_layers and lora_rank in config.yaml must be those the run started with."
                    )
                parameter.data.copy_(tensor)
        self.optimizer.load_state(under("optimizer/", saved.tensors))
        self.algorithm.restore(under("algorithm/", saved.tensors), saved.about["algorithm"])
        self.optimizer.skipped, self.optimizer.in_a_row = int(saved.about["skipped"]), int(saved.about["in_a_row"])
        self.kl.coef = float(saved.about["kl"]["coef"])
        self.rejections.rejected, self.rejections.asked = saved.about.get("rejections", [0, 0])
        self.optimizer.halvings = int(saved.about.get("halvings", 0))
        self.watch.restore(saved.about.get("watch", {}))
        self.budget.tokens = min(self.budget.tokens, saved.about.get("micro_batch_tokens") or self.budget.tokens)
        return saved.step


def make_critic(policy: Policy, reward: Reward, seed: int) -> ScalarModel:
    """A value function on the frozen trunk, started from a reward model cut at the same place if there is one.

    Its head then predicts the normalised, weighted score.
    """
    critic = ScalarModel(policy.start, policy.trunk_layers, seed)
    if isinstance(policy.start, ForeignModel):
        return critic
    for weight, source in reward.sources:
        if isinstance(source, RewardModelSource) and source.on_trunk and source.model.scalar.cut == critic.cut:
            model: RewardModel = source.model
            mine = dict(critic.named_parameters())
            for name, parameter in model.scalar.named_parameters():
                if mine[name].requires_grad:
                    mine[name].data.copy_(parameter)
            critic.head.weight.data.mul_(weight / model.scale)
            critic.head.bias.data.sub_(model.mean).mul_(weight / model.scale)
            break
    return critic
