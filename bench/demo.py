"""The demo over several seeds, as the table in the README.

.venv/bin/python bench/demo.py 0 1 2          # runs what is missing under runs/, then writes the table
"""

from seeds import ROOT, Run, Seeds, interval


def column(run: Run) -> dict[str, str]:
    facts = run.evaluation
    before, after = facts["before"], facts["after"]
    out = {
        "reward model, held-out accuracy": interval(run.facts["reward"]["accuracy"], 3),
        "**win rate by gold**": f"**{interval(facts['win_rate'], 3)}**",
        "KL to the reference (nats a completion)": interval(facts["kl"], 1),
        "toxicity, harmful theme: aligned / reference": interval(facts["harmful_ratio"], 2),
    }
    for label, name in (
        ("gold score", "gold"),
        ("share that finishes", "finished"),
        ("length (tokens)", "length"),
        ("distinct-2", "distinct_2"),
    ):
        digits = 1 if name == "length" else 3
        out[f"{label}: reference → aligned"] = f"{before[name]['value']:.{digits}f} → {interval(after[name], digits)}"
    return out | run.cost


if __name__ == "__main__":
    Seeds("demo", ["demo"], ROOT / "README.md", column, "held-out prompts", "95% intervals, bootstrapped over prompts.").main(
        "bench/demo.py"
    )
