"""The demo over several seeds, as the table in the README.

    .venv/bin/python bench/demo.py 0 1 2          # runs what is missing under runs/, then writes the table

It runs ``accord demo --seed N`` in a process of its own (so that peak memory is the demo's), reads what the run
folders say, and replaces the part of README.md between the two ``numbers`` marks.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
START, END = "<!-- numbers: bench/demo.py writes this part -->", "<!-- /numbers -->"


def folder(seed: int) -> Path:
    return ROOT / "runs" / ("demo" if seed == 0 else f"demo-seed-{seed}")


def run(seed: int) -> None:
    """Run the demo for this seed unless its folder is there; a run that was cut is resumed."""
    where = folder(seed)
    command = ["resume", str(where)] if where.exists() else ["demo", "--seed", str(seed), "--out", str(where)]
    subprocess.run([sys.executable, "-m", "accord", *command], check=True, cwd=ROOT)


def interval(e: dict, digits: int) -> str:
    return f"{e['value']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def column(seed: int) -> dict[str, str]:
    stages = [json.loads(line) for line in (folder(seed) / "stages.jsonl").read_text().splitlines()]
    facts = json.loads((folder(seed) / "evaluation.json").read_text())
    reward = next(s["facts"] for s in stages if s["stage"] == "reward")
    before, after = facts["before"], facts["after"]
    out = {
        "reward model, held-out accuracy": interval(reward["accuracy"], 3),
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
    out["minutes"] = f"{sum(s['seconds'] for s in stages) / 60:.1f}"
    out["peak memory (GB)"] = f"{max(s['peak_memory_gb'] for s in stages):.1f}"
    return out


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(seeds: list[int]) -> str:
    columns = [column(seed) for seed in seeds]
    lines = ["| held-out prompts | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---|" + "---|" * len(seeds)]
    lines += [f"| {name} | " + " | ".join(c[name] for c in columns) + " |" for name in columns[0]]
    machine = f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {version('torch')}"
    lines += ["", f"95% intervals, bootstrapped over prompts. {machine}. Made by `python bench/demo.py {' '.join(map(str, seeds))}`."]
    return "\n".join(lines)


def main() -> None:
    seeds = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
    for seed in seeds:
        run(seed)
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(START)
    readme.write_text(f"{head}{START}\n{table(seeds)}\n{END}{rest.split(END)[1]}")
    print(table(seeds))


if __name__ == "__main__":
    main()
