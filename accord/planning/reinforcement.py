"""Reinforcement learning: its memory, and the pace of rollouts, scoring and updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from accord.data.records import Prompt
from accord.nn.loading import default_device, resolve_dtype
from accord.nn.logprobs import CHUNK
from accord.nn.transformer import ModelConfig, Transformer
from accord.planning.models import Weights, apart, at_depth, kept_by_a_layer, least, lengths_of, look, matrices, rollout_of, stand_in
from accord.planning.plan import ADAM, Part, Plan, Stage, resident_memory, with_freed
from accord.reward.model import RewardModel, read_about
from accord.reward.sources import Reward, RewardModelSource
from accord.rl.experience import score_rollout
from accord.rl.registry import ALGORITHMS
from accord.rl.settings import RLSettings
from accord.rl.trainer import State
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import score, trunk_of


def rl_memory(config: ModelConfig, dtype: torch.dtype, s: RLSettings, lengths: Sequence[int], reward_layers: int) -> list[Part]:
    """The parts of ``accord rl``. ``lengths``: tokens of the prompts; ``reward_layers``: of a reward model on the trunk, or 0."""
    w, e, L, D = Weights.of(config), dtype.itemsize, config.num_hidden_layers, config.hidden_size
    kind = "split" if s.adaptation == "auto" else s.adaptation
    top = min(s.top_layers, L)
    width, rows = max(lengths) + s.max_new_tokens, s.prompts_per_step * s.completions_per_prompt
    lora = sum(s.lora_rank * sum(shape) for shape in matrices(config)) * L
    trained = {"split": top * w.layer + D, "full": w.total, "lora": lora}[kind]
    deep = top if kind == "split" else L
    small = 1 if s.rollout_weights == "int8" else e
    fixed, each = kept_by_a_layer(config, dtype, width)
    at_once = min(s.micro_batch_tokens, max(rows // s.minibatches, 1) * width)
    fewer = "use --adaptation split with fewer --top-layers" if kind != "split" else "lower --top-layers"
    trunk = e * D if kind == "split" or top < L else 0
    frozen_copies = (L - top) * w.layer if kind == "split" else 0
    critic = top * w.layer + D if s.needs_critic else 0
    parts = [
        Part("Python and torch", resident_memory(), "always", ""),
        Part("the model", w.total * e, "always", "use --dtype bfloat16, or a smaller model"),
        Part("the sampler's copies of frozen layers", frozen_copies * small + w.embedding * e, "always", "use --rollout-weights int8, or a smaller model"),
        Part("the policy's trained weights and Adam's moments", trained * (ADAM - 4), "always", fewer),
        Part("the critic's", critic * (ADAM - 4), "always", "lower --top-layers, or use an algorithm without a critic (rloo, grpo)"),
        Part("the reward model's layers", reward_layers * w.layer * 4, "always", "train the reward model with fewer --top-layers"),
        Part("the rollout", rows * width * (trunk + 150), "always", "lower --prompts-per-step or --completions-per-prompt"),
        Part("the sampler's copies of trained layers", (L * w.layer - frozen_copies) * small, "sampling", fewer),
        Part("the key/value cache", 2 * L * min(s.rows, rows) * width * config.num_key_value_heads * config.head_dim * e, "sampling", "lower --rows"),
        Part("gradients", 4 * (trained + critic), "updating", fewer),
        Part("what a micro-batch keeps for its backward pass", (deep + (top if critic else 0)) * (fixed + each * at_once), "updating", "lower --micro-batch-tokens"),
        Part("logits", 2 * CHUNK * config.vocab_size * e, "updating", ""),
    ]  # fmt: skip
    return with_freed(parts)


def sampling_memory(config: ModelConfig, dtype: torch.dtype, slots: int) -> list[Part]:
    """Of a frozen model that samples, with so many slots in its cache."""
    w, e, L = Weights.of(config), dtype.itemsize, config.num_hidden_layers
    return with_freed([
        Part("Python and torch", resident_memory(), "always", ""),
        Part("the model", w.total * e, "always", "use a smaller model"),
        Part("the sampler's copies of its layers", (L * w.layer + w.embedding) * e, "sampling", "use a smaller model"),
        Part("the key/value cache", 2 * L * slots * config.num_key_value_heads * config.head_dim * e, "sampling", "give fewer or shorter examples (constitution.shots)"),
    ])  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """Seconds of a decoding step, and of a token of each kind of work; ``step_fixed`` of an optimizer step whatever it holds."""

    decoding_step: float
    prefill: float
    trunk: float
    forward: float
    scoring: float
    update: float
    step_fixed: float


def measure_pace(config: ModelConfig, dtype: torch.dtype, device: torch.device, s: RLSettings, prompt: int, reward_layers: int) -> Pace:
    """Some seconds of the run's own code on random models. ``prompt``: the prompts' mean length in tokens."""
    fewest = max(min(s.top_layers, config.num_hidden_layers), reward_layers) + 1
    return at_depth(config, dtype, device, fewest, lambda model: _measure(model, s, prompt, reward_layers), dtype.itemsize)


def _measure(model: Transformer, s: RLSettings, prompt: int, reward_layers: int) -> Pace:
    start = stand_in(model)
    wanted = s.prompts_per_step * s.completions_per_prompt
    settings = s.model_copy(update={"epochs": 1, "minibatches": 1, "top_layers": min(s.top_layers, model.depth), "algorithm": "ppo" if s.algorithm in ("trpo", "dqn", "ilql", "nlpo", "ppo-penalty") else s.algorithm})  # fmt: skip
    sources = []
    if reward_layers:
        sources.append((1.0, RewardModelSource("reward", RewardModel.on(start, reward_layers), start)))
    state = State.begin(start, Reward(sources), settings)
    # Sampling.
    rows = min(s.rows, wanted)
    contexts = [[(7 * i + k) % model.config.vocab_size for k in range(prompt)] for i in range(rows)]
    engine, names = Engine(state.policy, rows, s.rollout_weights), [str(i) for i in range(rows)]

    def sample(new: int) -> float:
        return least(lambda: engine.go_on(contexts, names, Sampling(max_new_tokens=new)), 3)

    few, more = sample(2), sample(14)
    step = max((more - few) / 12, 1e-6)
    # Scoring and updating, on rows of the run's width.
    width = prompt + s.max_new_tokens
    count = max(min(s.micro_batch_tokens // width, max(wanted // s.minibatches, 1), max(2048 // width, 1)), 1)
    rollout = rollout_of(model, count, prompt, s.max_new_tokens)
    tokens = count * width
    trunk = least(lambda: _with_trunk(state.policy, rollout))
    forward = least(lambda: score(model, rollout, 0, 1.0, s.micro_batch_tokens))
    ready = _with_trunk(state.policy, rollout)
    scoring = least(lambda: score_rollout(state.policy, state.critic, Reward(sources), ready, settings))
    if state.policy.split == 0:
        scoring += trunk  # lora, full: the trunk for critic and reward model is read anew
    e = state.algorithm.advantages(score_rollout(state.policy, state.critic, Reward(sources), ready, settings), s.kl_coef)
    state.optimizer.set_step(0)
    update = lambda rows: state.algorithm.update(state.policy, state.critic, state.optimizer, rows, 0)
    one = e.select(torch.tensor([0]))
    whole, single = least(lambda: update(e)), least(lambda: update(one))
    each, fixed = apart(whole, single, count, width)
    return Pace(step, max(few - 2 * step, 1e-6) / (rows * prompt), trunk / tokens, forward / tokens, scoring / tokens, each, fixed)


def _with_trunk(policy: Policy, rollout: Rollout) -> Rollout:
    start = policy.start
    assert isinstance(start, Transformer)
    with torch.no_grad():
        return replace(rollout, trunk=trunk_of(start, rollout, policy.trunk_layers), trunk_cut=policy.trunk_layers)


def rl_seconds(pace: Pace, s: RLSettings, prompt: int, steps: int | None = None) -> float:
    """``accord rl``: rollouts, scoring, updates and validations."""
    rows, width = s.prompts_per_step * s.completions_per_prompt, prompt + s.max_new_tokens
    scored = distinct_tokens(s.prompts_per_step, s.completions_per_prompt, prompt, s.max_new_tokens)
    learned = scored if s.minibatches == 1 else rows * width  # minibatches are drawn from rows, whatever their prompt
    rollout = sampling_seconds(pace, s.prompts_per_step, s.completions_per_prompt, prompt, s.max_new_tokens, s.rows)
    if ALGORITHMS[s.algorithm].offline:
        rollout = 0.0
    update = s.epochs * (learned * pace.update + s.minibatches * pace.step_fixed)
    validation = sampling_seconds(pace, s.validation_prompts, 1, prompt, s.max_new_tokens, s.rows) / s.validate_every
    return (steps or s.max_steps) * (rollout + scored * pace.scoring + update + validation)


def distinct_tokens(prompts: int, each: int, prompt: int, new: int) -> int:
    """What scoring computes: a prompt once, whatever the number of its completions."""
    return prompts * (prompt + each * new)


def sampling_seconds(pace: Pace, prompts: int, each: int, prompt: int, new: int, rows: int) -> float:
    """Prompts are read once; ``rows`` completions go side by side, and the last ones alone."""
    waves = max(prompts * each / rows, 1.0)
    return prompts * prompt * pace.prefill + waves * new * pace.decoding_step


def plan_rl(
    config: ModelConfig, s: RLSettings, lengths: Sequence[int], reward_layers: int, environment: bool = False, timed: bool = True
) -> Plan:
    """Of ``accord rl``. ``lengths``: tokens of each prompt; ``reward_layers``: trained layers of its reward model, or 0."""
    device = default_device()
    dtype = resolve_dtype(s.dtype, device)
    s = s.model_copy(update={"top_layers": min(s.top_layers, config.num_hidden_layers)})
    plan = Plan.of_memory(rl_memory(config, dtype, s, lengths, reward_layers), device)
    if environment or not timed or not plan.fits:
        return plan
    prompt = max(round(sum(lengths) / len(lengths)), 1)
    pace = measure_pace(config, dtype, device, s, prompt, reward_layers)
    tokens = s.max_steps * s.prompts_per_step * s.completions_per_prompt * s.max_new_tokens
    return replace(plan, stages=[Stage(f"{s.max_steps} steps of {s.algorithm}", tokens, rl_seconds(pace, s, prompt))])


def plan_for_rl(
    model: str, s: RLSettings, prompts: Sequence[Prompt], rewards: Sequence[str], environment: bool = False, timed: bool = True
) -> Plan | None:
    """:func:`plan_rl` of names; None for a model that accord does not compute itself, of whose inside it knows nothing."""
    looked = look(model)
    if looked is None:
        return None
    config, tokenizer = looked
    layers = max([0, *(reward_layers_of(spec, config) for spec in rewards)])
    return plan_rl(config, s, lengths_of(tokenizer, prompts) or [1], layers, environment, timed)


def reward_layers_of(spec: str, config: ModelConfig) -> int:
    """Trained layers of a reward model that sits on this model's trunk; 0 for a function or a classifier."""
    folder = Path(spec.split("*", 1)[-1])
    about = read_about(folder) if (folder / "accord.json").is_file() else None
    return 0 if about is None else max(config.num_hidden_layers - int(about["cut"]), 0)
