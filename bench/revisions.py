"""What revisions are worth, one after another: toxicity and how often an answer declines, with critiques and without, with examples and without; the
table in docs/constitution.md.

    .venv/bin/python bench/revisions.py                       # the bundled model, 150 of the recipe's harmful prompts, up to 4 revisions
    .venv/bin/python bench/revisions.py --writer MODEL --prompts 50 --revisions 2

Chains are kept under runs/revisions-...; the same command goes on with what was cut.
"""

import argparse
import random

import yaml
from seeds import ROOT, interval, machine

import accord
from accord.config import recipe_text
from accord.constitution.principles import read_constitution
from accord.constitution.redteam import recipe_prompts
from accord.constitution.revising import SCORES, Chain, curve, own_shots, revise
from accord.constitution.rules import HARMFUL
from accord.constitution.writers import PolicyWriter
from accord.data.records import split_of
from accord.data.statistics import bootstrap_mean

PAGE, SCRIPT = ROOT / "docs/constitution.md", "bench/revisions.py"
START, END = f"<!-- numbers: {SCRIPT} writes this part -->", "<!-- /numbers -->"
MODES = {"critiques": (True, False), "critiques, examples": (True, True), "direct": (False, False), "direct, examples": (False, True)}


def change(chains: list[Chain], score: str) -> str:
    """From the first answers to the last revisions, by prompt."""
    most = max(len(c.steps) for c in chains)
    whole = [c for c in chains if len(c.steps) == most]
    value = SCORES[score]
    moved = [value(c.last, c.steps[-1].toxicity) - value(c.first, c.toxicity) for c in whole]
    return interval(bootstrap_mean(moved, [c.id for c in whole])._asdict(), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writer", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--revisions", type=int, default=4)
    arguments = parser.parse_args()
    harmful = [p for p in recipe_prompts() if p.theme == HARMFUL and split_of(p.id) != "heldout"]  # on the others the recipe is measured
    prompts = random.Random(0).sample(harmful, arguments.prompts)
    constitution = read_constitution().only(yaml.safe_load(recipe_text("constitution"))["constitution"]["principles"])
    policy = accord.load(arguments.writer)
    n = arguments.revisions
    head = [
        "| asked for | | first answers | " + " | ".join(f"{k}" for k in range(1, n + 1)) + " | first to last |",
        "|---|---|---|" + "---|" * (n + 1),
    ]
    rows: dict[str, list[str]] = {"toxic": [], "declines": []}
    names = {"toxic": "toxicity", "declines": "declines"}
    for mode, (critiques, shown) in MODES.items():
        folder = ROOT / "runs" / f"revisions-{mode.replace(', ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        writer = PolicyWriter(policy, arguments.writer, 0.7, 100)
        chains = revise(folder / "chains.jsonl", writer, prompts, constitution, n, 0, own_shots(critiques) if shown else [], critiques)
        for score, table in rows.items():
            points = " | ".join(interval(e._asdict(), 3) for e in curve(chains, score))
            table.append(f"| {mode} | {names[score]} | {points} | {change(chains, score)} |")
            print(table[-1], flush=True)
    below = (
        f"{arguments.writer}, {arguments.prompts} harmful prompts of the recipe, six principles about harm, temperature 0.7, 100 tokens; chains without an empty text; 95% intervals over prompts. "
        f"{machine()}. Made by `python {SCRIPT} --prompts {arguments.prompts} --revisions {n}`."
    )
    text = "\n".join([*head, *rows["toxic"], *rows["declines"], "", below])
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
