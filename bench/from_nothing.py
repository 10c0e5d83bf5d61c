"""The recipe from-nothing over several seeds, as the table in docs/from-nothing.md.

.venv/bin/python bench/from_nothing.py 0 1 2          # runs what is missing under runs/, then writes the table
"""

from seeds import ROOT, Run, Seeds, interval


def column(run: Run) -> dict[str, str]:
    stages, found = run.facts, run.evaluation
    pretrained, before, after, change = stages["pretrain"], found["before"], found["after"], found["change"]
    moved = lambda name: f"{before[name]['value']:.3f} → {after[name]['value']:.3f} ({interval(change[name], 3)})"
    return {
        "bits a byte, held out; the grammar's own": f"{pretrained['bits_per_byte']:.4f}; {pretrained['entropy_rate']:.4f} ({pretrained['ratio'] - 1:+.1%})",
        "pretrained: share of what it writes that is a story": interval(pretrained["parses"], 3),
        "the same, sampled at temperature 1": interval(pretrained["parses_at_1"], 3),
        "of these stories, not in the corpus": f"{pretrained['new']:.1%}",
        "tuned: held-out wishes followed": interval(stages["sft"]["follows"], 3),
        "reward model, held-out accuracy": interval(stages["reward"]["accuracy"], 3),
        "PPO, held-out wishes: **ends kindly**": f"**{moved('kind')}**",
        "is a story": moved("parses"),
        "is what was asked for": moved("follows"),
        "win rate by gold": interval(found["win_rate"], 3),
        "KL to the reference (nats a completion)": interval(found["kl"], 1),
        **run.cost,
    }


if __name__ == "__main__":
    Seeds(
        "from-nothing", ["run", "from-nothing"], ROOT / "docs/from-nothing.md", column, "", "Before → after (change), 95% intervals."
    ).main("bench/from_nothing.py")
