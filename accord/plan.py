"""What a run will need on this machine: memory by part, tokens and time by stage, before any weight is read.

Memory is counted from ``config.json``, the settings and the prompts; what a layer keeps for its backward pass is counted
on one layer of that shape. Time is measured: the run's own code works for a few seconds on a random model of the same
shape, and its pace is multiplied out. Completions are assumed to use their whole length, so time is an upper estimate
where a policy ends earlier.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accord.config import Recipe
from accord.data.records import SPLITS, Prompt, split_of
from accord.errors import UserError
from accord.nn.layout import Layout
from accord.nn.loading import default_device, model_folder, resolve_dtype
from accord.nn.logprobs import CHUNK
from accord.nn.memory import give_back_freed_memory, keep_freed_memory, keeps
from accord.nn.transformer import Block, Geometry, ModelConfig, Transformer
from accord.nn.weights import is_native, parse_config, read_config
from accord.progress import console
from accord.reward.model import RewardModel, ScalarModel, read_about
from accord.reward.sources import Reward, RewardModelSource
from accord.rl.experience import score_rollout
from accord.rl.registry import ALGORITHMS
from accord.rl.settings import RLSettings
from accord.rl.trainer import State
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout, Row, from_rows
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import score, trunk_of
from accord.text.tokenizer import Tokenizer

GIB = 2**30
ADAM = 16  # bytes a trained weight: itself, its gradient and two moments in fp32
KEPT, KEPT_SHARE = 0.5 * GIB, 0.15
"""Freed memory that the C library has not given back at the peak, and how it grows with what is in use: measured with 4 trained
layers, with 6, and with all (bench/LOG.md)."""
MEASURED = 2 * GIB  # of weights: a larger model's pace is taken from two with fewer layers


@dataclass(frozen=True)
class Part:
    """A part of the memory. ``when``: always, sampling or updating. ``remedy``: the setting that makes it smaller."""

    name: str
    bytes: float
    when: str
    remedy: str


@dataclass(frozen=True)
class Stage:
    name: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Memory in bytes, time in seconds. ``stages`` is empty where only a try can tell (environments)."""

    parts: list[Part]
    stages: list[Stage]
    available: float

    @property
    def memory(self) -> float:
        """The peak."""
        return peak_of(self.parts)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def check(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            UserError: naming the largest part that a setting can shrink, and the setting.
        """
        if self.memory <= self.available:
            return
        phase = max(("sampling", "updating"), key=lambda when: bytes_of(self.parts, when))
        largest = max((p for p in self.parts if p.when in ("always", phase) and p.remedy), key=lambda p: p.bytes)
        raise UserError(
            f"This run needs about {self.memory / GIB:.1f} GiB of memory and {self.available / GIB:.1f} GiB are free, so it is not "
            f"started. Its largest part is {largest.name} ({largest.bytes / GIB:.1f} GiB): {largest.remedy}."
        )

    def show(self) -> None:
        """Print it, a line a part and a stage."""
        console.print(f"Memory: about {self.memory / GIB:.1f} GiB at the peak ({self.available / GIB:.1f} GiB are free)", soft_wrap=True)
        for part in self.parts:
            if part.bytes >= 0.01 * self.memory:
                when = "" if part.when == "always" else f", while {part.when}"
                console.print(f"[dim]  {part.bytes / GIB:6.2f} GiB  {part.name}{when}[/]", soft_wrap=True)
        if self.stages:
            console.print(f"Time: about {minutes(self.seconds)} on this machine, if completions use their whole length", soft_wrap=True)
            for stage in self.stages:
                console.print(f"[dim]  {minutes(stage.seconds):>9}  {stage.name}: {stage.tokens:,} tokens[/]", soft_wrap=True)
        else:
            console.print("[dim]How long an environment's episodes take only playing them can tell.[/]", soft_wrap=True)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def available_memory(device: torch.device) -> float:
    """Bytes that this process may still take: of the GPU, or of the machine and of the container it runs in."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(float(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(float(limit) - float(used))
    return min(free)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def resident_memory() -> float:
    """Bytes this process holds now."""
    fields = _read("/proc/self/statm").split()
    return float(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0.5 * GIB


# Memory.


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of one layer, of the embedding, of the whole model."""

    layer: int
    embedding: int
    total: int

    @classmethod
    def of(cls, config: ModelConfig) -> Weights:
        with torch.device("meta"):
            model = Transformer(config)
        layer = sum(p.numel() for p in model.blocks[0].parameters())
        return cls(layer, model.output_matrix.numel(), sum(p.numel() for p in model.parameters()))


def kept_by_a_layer(config: ModelConfig, dtype: torch.dtype, width: int) -> tuple[float, float]:
    """Bytes that a trained layer keeps for its backward pass: whatever comes in, and a token in rows of ``width``."""
    model = random_model(replace(config, vocab_size=1), 1, dtype)  # the embedding has no part in it
    block = model.blocks[0].float().requires_grad_(True)
    counts = [_saved(block, model.geometry(_layout(rows, width)), config.hidden_size, dtype) for rows in (1, 2)]
    return 2 * counts[0] - counts[1], (counts[1] - counts[0]) / width


def _layout(rows: int, width: int) -> Layout:
    """Of rows that have no beginning in common."""
    return Layout.of(torch.arange(rows * width).view(rows, width), torch.full((rows,), width))


def _saved(block: Block, at: Geometry, hidden: int, dtype: torch.dtype) -> float:
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(torch.zeros(len(at.layout), hidden, dtype=dtype, requires_grad=True), at)
        del out
    return float(sum(storages.values()))


def rl_memory(config: ModelConfig, dtype: torch.dtype, s: RLSettings, lengths: Sequence[int], reward_layers: int) -> list[Part]:
    """The parts of ``accord rl``. ``lengths``: tokens of the prompts; ``reward_layers``: of a reward model on the trunk, or 0."""
    w, e, L, D = Weights.of(config), dtype.itemsize, config.num_hidden_layers, config.hidden_size
    kind = "split" if s.adaptation == "auto" else s.adaptation
    top = min(s.top_layers, L)
    width, rows = max(lengths) + s.max_new_tokens, s.prompts_per_step * s.completions_per_prompt
    lora = sum(s.lora_rank * sum(shape) for shape in _matrices(config)) * L
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
    if keeps() and default_device().type == "cpu":
        parts.append(Part("freed memory that is kept for reuse", KEPT + KEPT_SHARE * peak_of(parts), "always", ""))
    return parts


def peak_of(parts: Sequence[Part]) -> float:
    """What is always there, and the larger of what sampling and updating need."""
    return bytes_of(parts, "always") + max(bytes_of(parts, "sampling"), bytes_of(parts, "updating"))


def bytes_of(parts: Sequence[Part], when: str) -> float:
    return sum(p.bytes for p in parts if p.when == when)


def _matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's matrices."""
    D, q, kv, inner = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim, config.intermediate_size  # fmt: skip
    return [(D, q), (D, kv), (D, kv), (q, D), (D, inner), (D, inner), (inner, D)]


# Time.


def random_model(config: ModelConfig, layers: int, dtype: torch.dtype, device: torch.device | None = None) -> Transformer:
    """A frozen model of that shape with fewer layers and weights of no meaning."""
    if device is None or device.type == "cpu":
        keep_freed_memory()  # as where a real one is loaded
    few = replace(config, num_hidden_layers=layers, windowed=config.windowed[:layers], rotary=config.rotary[:layers])
    with torch.device("meta"):
        model = Transformer(few)
    model = model.to(dtype).to_empty(device=device or torch.device("cpu"))
    if few.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device=device or "cpu").manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02, generator=generator)
    model.rotary_emb = type(model.rotary_emb)(few).to(device or torch.device("cpu"))
    model.compute_dtype = dtype
    return model.requires_grad_(False)


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
    reward_step: float

    def at(self, depth: int, other: Pace, depths: Sequence[int]) -> Pace:
        """For ``depth`` layers, along the line through this pace and the other's, measured at ``depths``."""
        share = (depth - depths[0]) / (depths[1] - depths[0])
        return Pace(*(max(x + (y - x) * share, 1e-9) for x, y in zip(vars(self).values(), vars(other).values(), strict=True)))


def measure_pace(config: ModelConfig, dtype: torch.dtype, device: torch.device, s: RLSettings, prompt: int, reward_layers: int) -> Pace:
    """Some seconds of the run's own code on random models. ``prompt``: the prompts' mean length in tokens."""
    size, L = Weights.of(config), config.num_hidden_layers
    affordable = int((MEASURED - size.embedding * dtype.itemsize) // (size.layer * dtype.itemsize))
    least = max(min(s.top_layers, L), reward_layers) + 1
    depths = (L,) if affordable >= L or least + 1 >= L else (least, max(affordable, least + 2))
    paces = []
    for depth in depths:
        paces.append(_measure(random_model(config, depth, dtype, device), s, prompt, reward_layers))
        give_back_freed_memory()
    return paces[0] if len(paces) == 1 else paces[0].at(L, paces[1], depths)


class _Tokenizer(SimpleNamespace):
    """Enough of one to sample ids that never end."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _measure(model: Transformer, s: RLSettings, prompt: int, reward_layers: int) -> Pace:
    tokenizer: Any = _Tokenizer(pad_id=0, eos_ids=(-1,), fingerprint="")
    start = Policy(model, tokenizer, {}, "calibration", model, trunk_layers=model.depth)
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
        return _least(lambda: engine.go_on(contexts, names, Sampling(max_new_tokens=new)))

    few, more = sample(2), sample(8)
    step = max((more - few) / 6, 1e-6)
    # Scoring and updating, on rows of the run's width.
    width = prompt + s.max_new_tokens
    count = max(min(s.micro_batch_tokens // width, max(wanted // s.minibatches, 1), max(2048 // width, 1)), 1)
    rollout = _rollout(model, count, prompt, s.max_new_tokens)
    tokens = count * width
    trunk = _least(lambda: _with_trunk(state.policy, rollout))
    forward = _least(lambda: score(model, rollout, 0, 1.0, s.micro_batch_tokens))
    ready = _with_trunk(state.policy, rollout)
    scoring = _least(lambda: score_rollout(state.policy, state.critic, Reward(sources), ready, settings))
    if state.policy.split == 0:
        scoring += trunk  # lora, full: the trunk for critic and reward model is read anew
    e = state.algorithm.advantages(score_rollout(state.policy, state.critic, Reward(sources), ready, settings), s.kl_coef)
    state.optimizer.set_step(0)
    update = lambda rows: state.algorithm.update(state.policy, state.critic, state.optimizer, rows, 0)
    one = e.select(torch.tensor([0]))
    whole, single = _least(lambda: update(e)), _least(lambda: update(one))
    each = max(whole - single, 1e-6) / max(tokens - width, 1) if count > 1 else whole / tokens
    learn = _least(lambda: _reward_step(start, ready, reward_layers)) if reward_layers else 0.0
    return Pace(step, max(few - 2 * step, 1e-6) / (rows * prompt), trunk / tokens, forward / tokens, scoring / tokens, each, max(single - each * width, 0.0), learn / tokens)  # fmt: skip


def _with_trunk(policy: Policy, rollout: Rollout) -> Rollout:
    start = policy.start
    assert isinstance(start, Transformer)
    with torch.no_grad():
        return replace(rollout, trunk=trunk_of(start, rollout, policy.trunk_layers), trunk_cut=policy.trunk_layers)


def _reward_step(start: Policy, rollout: Rollout, layers: int) -> None:
    assert isinstance(start.model, Transformer)
    scalar = ScalarModel(start.model, start.model.depth - layers)
    scalar(rollout, rollout.at_last).sum().backward()


def _rollout(model: Transformer, count: int, prompt: int, new: int) -> Rollout:
    """``count`` completions of different prompts."""
    rows = []
    for i in range(count):
        row = Row(Prompt(f"p{i}", ""), 0)
        row.extend([(i + k) % model.config.vocab_size for k in range(prompt)], chosen=False)
        row.extend([(3 * i + k) % model.config.vocab_size for k in range(new)], chosen=True)
        rows.append(row)
    return replace(from_rows(rows, [False] * count, [""] * count, 0, model.device, sampled=False), step_rewards=None)


def _least(work: Callable[[], Any], repeats: int = 2) -> float:
    """Seconds of the faster of two runs: the first may warm something up."""
    laps = []
    for _ in range(repeats):
        clock = time.perf_counter()
        work()
        laps.append(time.perf_counter() - clock)
    return min(laps)


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
    available = available_memory(device) + resident_memory()
    plan = Plan(rl_memory(config, dtype, s, lengths, reward_layers), [], available)
    if environment or not timed or plan.memory > available:
        return plan
    prompt = max(round(sum(lengths) / len(lengths)), 1)
    pace = measure_pace(config, dtype, device, s, prompt, reward_layers)
    tokens = s.max_steps * s.prompts_per_step * s.completions_per_prompt * s.max_new_tokens
    return replace(plan, stages=[Stage(f"{s.max_steps} steps of {s.algorithm}", tokens, rl_seconds(pace, s, prompt))])


def plan_recipe(config: ModelConfig, recipe: Recipe, splits: Mapping[str, Sequence[int]]) -> Plan:
    """Of ``accord run``. ``splits``: tokens of the prompts of each split."""
    s, rl, r, e = recipe.sample, recipe.rl, recipe.reward, recipe.evaluation
    everything = [n for lengths in splits.values() for n in lengths]
    plan = plan_rl(config, rl, everything, min(r.top_layers, config.num_hidden_layers), timed=False)
    if plan.memory > plan.available:
        return plan
    device, prompt = default_device(), round(sum(everything) / len(everything))
    pace = measure_pace(config, resolve_dtype(rl.dtype, device), device, rl, prompt, min(r.top_layers, config.num_hidden_layers))
    ranked = len(splits["train"]) + len(splits["validation"])
    seen = distinct_tokens(ranked, s.per_prompt, prompt, s.max_new_tokens)
    held = len(splits["heldout"])
    judged = distinct_tokens(held, e.per_prompt, prompt, e.max_new_tokens)
    stages = [
        Stage("completions", ranked * s.per_prompt * s.max_new_tokens, sampling_seconds(pace, ranked, s.per_prompt, prompt, s.max_new_tokens, s.rows)),
        Stage("reward model", seen * r.epochs, seen * (pace.trunk + pace.reward_step * (r.epochs + 0.3 * (1 + r.probe)))),
        Stage(f"{rl.max_steps} steps of {rl.algorithm}", rl.max_steps * rl.prompts_per_step * rl.completions_per_prompt * rl.max_new_tokens, rl_seconds(pace, rl, prompt)),
        Stage("evaluation", 2 * held * e.per_prompt * e.max_new_tokens, 2 * (sampling_seconds(pace, held, e.per_prompt, prompt, e.max_new_tokens, e.rows) + 3 * judged * pace.forward)),
    ]  # fmt: skip
    return replace(plan, stages=stages)


# From names to a plan.


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


def plan_for_recipe(recipe: Recipe, prompts: Sequence[Prompt]) -> Plan | None:
    """:func:`plan_recipe` with the prompts split as the run splits them."""
    looked = look(recipe.model)
    if looked is None:
        return None
    config, tokenizer = looked
    splits = {name: lengths_of(tokenizer, [p for p in prompts if split_of(p.id) == name]) for name in SPLITS}
    return plan_recipe(config, recipe, splits)


def look(model: str) -> tuple[ModelConfig, Tokenizer] | None:
    """A model's shape and tokenizer, without its weights."""
    folder = model_folder(model)
    raw = read_config(folder)
    return (parse_config(raw, str(folder / "config.json")), Tokenizer.load(folder)) if is_native(raw) else None


def lengths_of(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt."""
    return [len(tokenizer.encode_prompt(prompt.content)) for prompt in prompts]


def reward_layers_of(spec: str, config: ModelConfig) -> int:
    """Trained layers of a reward model that sits on this model's trunk; 0 for a function or a classifier."""
    folder = Path(spec.split("*", 1)[-1])
    about = read_about(folder) if (folder / "accord.json").is_file() else None
    return 0 if about is None else max(config.num_hidden_layers - int(about["cut"]), 0)
