"""The recipe from-nothing over several seeds, as the table in docs/from-nothing.md.

.venv/bin/python bench/from_nothing.py 0 1 2          # runs what is missing under runs/, then writes the table
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from demo import interval, processor  # noqa: E402

PAGE = ROOT / "docs/from-nothing.md"
START, END = "<!-- numbers: bench/from_nothing.py writes this part -->", "<!-- /numbers -->"


def folder(seed: int) -> Path:
    return ROOT / "runs" / ("from-nothing" if seed == 0 else f"from-nothing-seed-{seed}")


def run(seed: int) -> None:
    """Run the recipe for this seed unless its folder is there; a run that was cut is resumed."""
    where = folder(seed)
    command = ["resume", str(where)] if where.exists() else ["run", "from-nothing", "--seed", str(seed), "--out", str(where)]
    subprocess.run([sys.executable, "-m", "accord", *command], check=True, cwd=ROOT)


def column(seed: int) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder(seed) / "stages.jsonl").read_text().splitlines()]
    stages = {row["stage"]: row["facts"] for row in rows}
    pretrained, found = stages["pretrain"], json.loads((folder(seed) / "evaluation.json").read_text())
    before, after, change = found["before"], found["after"], found["change"]
    moved = lambda name: f"{before[name]['value']:.3f} → {after[name]['value']:.3f} ({interval(change[name], 3)})"
    return {
        "bits a byte, held out; the grammar's own": f"{pretrained['bits_per_byte']:.4f}; {pretrained['entropy_rate']:.4f} ({pretrained['ratio'] - 1:+.1%})",
        "pretrained: share of what it writes that is a story": interval(pretrained["parses"], 3),
        "of these stories, not in the corpus": f"{pretrained['new']:.1%}",
        "tuned: held-out wishes followed": interval(stages["sft"]["follows"], 3),
        "reward model, held-out accuracy": interval(stages["reward"]["accuracy"], 3),
        "PPO, held-out wishes: **ends kindly**": f"**{moved('kind')}**",
        "is a story": moved("parses"),
        "is what was asked for": moved("follows"),
        "win rate by gold": interval(found["win_rate"], 3),
        "KL to the reference (nats a completion)": interval(found["kl"], 1),
        "minutes": f"{sum(row['seconds'] for row in rows) / 60:.1f}",
        "peak memory (GB)": f"{max(row['peak_memory_gb'] for row in rows):.1f}",
    }


def table(seeds: list[int]) -> str:
    columns = [column(seed) for seed in seeds]
    lines = ["| | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---|" + "---|" * len(seeds)]
    lines += [f"| {name} | " + " | ".join(c[name] for c in columns) + " |" for name in columns[0]]
    machine = f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {version('torch')}"
    lines += ["", f"Before → after (change), 95% intervals. {machine}. Made by `python bench/from_nothing.py {' '.join(map(str, seeds))}`."]
    return "\n".join(lines)


def main() -> None:
    seeds = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
    for seed in seeds:
        run(seed)
    text = PAGE.read_text()
    head, rest = text.split(START)
    PAGE.write_text(f"{head}{START}\n{table(seeds)}\n{END}{rest.split(END)[1]}")
    print(table(seeds))


if __name__ == "__main__":
    main()
