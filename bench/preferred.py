"""DPO from the demo's pairs beside PPO from its reward model: the table in docs/prefer.md.

    .venv/bin/python bench/preferred.py                    # needs runs/demo (make demo); runs what is missing under runs/
    .venv/bin/python bench/preferred.py 1e-5 1e-4 3e-4     # at these learning rates

Both learn from the same rankings, in the same layers, and are measured on the same held-out prompts with the same luck.
"""

import json
import subprocess
import sys

import yaml
from seeds import ROOT, Run, interval, machine

DEMO, PAGE, SCRIPT = ROOT / "runs/demo", ROOT / "docs/prefer.md", "bench/preferred.py"
START, END = f"<!-- numbers: {SCRIPT} writes this part -->", "<!-- /numbers -->"
RATES = ("1e-5", "1e-4")


def accord(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "accord", *map(str, words)], check=True, cwd=ROOT)


def tuned(rate: str, layers: int) -> Run:
    """A run of DPO at this rate, measured as the demo was."""
    where = ROOT / f"runs/demo-dpo-{rate}"
    if (where / "config.yaml").exists():
        accord("resume", where)
    else:
        accord("prefer", "--completions", DEMO / "sampled.jsonl", "--rankings", DEMO / "rankings.jsonl", "--adaptation", "split",
               "--top-layers", layers, "--learning-rate", rate, "--out", where)  # fmt: skip
    measured = ROOT / f"runs/demo-dpo-{rate}-evaluated"
    if not (measured / "evaluation.json").exists():
        held = where / "held.jsonl"
        held.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "split"}) + "\n" for row in heldout()))
        (where / "evaluation.yaml").write_text(yaml.safe_dump(recipe()["evaluation"]))
        accord("evaluate", "--model", where / "policy", "--prompts", held, "--config", where / "evaluation.yaml", "--reward", DEMO / "reward", "--out", measured)
    return Run(measured)


def heldout() -> list[dict]:
    rows = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "heldout"]


def recipe() -> dict:
    return yaml.safe_load((DEMO / "config.yaml").read_text())["recipe"]


def row(name: str, found: dict, minutes: float) -> str:
    score, gold = (f"{found['before'][m]['value']:.3f} → {interval(found['after'][m], 3)}" for m in ("score", "gold"))
    return f"| {name} | **{interval(found['win_rate'], 3)}** | {gold} | {score} | {interval(found['kl'], 1)} | {minutes:.1f} |"


def main() -> None:
    if not (DEMO / "evaluation.json").exists():
        raise SystemExit("runs/demo is missing or not done: run make demo first.")
    rates, rl = sys.argv[1:] or RATES, recipe()["rl"]
    seconds = {stage["stage"]: stage["seconds"] for stage in Run(DEMO).stages}
    lines = [
        "| | win rate by gold | gold score | the demo's reward model | KL, nats a completion | minutes of training |", "|---|---|---|---|---|---|",
        row(f"PPO, {rl['max_steps']} steps, {rl['learning_rate']:g}; with its reward model", Run(DEMO).evaluation, (seconds["reward"] + seconds["rl"]) / 60),
    ]  # fmt: skip
    for rate in rates:
        found = tuned(rate, rl["top_layers"])
        history = [json.loads(line) for line in (ROOT / f"runs/demo-dpo-{rate}/timings.jsonl").read_text().splitlines()]
        spent = sum(value for one in history for name, value in one.items() if name != "step")
        lines.append(row(f"DPO, an epoch, {rate}", found.evaluation, spent / 60))
        print(lines[-1], flush=True)
    text = "\n".join([
        *lines, "",
        f"Before → after, on {len(heldout())} held-out prompts, two completions each; 95% intervals over prompts. Both train the {rl['top_layers']} top layers. {machine()}. Made by `python {SCRIPT} {' '.join(rates)}`.",
    ])  # fmt: skip
    head, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{head}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")
    print(text)


if __name__ == "__main__":
    main()
