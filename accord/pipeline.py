"""``accord run``: the stages of a recipe in one run folder, each with its gate, each skipped on resume once done."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accord.api import announce, prepare_rl, rank, run_rl, sample_to, save_reward
from accord.api import evaluate as compare_policies
from accord.beginning import Beginning, story_prompts
from accord.config import Recipe, build
from accord.constitution.redteam import recipe_prompts as red_team_prompts
from accord.constitution.rules import NAME as RULES
from accord.constitution.rules import Rules
from accord.constitution.stages import Constitutional, print_models
from accord.data.pairs import group_pairs, rankings_by_prompt
from accord.data.records import SPLITS, PairGroup, Prompt, RankedCompletions, split_of
from accord.data.sources import bundled_prompts, read_completions, read_prompts, read_rankings
from accord.disk import write_lines, write_whole
from accord.errors import GateMissed, UserError
from accord.evaluation.compare import Comparison, first_by_id
from accord.evaluation.report import write_report
from accord.evaluation.summary import print_comparison
from accord.nn.memory import give_back_freed_memory
from accord.plan_recipe import plan_recipe
from accord.progress import console, safe_point
from accord.reward.sources import Reward, build_reward
from accord.rl.explain import Explained, explain
from accord.rollout.policy import Policy
from accord.runs import Run, refuse_existing
from accord.stages import Done, Gate


class Pipeline:
    """Runs a recipe's stages in order. A finished stage has a line in ``stages.jsonl`` and its files in the folder."""

    def __init__(self, recipe: Recipe, run: Run, policy: Policy | None = None) -> None:
        self.recipe, self.run, self._policy = recipe, run, policy
        self.constitution = Constitutional(recipe, run) if recipe.constitution else None
        self.beginning = Beginning(recipe.base, recipe.gates, recipe.base.pretrain.seed, run) if recipe.base else self.constitution

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            model = str(self.beginning.model) if self.beginning else self.recipe.model
            self._policy = Policy.load(model, self.recipe.rl.dtype)
        return self._policy

    def go(self) -> None:
        """Every stage that is not done yet, then the report.

        Raises:
            GateMissed: a stage ended below its gate; the message says which and what to try.
        """
        stages: Sequence[tuple[str, Callable[[], Done]]] = (
            ("prompts", self.prompts),
            *(self.beginning.stages if self.beginning else ()),
            ("completions", self.completions),
            ("feedback", self.feedback),
            ("reward", self.reward),
            ("rl", self.rl),
            ("evaluation", self.evaluation),
        )
        done = {row["stage"] for row in self.run.read("stages.jsonl")}
        for number, (name, stage) in enumerate(stages, 1):
            if name in done:
                console.print(f"[dim]{number}/{len(stages)} {name}: done before[/]")
                continue
            safe_point("Finished stages are kept.")
            console.print(f"[bold]{number}/{len(stages)} {name}[/]")
            clock = time.perf_counter()
            result = stage()
            seconds = time.perf_counter() - clock
            give_back_freed_memory()
            gate = result.gate
            row = {"stage": name, "seconds": round(seconds, 1), "tokens": result.tokens, "gate": gate.__dict__, "facts": result.facts}
            row["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            colour, mark = ("green", "passed") if gate.passed else ("red", "MISSED")
            console.print(f"  [{colour}]gate {mark}[/]: expected {gate.expects}; got {gate.got} [dim]({seconds:.0f} s)[/]", soft_wrap=True)
            self.run.append("gates.jsonl" if not gate.passed else "stages.jsonl", [row])
            if name in ("rl", "evaluation"):
                self.report()
            if not gate.passed:
                raise GateMissed(
                    f"Stage '{name}' missed its gate: expected {gate.expects}, got {gate.got}. {gate.remedy} Its files are kept in {self.run.folder}."
                )
        self.report()
        self.summary()

    def report(self) -> None:
        write_report(self.run.folder, self.constitution.section() if self.constitution else "")

    # Stages. Each reads what the ones before it wrote, so that a resumed run does the same.

    def prompts(self) -> Done:
        prompts = recipe_prompts(self.recipe)
        rows = [{**p.to_json(), "split": split_of(p.id)} for p in prompts]
        write_lines(self.run.folder / "prompts.jsonl", rows)
        sizes = {name: sum(row["split"] == name for row in rows) for name in SPLITS}
        themes = {t: sum(p.theme == t for p in prompts) for t in sorted({p.theme for p in prompts})}
        needed = {"train": self.recipe.rl.prompts_per_step, "validation": 5, "heldout": 5}
        lacks = self.constitution.lacks(prompts) if self.constitution else ""
        gate = Gate(
            f"at least {needed['train']} training, 5 validation and 5 held-out prompts"
            + (", of these some harmful and some ordinary ones" if self.constitution else ""),
            ", ".join(f"{n} {name}" for name, n in sizes.items()) + lacks,
            all(sizes[name] >= n for name, n in needed.items()) and not lacks,
            "Add prompts, fifty in all or more (a tenth validates and a quarter is held out, by id), then accord resume; or lower rl.prompts_per_step."
            + (" What kind one is its theme says (docs/constitution.md)." if lacks else ""),
        )
        return Done(gate, {"splits": sizes, "themes": themes})

    def split(self, name: str) -> list[Prompt]:
        return [p for p in read_prompts(self.run.folder / "prompts.jsonl") if split_of(p.id) == name]

    def completions(self) -> Done:
        path = self.run.folder / "sampled.jsonl"
        prompts = [*self.split("train"), *self.split("validation")]
        sample_to(path, self.policy, prompts, **self.recipe.sample.model_dump())
        sampled = [c for group in read_completions(path).values() for c in group]
        tokens = sum(len(c.tokens) for c in sampled)
        words = sum(bool(c.text.strip()) for c in sampled) / len(sampled)
        finished = sum(c.finished for c in sampled) / len(sampled)
        gate = Gate(
            "at least 90% of completions with text",
            f"{words:.1%} of {len(sampled)}",
            words >= 0.9,
            "Check the model and its chat template.",
        )
        return Done(gate, {"completions": len(sampled), "finished": finished}, tokens)

    def feedback(self) -> Done:
        settings = self.recipe.feedback
        completions = read_completions(self.run.folder / "sampled.jsonl")
        more: dict[str, Any] = {}
        if self.constitution:
            ranked, more = self.constitution.feedback(completions)
        else:
            ranked = rank(completions, self.run.folder / "labels.db", settings)
        write_lines(self.run.folder / "rankings.jsonl", (r.to_json() for r in ranked.rankings))
        groups = self.groups(ranked)
        pairs = (
            round(sum(p.weight for g in groups for p in g.pairs)) if self.constitution else sum(len(g.pairs) for g in groups)
        )  # of soft ones two are one
        standing = [ranking for given in rankings_by_prompt(ranked.rankings).values() for ranking in given]
        ranks = [r for ranking in standing for r in ranking.ranks]
        ties = sum(len(given) - len(set(given)) for ranking in standing if (given := [r for r in ranking.ranks if r]))
        facts = {
            "labelers": sorted({r.labeler for r in standing}),
            "rankings": len(standing),
            "pairs": pairs,
            "tied_share": ties / max(len(ranks), 1),
            "fail_share": sum(r is None for r in ranks) / max(len(ranks), 1),
            **more,
        }
        least = self.recipe.gates.min_pairs
        return Done(Gate(f"at least {least} pairs", str(pairs), pairs >= least, "Sample more prompts or completions."), facts)

    def groups(self, ranked: RankedCompletions) -> list[PairGroup]:
        """What the reward model learns from."""
        return self.constitution.pairs(ranked) if self.constitution else group_pairs(ranked.completions, ranked.rankings, self.recipe.reward.fail_weight)  # fmt: skip

    def reward(self) -> Done:
        completions = read_completions(self.run.folder / "sampled.jsonl")
        groups = self.groups(RankedCompletions(completions, read_rankings(self.run.folder / "rankings.jsonl")))
        train, held = ([g for g in groups if split_of(g.prompt.id) == name] for name in ("train", "validation"))
        train += self.constitution.helpful() if self.constitution else []
        _, report = save_reward(self.run.folder / "reward", self.policy, train, held, self.recipe.reward, True, self.run.allow_changes)
        least, accuracy = self.recipe.gates.reward_accuracy, report.accuracy
        gate = Gate(
            f"held-out accuracy with a lower bound of at least {least:g}",
            f"{accuracy} on {report.heldout_pairs} pairs of {report.heldout_groups} prompts",
            accuracy.low >= least,
            "Give more rankings, or train longer (reward.epochs) or deeper (reward.top_layers).",
        )
        return Done(gate, report.to_json(), sum(len(c.tokens) for g in groups for c in g.completions) * self.recipe.reward.epochs)

    def rl(self) -> Done:
        source = own_reward(self.run, self.policy, self.recipe)
        outcome = run_rl(self.run, self.policy, self.split("train"), source, self.recipe.rl, self.split("validation"))
        metrics = [m for m in self.run.read("metrics.jsonl") if m["step"] >= 0]
        kl, limit = metrics[-1]["kl"], self.recipe.gates.max_kl
        gate = Gate(
            f"KL under {limit:g} nats a completion", f"{kl:.1f} after {outcome.steps} steps ({outcome.stopped})", kl < limit,
            "Raise rl.kl_coef, lower rl.kl_target or rl.learning_rate.",
        )  # fmt: skip
        return Done(gate, {"stopped": outcome.stopped, "steps": outcome.steps, "kl": kl}, int(sum(m["tokens"] for m in metrics)))

    def evaluation(self) -> Done:
        aligned = Policy.load(str(self.run.folder / "policy"), self.recipe.rl.dtype)
        comparison = compare_policies(
            aligned, self.policy, self.split("heldout"), str(self.run.folder / "reward"), **self.recipe.evaluation.model_dump()
        )
        save_comparison(self.run.folder, comparison)
        tokens = sum(int(m.values["length"]) for pair in comparison.samples for m in pair)
        if self.constitution:
            gate, found = self.constitution.compared(comparison, self.split("heldout"))
            return Done(gate, {**comparison.to_json(), "constitution": found}, tokens)
        wins, least = comparison.win_rate, self.recipe.gates.win_rate
        if wins is None:
            change = comparison.change["score"]
            gate = Gate(
                "a held-out score that rises, interval above zero", str(change), change.low > 0, "Train longer, or check the reward."
            )
        else:
            drop, most = comparison.change.get("parses"), self.recipe.gates.parse_drop
            kept = drop is None or drop.value >= -most
            gate = Gate(
                f"win rate by gold with a lower bound of at least {least:g}" + ("" if drop is None else f", share of the grammar no more than {most:g} lower"),
                str(wins) + ("" if drop is None else f", {drop.value:+.3f}"), wins.low >= least and kept,
                "Train longer (rl.max_steps); if the score rose and gold did not, the reward model is being gamed: read report.html.",
            )  # fmt: skip
        return Done(gate, comparison.to_json(), tokens)

    def summary(self) -> None:
        facts = next(row["facts"] for row in reversed(self.run.read("stages.jsonl")) if row["stage"] == "evaluation")
        print_comparison(facts)
        if "constitution" in facts:
            print_models(facts["constitution"])
        rows = self.run.read("stages.jsonl")
        total, peak = sum(r["seconds"] for r in rows), max(r["peak_memory_gb"] for r in rows)
        console.print(f"All gates passed in {total / 60:.1f} minutes, peak memory {peak:.1f} GB.")
        console.print(f"Report: {self.run.folder / 'report.html'}", soft_wrap=True)
        console.print(f"Model:  {self.run.folder / 'policy'}   (try: accord chat --model {self.run.folder / 'policy'})", soft_wrap=True)


def own_reward(run: Run, policy: Policy, recipe: Recipe) -> Reward:
    """The reward model that the run has trained, and with a constitution the rules beside it; names in the logs do not depend on where the
    folder is."""
    reward = build_reward(str(run.folder / "reward"), policy)
    reward.sources[0][1].name = "reward_model"
    if recipe.constitution and recipe.constitution.rules_weight:
        reward.add(recipe.constitution.rules_weight, Rules())
    return reward


def announce_run(recipe: Recipe) -> None:
    """Print what ``accord run`` will need.

    Raises:
        UserError: more memory than there is, or something that the recipe names is not there.
    """
    announce(recipe.rl, plan_recipe(recipe, recipe_prompts(recipe)))
    if recipe.constitution and (recipe.constitution.writer or recipe.constitution.judge != RULES or recipe.constitution.helpful_pairs):
        console.print("[dim]Not counted: another model as writer or judge, services, and people's pairs.[/]", soft_wrap=True)


def recipe_prompts(recipe: Recipe) -> list[Prompt]:
    """The prompts a recipe names; ``bundled``, ``stories`` and ``red-team`` are accord's own."""
    if recipe.prompts == "stories":
        return story_prompts()
    if recipe.prompts == "red-team":
        return red_team_prompts()
    return bundled_prompts() if recipe.prompts == "bundled" else read_prompts(recipe.prompts)


def save_comparison(folder: Path, comparison: Comparison) -> None:
    """``evaluation.json``, every evaluated completion, and the first twelve prompts by id for the report."""
    samples = [[m.to_json() for m in pair] for pair in first_by_id(comparison)]
    write_whole(folder / "evaluation.json", json.dumps({**comparison.to_json(), "samples": samples}, indent=1, ensure_ascii=False))
    rows = [{"model": side, **m.to_json()} for pair in comparison.samples for side, m in zip(("reference", "aligned"), pair, strict=True)]
    write_lines(folder / "evaluated.jsonl", rows)


def start(recipe: Recipe, out: str | Path) -> Pipeline:
    """A new run of a recipe, after what it will need is printed. The model is opened first: a wrong name leaves no folder.

    Raises:
        UserError: it needs more memory than there is.
    """
    refuse_existing(Path(out))
    if recipe.constitution:  # what is wrong with what it names is told now, not after an hour
        Constitutional.check(recipe.constitution)
    announce_run(recipe)
    policy = None if recipe.base or recipe.constitution else Policy.load(recipe.model, recipe.rl.dtype)
    return Pipeline(recipe, Run.create(out, {"command": "run", "recipe": recipe.model_dump()}), policy)


def explain_run(folder: str | Path, row: int = 0) -> Explained:
    """:func:`accord.rl.explain.explain` of a run of ``accord rl`` or of a recipe."""
    run, config = Run.open(folder)
    where = str(Path(folder) / "config.yaml")
    if config["command"] == "run":
        stages = Pipeline(build(Recipe, config["recipe"], where), run)
        if not (run.folder / "reward").is_dir():
            raise UserError(f"{folder} has no reward model yet, so there is no objective; go on with it: accord resume {folder}")
        source = own_reward(run, stages.policy, stages.recipe)
        return explain(stages.policy, stages.split("train"), source, stages.recipe.rl, run.saved.newest(), row=row)
    if config["command"] != "rl":
        raise UserError(f"{folder} is a run of accord {config['command']}, which has no objective; give one of accord rl, demo or run.")
    p = prepare_rl(config, where)
    try:
        return explain(p.policy, p.prompts, p.reward, p.settings, run.saved.newest(), p.environment, row)
    finally:
        p.reward.close()
