"""What a recipe will need: every stage, one after the other, and the memory of the one that needs most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accord.beginning import SAMPLED, asked
from accord.config import Base, Principled, Recipe
from accord.constitution.principles import read_constitution
from accord.constitution.revising import TOGETHER as TOGETHER_WRITTEN
from accord.constitution.revising import request, shots_of
from accord.constitution.rules import HARMFUL, kind_of
from accord.constitution.writers import encode_asked
from accord.data.records import SPLITS, Example, Prompt, hold_out, split_of
from accord.data.sources import read_examples, read_texts
from accord.errors import UserError
from accord.nn.loading import default_device, resolve_dtype
from accord.nn.transformer import ModelConfig
from accord.planning.models import lengths_of, look
from accord.planning.plan import Plan, Stage
from accord.planning.reinforcement import Pace, distinct_tokens, measure_pace, plan_rl, rl_seconds, sampling_memory, sampling_seconds
from accord.planning.reward import Ranked, plan_reward, reward_stage
from accord.planning.supervised import Work, plan_tuning, work_of_examples
from accord.pretraining.language import new_config
from accord.pretraining.tokens import MEASURED, TOGETHER
from accord.reward.model import check_top_layers
from accord.stories.stories import stories
from accord.supervised.examples import encode_example
from accord.supervised.settings import HELD_OUT, LoopSettings, SFTSettings
from accord.text.tokenizer import Tokenizer
from accord.text.vocabulary import learn_tokenizer

STORIES, EXAMPLES = 4000, 500
"""Of texts, from which a tokenizer like the run's is learned, and of examples, which are put in tokens: the others are taken to be like them."""
KEPT = 4
"""Of so many chains one is kept, about: of the bundled model's texts most are cut by the length limit or do not decline."""


@dataclass(frozen=True)
class Written:
    """Texts that a stage samples: how many, and tokens of what they follow and of themselves."""

    stage: str
    count: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Training:
    stage: str
    settings: LoopSettings
    work: Work


@dataclass(frozen=True)
class Early:
    """The model that a recipe's completions come from, its tokenizer, and what its stages before them do. ``slots``: of the key/value cache
    of what is written there, if it is long."""

    config: ModelConfig
    tokenizer: Tokenizer
    sampled: list[Written] = field(default_factory=list)
    trained: list[Training] = field(default_factory=list)
    slots: int = 0


def plan_recipe(recipe: Recipe, prompts: Sequence[Prompt]) -> Plan | None:
    """Of ``accord run``, the prompts split as the run splits them; None for a model that accord does not compute itself.

    Raises:
        UserError: something that the recipe names is not there or is wrong.
    """
    looked = None if recipe.base else look(recipe.model)
    if recipe.base:
        early = made(recipe.base)
    elif looked is None:
        return None
    else:
        early = revised(recipe.constitution, *looked, prompts) if recipe.constitution else Early(*looked)
    config, rl, layers = early.config, recipe.rl, recipe.reward.top_layers
    splits = {name: lengths_of(early.tokenizer, [p for p in prompts if split_of(p.id) == name]) for name in SPLITS}
    everything = [n for lengths in splits.values() for n in lengths]
    longest = max(everything) + max(rl.max_new_tokens, recipe.sample.max_new_tokens, recipe.evaluation.max_new_tokens)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"The longest prompt has {max(everything)} tokens, and with an answer of max_new_tokens (sample, rl, evaluation) {longest}; the model's context is "
            f"{config.max_position_embeddings}. Shorten the prompts, lower max_new_tokens{', or raise base.pretrain.context' if recipe.base else ''}."
        )
    check_top_layers(layers, config.num_hidden_layers, "reward.top_layers")
    last = plan_rl(config, rl, everything, layers, timed=False)
    plans = [replace(plan_tuning(t.stage, config, t.settings, t.work), of=t.stage) for t in early.trained]
    device, prompt = default_device(), max(round(sum(everything) / len(everything)), 1)
    dtype = resolve_dtype(rl.dtype, device)
    ranked = Ranked.like(splits["train"], splits["validation"], recipe.sample.per_prompt, recipe.sample.max_new_tokens)
    plans.append(replace(plan_reward(config, dtype, recipe.reward, ranked, timed=False), of="reward model"))
    if early.slots:
        writing = Plan.of_memory(sampling_memory(config, dtype, early.slots), device)
        plans.append(replace(writing, of="revisions"))
    most = max([replace(last, of=rl.algorithm), *plans], key=lambda plan: plan.memory)
    if not most.fits:
        return replace(most, stages=[])
    pace, reward = measure_pace(config, dtype, device, rl, prompt, layers), reward_stage(config, dtype, device, recipe.reward, ranked)
    took = {name: Stage(name, 0, 0.0) for name in (*(s.stage for s in early.sampled), *(t.stage for t in early.trained))}
    for s in early.sampled:
        took[s.stage] = _plus(took[s.stage], s.count * s.new, sampling_seconds(pace, s.count, 1, s.prompt, s.new, rl.rows))
    for stage in (stage for plan in plans for stage in plan.stages):
        took[stage.name] = _plus(took[stage.name], stage.tokens, stage.seconds)
    return replace(
        most, samples=True, stages=[*took.values(), *later(recipe, {name: len(n) for name, n in splits.items()}, prompt, pace, reward)]
    )


def _plus(stage: Stage, tokens: int, seconds: float) -> Stage:
    return Stage(stage.name, stage.tokens + tokens, stage.seconds + seconds)


def later(recipe: Recipe, counts: dict[str, int], prompt: int, pace: Pace, reward: Stage) -> list[Stage]:
    """From completions to the evaluation. ``counts``: prompts of each split; ``prompt``: tokens of one."""
    s, rl, e = recipe.sample, recipe.rl, recipe.evaluation
    ranked, held = counts["train"] + counts["validation"], counts["heldout"]
    judged = distinct_tokens(held, e.per_prompt, prompt, e.max_new_tokens)
    sides = 3 if recipe.constitution else 2
    return [
        Stage("completions", ranked * s.per_prompt * s.max_new_tokens, sampling_seconds(pace, ranked, s.per_prompt, prompt, s.max_new_tokens, s.rows)),
        reward,
        Stage(f"{rl.max_steps} steps of {rl.algorithm}", rl.max_steps * rl.prompts_per_step * rl.completions_per_prompt * rl.max_new_tokens, rl_seconds(pace, rl, prompt)),
        Stage("evaluation", sides * held * e.per_prompt * e.max_new_tokens, sides * sampling_seconds(pace, held, e.per_prompt, prompt, e.max_new_tokens, e.rows) + 6 * judged * pace.forward),
    ]  # fmt: skip


def made(base: Base) -> Early:
    """A model from nothing, with a tokenizer like that which it will have, learned from fewer texts where these support its vocabulary."""
    s = base.pretrain
    texts = read_texts(base.text) if base.text else list(stories(min(STORIES, base.documents), s.seed))
    some = _first(texts) if base.text else texts
    try:
        tokenizer = Tokenizer(learn_tokenizer(some, "bpe", base.vocabulary))
    except UserError:
        if some is texts:
            raise
        tokenizer = Tokenizer(learn_tokenizer(texts, "bpe", base.vocabulary))
    tokens = sum(map(len, tokenizer.encode_texts(some))) + len(some)  # and where each ends
    every = tokens * sum(map(len, texts)) / max(sum(map(len, some)), 1) if base.text else tokens * base.documents / len(texts)
    held = min(MEASURED, every / 20)
    steps = math.ceil((s.tokens or s.epochs * (every - held)) / s.tokens_per_step)
    row = min(tokens / len(some), float(s.context))
    examples = read_examples(base.examples) if base.examples else [
        Example(f"wish-{i:05d}", wish, story) for i, (wish, story) in enumerate(asked(base.asked, base.sft.seed), 1)
    ]  # fmt: skip
    reading = Training("pretrain", s, Work(steps, s.tokens_per_step, row, row - 1, held))
    answering = Training(
        "sft", base.sft, answers(tokenizer, *hold_out(examples, lambda e: e.id, base.sft.examples_per_step, HELD_OUT), base.sft)
    )
    told = [] if base.text else [Written("pretrain", 2 * SAMPLED, 1, min(round(row), s.context - 1))]
    return Early(new_config(tokenizer, s)[1], tokenizer, told, [reading, answering])


def _first(texts: Sequence[str]) -> list[str]:
    """So many of them as are encoded at once, the last cut there."""
    out, left = list[str](), TOGETHER
    for text in texts[:STORIES]:
        out.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return out


def answers(tokenizer: Tokenizer, train: Sequence[Example], held: Sequence[Example], s: SFTSettings) -> Work:
    """What supervised tuning reads, some of it put in tokens."""
    some = train[:: math.ceil(len(train) / EXAMPLES)]
    work = work_of_examples([encode_example(tokenizer, example) for example in some], [], s)
    return replace(work, steps=math.ceil(s.epochs * len(train) / s.examples_per_step), held=len(held) * work.row)


def revised(s: Principled, config: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Early:
    """A model that is tuned on its own revisions, of which it keeps one in :data:`KEPT`. Another writer's time and memory are not known.

    Examples (``shots``) are counted for each request; they are read once for all that are written together, and what that saves goes into the
    longer cache that each step reads then.
    """
    seen = [p for p in prompts if split_of(p.id) != "heldout"]
    chains = sum((1 - 1 / KEPT) ** k for k in range(s.attempts))  # of a prompt
    written, rows = [], []
    if not s.writer:
        harmful = sum(kind_of(p) == HARMFUL for p in seen)
        said = max((p.revision for p in read_constitution(s.file).only(s.principles).principles), key=len)
        prompt = round(sum(lengths_of(tokenizer, seen)) / max(len(seen), 1))
        turn = prompt + len(encode_asked(tokenizer, [*shots_of(s.shots, s.critiques), request(said)])) + s.max_new_tokens
        turns = s.revisions * (2 if s.critiques else 1)
        written = [
            Written("revisions", round(chains * len(seen)), prompt, s.max_new_tokens),
            Written("revisions", round(chains * harmful * turns), turn, s.max_new_tokens),
        ]
        rows = [min(TOGETHER_WRITTEN, harmful) * (turn + s.max_new_tokens)]
    answer = tokenizer.inner.decode(tokenizer.encode_plain(" so")[:1]) * (s.max_new_tokens // 2)
    kept = lambda split: [Example(p.id, p.content, answer) for p in seen if split_of(p.id) == split][::KEPT]
    trained = [Training("sft", s.sft, answers(tokenizer, kept("train"), kept("validation"), s.sft))] if kept("train") else []
    return Early(config, tokenizer, written, trained, sum(rows))
