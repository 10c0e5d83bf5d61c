"""The stages that Constitutional AI adds to a recipe: revisions and their tuning before the others, AI feedback, and what came of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from accord.api import rank
from accord.config import Principled, Recipe
from accord.constitution.endpoint import Endpoint, is_endpoint
from accord.constitution.judges import judge_of
from accord.constitution.judging import Feedback, compare, rankings, soft_pairs
from accord.constitution.principles import read_constitution
from accord.constitution.revising import Chain, curve, examples, page, revise, revision_charts, shots_of
from accord.constitution.routing import Routed, agreement_with, for_people
from accord.constitution.rules import ALARMING, HARMFUL, NAME, ORDINARY, by_rules, kind_of, measures
from accord.constitution.writers import PolicyWriter, writer_of
from accord.data.charts import line_chart
from accord.data.pairs import group_pairs
from accord.data.records import Completion, PairGroup, Prompt, RankedCompletions, as_chat, split_of
from accord.data.sources import read_pairs, read_prompts
from accord.data.statistics import Estimate, bootstrap_mean
from accord.disk import read_lines, write_lines, write_whole
from accord.errors import UserError
from accord.evaluation.compare import Comparison
from accord.evaluation.summary import interval
from accord.feedback.export import group_rows
from accord.nn import bundled
from accord.nn.loading import model_folder
from accord.progress import console
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.runs import Run
from accord.stages import Done, Gate, falls
from accord.tuning import train_sft

MEASURES = {
    "harmful": ("harmful answers, of those to harmful prompts", "harmful", HARMFUL),
    "refuses harmful": ("refuses what is harmful", "refuses", HARMFUL),
    "refuses alarming": ("refuses what only sounds harmful", "refuses", ALARMING),
    "refuses ordinary": ("refuses ordinary requests", "refuses", ORDINARY),
    "toxicity": ("toxicity of answers to harmful prompts", "toxicity", HARMFUL),
    "helpful": ("gold score of answers to ordinary requests", "gold", ORDINARY),
    "helpful, alarming": ("gold score of answers to what only sounds harmful", "gold", ALARMING),
}
"""What is told of each model: in words, of which measure, on prompts of which kind."""
OWN_JUDGEMENT = "0.441 [0.389, 0.492]"
"""Of the bundled model, as bench/judge.py has measured it (docs/constitution.md)."""
SHOWN = 12
"""Chains in the report."""
NOTHING = {"value": 0.0, "low": 0.0, "high": 0.0}
SIDES = ("first", "revised", "aligned")


class Constitutional:
    """See the module's docstring. Each stage reads what the ones before it wrote."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        assert recipe.constitution is not None
        self.recipe, self.settings, self.run = recipe, recipe.constitution, run

    @property
    def stages(self) -> Sequence[tuple[str, Callable[[], Done]]]:
        return (("revisions", self.revisions), ("sft", self.sft))

    @property
    def model(self) -> Path:
        """What the recipe's other stages begin with."""
        return self.run.folder / "sft/policy"

    @staticmethod
    def check(settings: Principled) -> None:
        """Raises:
        UserError: a file that the settings name is not there or is wrong, or a service has no model's name.
        """
        read_constitution(settings.file).only(settings.principles)
        shots_of(settings.shots, settings.critiques)
        if settings.helpful_pairs:
            read_pairs(settings.helpful_pairs)
        for spec, model, option in (
            (settings.writer, settings.writer_model, "writer_model"),
            (settings.judge, settings.judge_model, "judge_model"),
        ):
            if spec and is_endpoint(spec):
                Endpoint.check_name(model, f"constitution.{option}")
            elif spec and spec != NAME:
                model_folder(spec)

    @staticmethod
    def lacks(prompts: Sequence[Prompt]) -> str:
        """What kinds of prompts there are none of, in training or held out; empty if of all there are some."""
        there = {(split_of(p.id), kind_of(p)) for p in prompts}
        missing = [
            f"{kind} in {name}"
            for name, kind in (("train", HARMFUL), ("heldout", HARMFUL), ("heldout", ORDINARY))
            if (name, kind) not in there
        ]
        return f"; none that are {', '.join(missing)}" if missing else ""

    def first(self) -> Policy:
        """The recipe's model as it was."""
        return Policy.load(self.recipe.model, self.recipe.rl.dtype)

    def revisions(self) -> Done:
        s, folder = self.settings, self.run.folder
        prompts = [p for p in read_prompts(folder / "prompts.jsonl") if split_of(p.id) != "heldout"]
        harmful, others = ([p for p in prompts if (kind_of(p) == HARMFUL) == wanted] for wanted in (True, False))
        if not harmful:
            raise UserError(
                f"No prompt to learn from has the theme '{HARMFUL}', so there is nothing to revise; add some: accord constitution prompts."
            )
        whole = read_constitution(s.file)
        constitution = whole.only(s.principles)
        writer = (
            writer_of(s.writer, s.writer_model, Policy.load, s.temperature, s.max_new_tokens, s.seed, **s.service)
            if s.writer
            else PolicyWriter(self.first(), self.recipe.model, s.temperature, s.max_new_tokens, s.seed)
        )
        chains = revise(
            folder / "chains.jsonl",
            writer,
            harmful,
            constitution,
            s.revisions,
            s.seed,
            shots_of(s.shots, s.critiques),
            s.critiques,
            s.declined,
            s.attempts,
        )
        plain = revise(folder / "ordinary.jsonl", writer, others, constitution, 0, s.seed, attempts=s.attempts) if others else []
        revised = list(examples(chains, "train"))
        write_lines(folder / "examples.jsonl", [*revised, *examples(plain, "train")])
        write_lines(folder / "measured.jsonl", examples(chains, "validation"))
        write_whole(folder / "chains.html", page(chains, writer.name, constitution.label))
        kept, least = sum(not c.dropped for c in chains), self.recipe.gates.min_examples
        toxic, declining = curve(chains), curve(chains, "declines")
        facts = {
            "writer": writer.name,
            "constitution": constitution.label,
            "whole": whole.label,
            "prompts": len(harmful),
            "chains": len(chains),
            "kept": kept,
            "ordinary": sum(not c.dropped for c in plain),
            "dropped": dict(Counter(c.dropped.split(":")[0] for c in (*chains, *plain) if c.dropped).most_common()),
            "toxic": [e.to_json() for e in toxic],
            "declines": [e.to_json() for e in declining],
        }
        gate = Gate(
            f"at least {least} revisions to learn from",
            f"{len(revised)}; of {len(harmful)} prompts {kept} have one, in {len(chains)} chains; declines: {' -> '.join(f'{e.value:.2f}' for e in declining)}; toxic: {' -> '.join(f'{e.value:.3f}' for e in toxic)}",
            len(revised) >= least,
            "Add harmful prompts, give more examples (constitution.shots) or another writer (constitution.writer).",
        )  # fmt: skip
        return Done(gate, facts)

    def sft(self) -> Done:
        measured = self.run.folder / "measured.jsonl"
        tuned = train_sft(
            Policy.load(self.recipe.model, self.settings.sft.dtype), self.run.folder / "examples.jsonl", validation=measured if read_lines(measured) else None,
            out=self.run.folder / "sft", resume=True, allow_changes=self.run.allow_changes, **self.settings.sft.model_dump(),
        )  # fmt: skip
        return Done(falls(tuned.before, tuned.after, "loss", "nats a token"), {"before": tuned.before, "after": tuned.after})

    def feedback(self, completions: Mapping[str, Sequence[Completion]]) -> tuple[RankedCompletions, dict[str, Any]]:
        """AI feedback: the judge's pairs in ``ai-pairs.jsonl``, and all rankings, people's where the judge is unsure among them."""
        s = self.settings
        groups = [list(group) for group in completions.values() if len(group) > 1]
        found = self.judged(groups)
        asked = for_people(found, groups, s.unsure, s.sample, s.seed) if s.people != "nobody" else Routed()
        some = {key: list(completions[key]) for key in asked.all}
        wanted = self.recipe.feedback.model_copy(update={"labelers": s.people})
        people = rank(some, self.run.folder / "labels.db", wanted).rankings if some else []
        theirs = {r.prompt_id for r in people if r.prompt_id in asked.unsure}
        pairs = [g for g in soft_pairs(groups, found) if g.prompt.id not in theirs]
        write_lines(self.run.folder / "ai-pairs.jsonl", group_rows(pairs, []))
        ai = rankings(groups, found)
        agree = agreement_with(found, [r for r in people if r.prompt_id in set(asked.sample)])
        facts = {
            "judge": found.judge,
            "constitution": found.constitution,
            "compared": len(found.compared),
            "problems": len(found.problems),
            "people": s.people,
            "unsure": len(asked.unsure),
            "sample": len(asked.sample),
            "position_bias": found.position_bias.to_json() if any(c.biases for c in found.compared) else None,
            "agreement": agree and agree.to_json(),
        }
        return RankedCompletions({key: list(group) for key, group in completions.items()}, [*ai, *people]), facts

    def judged(self, groups: Sequence[Sequence[Completion]]) -> Feedback:
        s = self.settings
        if s.judge == NAME:
            return by_rules(groups)
        constitution = read_constitution(s.file)
        before = next(row["facts"]["whole"] for row in self.run.read("stages.jsonl") if row["stage"] == "revisions")
        if before != constitution.label:
            raise UserError(
                f"{s.file} has changed since the revisions ({before}; now {constitution.label}); put it back, or begin a new run."
            )
        judge = judge_of(s.judge, s.judge_model, Policy.load, **s.service)
        return compare(judge, groups, constitution, s.ensemble, s.kept_within, s.thinking, s.seed)

    def pairs(self, ranked: RankedCompletions) -> list[PairGroup]:
        """The judge's pairs, and those of people of the prompts that it leaves to them."""
        path = self.run.folder / "ai-pairs.jsonl"
        judged = read_pairs(path) if read_lines(path) else []
        its = {g.prompt.id for g in judged}
        theirs = [r for r in ranked.rankings if not r.labeler.startswith("ai:") and r.prompt_id not in its]
        return [
            *judged,
            *(group_pairs(ranked.completions, theirs, self.recipe.reward.fail_weight) if theirs else []),
        ]

    def helpful(self) -> list[PairGroup]:
        """People's pairs that the recipe names; they belong to no split of its prompts."""
        return read_pairs(self.settings.helpful_pairs) if self.settings.helpful_pairs else []

    def compared(self, comparison: Comparison, prompts: Sequence[Prompt]) -> tuple[Gate, dict[str, Any]]:
        """What came of it: the model as it was, revised and aligned, on the same held-out prompts with the same luck; in ``constitution.json``."""
        s = self.recipe.evaluation
        first = Engine(self.first(), s.rows).sample(prompts, s.per_prompt, s.sampling()).completions()
        sides = [first, *([pair[k].completion for pair in comparison.samples] for k in (0, 1))]
        found = told(sides)
        write_whole(self.run.folder / "constitution.json", json.dumps(found, indent=1))
        gates, told_of = self.recipe.gates, lambda name: found["change"].get(name, {}).get("aligned", NOTHING)
        harm, helpful, needless = map(told_of, ("harmful", "helpful", "refuses alarming"))
        gate = Gate(
            f"fewer harmful answers than at first, interval below zero; gold score of ordinary requests no more than {gates.helpful_drop:g} lower; what only sounds harmful declined no more than {gates.over_refusal:g} more often",
            ", ".join(f"{name} {e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]" for name, e in (("harmful", harm), ("helpful", helpful), ("over-refusal", needless))),
            harm["high"] < 0 and helpful["value"] >= -gates.helpful_drop and needless["value"] <= gates.over_refusal,
            "If harm stays: more harmful prompts and revisions, or a stronger judge (constitution.judge). If too much is declined: more alarming and ordinary prompts, fewer epochs (constitution.sft.epochs), a stronger leash (rl.kl_coef).",
        )  # fmt: skip
        return gate, found

    def section(self) -> str:
        """What the report says of it, as HTML, of whatever there is so far."""
        folder = self.run.folder
        facts = {row["stage"]: row["facts"] for name in ("gates.jsonl", "stages.jsonl") for row in self.run.read(name)}
        path = folder / "constitution.json"
        measured = json.loads(path.read_text()) if path.exists() else None
        revisions = facts.get("revisions")
        last = {row["id"]: Chain.of(row) for row in read_lines(folder / "chains.jsonl")}  # of each prompt the last attempt
        chains = sorted(last.values(), key=lambda c: c.id)[:SHOWN] if revisions else []
        template = jinja2.Environment(autoescape=True).from_string((files("accord.constitution") / "section.html.j2").read_text())
        return template.render(
            measured=measured, frontier=frontier(measured) if measured else "", refusals=refusals(measured) if measured else "",
            rows=rows_of(measured) if measured else [], kept=revisions and revisions["kept"], all=revisions and revisions["chains"], prompts=revisions and revisions["prompts"],
            chains=[{"asked": as_chat(c.prompt)[-1]["content"], "of": c} for c in chains],
            curves=revision_charts(*([Estimate(**e) for e in revisions[name]] for name in ("toxic", "declines"))) if revisions else [],
            feedback=facts.get("feedback"), own=OWN_JUDGEMENT if self.settings.judge == NAME and self.recipe.model == bundled.NAME else "",
        )  # fmt: skip


def frontier(found: Mapping[str, Any]) -> str:
    """Harmlessness against helpfulness (Bai et al. 2022, figure 2, by other scores): a cross a model, as wide and high as its intervals."""
    values = found["values"]
    if not {"harmful", "helpful"} <= values.keys():
        return ""
    series = {}
    for side in SIDES:
        x, y = values["helpful"][side], {name: 1 - e for name, e in values["harmful"][side].items()}
        series[side] = [
            (x["low"], y["value"]),
            (x["high"], y["value"]),
            (x["value"], y["value"]),
            (x["value"], y["low"]),
            (x["value"], y["high"]),
        ]
    return line_chart(
        "Harmless (up) and helpful (right)", series,
        "Up: answers to harmful prompts that are not harmful. Right: gold score of answers to ordinary requests. Crosses are 95% intervals.", "helpful", span=0.05,
    )  # fmt: skip


def refusals(found: Mapping[str, Any]) -> str:
    """Share of answers that decline, by kind of prompt, from model to model."""
    kinds = {"harmful": "refuses harmful", "only sounds harmful": "refuses alarming", "ordinary": "refuses ordinary"}
    series = {
        label: [(k, found["values"][name][side]["value"]) for k, side in enumerate(SIDES)]
        for label, name in kinds.items()
        if name in found["values"]
    }
    return line_chart("Refuses", series, "Share of answers that decline or evade. 0: the model as it was, 1: revised, 2: aligned. Refusing what only sounds harmful is over-refusal.", "stage")  # fmt: skip


def told(sides: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Of the models of :data:`SIDES`, whose completions are of the same prompts in the same order: each of :data:`MEASURES`, and what has
    changed since the first, by prompt."""
    values = [measures(side) for side in sides]
    out: dict[str, Any] = {"values": {}, "change": {}}
    for name, (_, measure, kind) in MEASURES.items():
        at = [i for i, c in enumerate(sides[0]) if kind_of(c.prompt) == kind]
        if not at:
            continue
        ids = [sides[0][i].prompt.id for i in at]
        column = {side: [rows[i][measure] for i in at] for side, rows in zip(SIDES, values, strict=True)}
        moved = {side: [new - old for old, new in zip(column["first"], column[side], strict=True)] for side in SIDES[1:]}
        for what, table in (("values", column), ("change", moved)):
            out[what][name] = {side: bootstrap_mean(numbers, ids).to_json() for side, numbers in table.items()}
    return out


def rows_of(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What :func:`told` found as a table: measure, the three models, and what has changed from the first to the last."""
    return [
        (MEASURES[name][0], *(interval(sides[side]) for side in SIDES), interval(found["change"][name]["aligned"]))
        for name, sides in found["values"].items()
    ]


def print_models(found: Mapping[str, Any]) -> None:
    table = Table(title="The model as it was, revised, and aligned, on held-out prompts", title_justify="left")
    for column in ("", *SIDES, "change, first to aligned"):
        table.add_column(column)
    for row in rows_of(found):
        table.add_row(*row)
    console.print(table)
