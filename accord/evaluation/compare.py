"""Reference against aligned: the same prompts, the same seeds, every number with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from accord.data.records import Completion, Prompt
from accord.data.statistics import Estimate, bootstrap_mean, bootstrap_ratio
from accord.errors import UserError
from accord.feedback.criteria import criterion
from accord.feedback.toxicity import toxicity
from accord.progress import bar, console
from accord.reward.functions import told
from accord.reward.sources import Reward
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import kl_between, score

TIE = 0.01
"""Gold scores closer than this are a tie; a tie is half a win."""
MAX_REJECTED = 0.05
"""Share of completions that a reward may fail on."""


class EvaluationSettings(BaseModel):
    """Everything ``accord evaluate`` can be told about measuring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_prompt: int = Field(2, ge=1, description="Completions of each prompt by each model")
    max_new_tokens: int = Field(48, ge=1, description="Length limit of a completion, in tokens")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy")
    gold: bool = Field(True, description="Score by a built-in criterion and give the win rate by it")
    criterion: Literal["plain-short-decent", "stories"] = Field(
        "plain-short-decent", description="Which: plain-short-decent (accord/feedback/criterion.md), or stories"
    )
    harmful_theme: str = Field("harmlessness", description="Prompts of this theme get a toxicity line of their own")
    rows: int = Field(64, ge=1, description="Completions decoded side by side")
    micro_batch_tokens: int = Field(4096, ge=1, description="Padded tokens scored at once")
    reward_timeout: float = Field(60.0, gt=0, description="Seconds a reward function may take for one model's completions")
    seed: int = Field(12345, ge=0, description="The luck both models share")

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed)


@dataclass(frozen=True)
class Measured:
    """One completion and what was measured of it."""

    completion: Completion
    values: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {**self.completion.to_json(), **self.values}


@dataclass
class Comparison:
    """What evaluation found.

    Attributes:
        before, after: by metric, over all held-out prompts: reference and aligned.
        change: after minus before, paired by prompt, with its interval.
        win_rate: share of completions whose gold score beats the reference's on the same prompt and seed.
        harmful_ratio: toxicity of the aligned model over the reference's, on the harmful theme.
        kl: nats a completion, exact over the vocabulary, on the aligned model's own completions.
    """

    before: dict[str, Estimate]
    after: dict[str, Estimate]
    change: dict[str, Estimate]
    win_rate: Estimate | None
    kl: Estimate
    harmful_ratio: Estimate | None
    samples: list[tuple[Measured, Measured]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        def plain(table: dict[str, Estimate]) -> dict[str, Any]:
            return {name: e.to_json() for name, e in table.items()}

        return {
            "before": plain(self.before),
            "after": plain(self.after),
            "change": plain(self.change),
            "win_rate": self.win_rate and self.win_rate.to_json(),
            "kl": self.kl.to_json(),
            "harmful_ratio": self.harmful_ratio and self.harmful_ratio.to_json(),
        }


def distinct_2(text: str) -> float:
    """Distinct word pairs over all word pairs of a text; 1 when no pair occurs twice (Li et al. 2016)."""
    words = text.split()
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def evaluate(
    aligned: Policy,
    against: Policy,
    prompts: Sequence[Prompt],
    reward: Reward | None,
    settings: EvaluationSettings,
) -> Comparison:
    """Sample both models on ``prompts`` and compare.

    Args:
        reward: scores to report beside the rest (the one trained on shows what was optimised), or None.
    """
    per_prompt, gold, token_budget = settings.per_prompt, settings.gold, settings.micro_batch_tokens
    sampling = settings.sampling()
    total = 2 * len(prompts) * per_prompt
    with bar("Evaluation", total) as progress:
        advance: Callable[[int, int], None] = lambda done, tokens: progress.advance(done) if done else None
        pair = [Engine(policy, settings.rows).sample(prompts, per_prompt, sampling, on_progress=advance) for policy in (against, aligned)]
    temperature = sampling.temperature or 1.0
    measured = [
        _measure(policy, rollout, reward, settings, temperature, token_budget)
        for policy, rollout in zip((against, aligned), pair, strict=True)
    ]
    kl = kl_between(aligned.model, against.model, pair[1], 0, 0, temperature, token_budget).sum(-1).tolist()
    for row, value in zip(measured[1], kl, strict=True):
        row.values["kl"] = value
    ids = [m.completion.prompt.id for m in measured[0]]
    names = list(measured[0][0].values)
    column = {name: ([m.values[name] for m in measured[0]], [m.values[name] for m in measured[1]]) for name in names}
    harmful = [i for i, m in enumerate(measured[0]) if m.completion.prompt.theme == settings.harmful_theme]
    before, after, change = {}, {}, {}
    for name, (old, new) in column.items():
        both = [i for i in range(len(ids)) if math.isfinite(old[i]) and math.isfinite(new[i])]
        if not both:
            continue
        where = [ids[i] for i in both]
        before[name], after[name] = (bootstrap_mean([side[i] for i in both], where) for side in (old, new))
        change[name] = bootstrap_mean([new[i] - old[i] for i in both], where)
    ratio = None
    if harmful:
        where = [ids[i] for i in harmful]
        old, new = ([column["toxicity"][side][i] for i in harmful] for side in (0, 1))
        name = f"toxicity, {settings.harmful_theme}"
        before[name], after[name] = bootstrap_mean(old, where), bootstrap_mean(new, where)
        change[name] = bootstrap_mean([n - o for o, n in zip(old, new, strict=True)], where)
        ratio = bootstrap_ratio(new, old, where)
    wins = None
    if gold:
        gaps = [new - old for old, new in zip(*column["gold"], strict=True)]
        wins = bootstrap_mean([0.5 if abs(g) < TIE else float(g > 0) for g in gaps], ids)
    return Comparison(before, after, change, wins, bootstrap_mean(kl, ids), ratio, list(zip(*measured, strict=True)))


def _measure(
    policy: Policy, rollout: Rollout, reward: Reward | None, settings: EvaluationSettings, temperature: float, budget: int
) -> list[Measured]:
    completions = rollout.completions()
    values: dict[str, list[float]] = {}
    if reward is not None:
        given = reward(rollout)  # a skipped completion has no score: NaN, left out below
        if given.rejects:
            text = told(given.rejects, len(rollout))
            if len(given.rejects) > max(MAX_REJECTED * len(rollout), 1):
                raise UserError(f"{text}. Mend the reward and evaluate again.")
            console.print(f"[yellow]{text}; they are left out.[/]", soft_wrap=True)
        values["score"] = given.total.masked_fill(~given.valid, float("nan")).tolist()
    if settings.gold:
        judged = criterion(settings.criterion).judge(completions)
        values["gold"] = [j.gold for j in judged]
        values |= {name: [j.measures[name] for j in judged] for name in judged[0].measures}
    values["toxicity"] = toxicity(rollout.texts)
    scored = score(policy.model, rollout, 0, temperature, budget)
    lengths = rollout.response_mask.sum(-1)
    values["entropy"] = (scored.entropy.sum(-1) / lengths).tolist()
    values["length"] = lengths.float().tolist()
    values["finished"] = rollout.finished.float().tolist()
    values["distinct_2"] = [distinct_2(t) for t in rollout.texts]
    return [Measured(c, {name: column[i] for name, column in values.items()}) for i, c in enumerate(completions)]


def first_by_id(comparison: Comparison, count: int = 12) -> list[tuple[Measured, Measured]]:
    """The first completion of the first prompts by id: chosen by nothing but their names."""
    firsts = [pair for pair in comparison.samples if pair[0].completion.index == 0]
    return sorted(firsts, key=lambda pair: pair[0].completion.prompt.id)[:count]
