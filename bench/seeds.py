"""A recipe over several seeds, as a table in a page: what bench/demo.py and bench/from_nothing.py share.

A seed is run in a process of its own (so that peak memory is the recipe's) unless its folder under runs/ is there; a run that was cut is
resumed. The table replaces what stands in the page between its two ``numbers`` marks.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from accord.config import Recipe, build, load_yaml, recipe_text
from accord.errors import GateMissed

ROOT = Path(__file__).parent.parent


def interval(e: dict, digits: int) -> str:
    return f"{e['value']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine() -> str:
    return f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {version('torch')}"


@dataclass(frozen=True)
class Run:
    """What a seed's folder says."""

    folder: Path

    @property
    def stages(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "stages.jsonl").read_text().splitlines()]

    @property
    def facts(self) -> dict[str, dict]:
        return {row["stage"]: row["facts"] for row in self.stages}

    @property
    def evaluation(self) -> dict:
        return json.loads((self.folder / "evaluation.json").read_text())

    @property
    def cost(self) -> dict[str, str]:
        return {
            "minutes": f"{sum(s['seconds'] for s in self.stages) / 60:.1f}",
            "peak memory (GB)": f"{max(s['peak_memory_gb'] for s in self.stages):.1f}",
        }


@dataclass(frozen=True)
class Seeds:
    """A recipe (``accord COMMAND``), and how a seed's run is told: rows of a table, a heading and a line below it."""

    name: str
    command: list[str]
    page: Path
    column: Callable[[Run], dict[str, str]]
    heading: str
    below: str

    def folder(self, seed: int) -> Path:
        return ROOT / "runs" / (self.name if seed == 0 else f"{self.name}-seed-{seed}")

    def run(self, seed: int) -> bool:
        """Whether it passed all its gates."""
        where = self.folder(seed)
        if where.exists():
            told = yaml.safe_load((where / "config.yaml").read_text())["recipe"]
            found = build(Recipe, told, str(where))  # with the defaults of what is new
            if found != build(Recipe, load_yaml(recipe_text(self.name), self.name), self.name).with_seed(seed):
                raise SystemExit(f"{where} is a run of another recipe than {self.name} is now; move it away.")
        command = ["resume", str(where)] if where.exists() else [*self.command, "--seed", str(seed), "--out", str(where)]
        code = subprocess.run([sys.executable, "-m", "accord", *command], cwd=ROOT).returncode
        if code not in (0, GateMissed.code):
            raise SystemExit(code)
        return code == 0

    def table(self, seeds: list[int], script: str) -> str:
        columns = [self.column(Run(self.folder(seed))) for seed in seeds]
        lines = [f"| {self.heading} | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---|" + "---|" * len(seeds)]
        lines += [f"| {name} | " + " | ".join(c[name] for c in columns) + " |" for name in columns[0]]
        return "\n".join([*lines, "", f"{self.below} {machine()}. Made by `python {script} {' '.join(map(str, seeds))}`."])

    def main(self, script: str) -> None:
        """Run what is missing of the seeds that the command line names, then write the table."""
        seeds = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
        missed = [seed for seed in seeds if not self.run(seed)]
        if missed:
            raise SystemExit(f"Seeds {missed} missed a gate; the table is of runs that passed all, so none is written.")
        start, end = f"<!-- numbers: {script} writes this part -->", "<!-- /numbers -->"
        head, rest = self.page.read_text().split(start)
        table = self.table(seeds, script)
        self.page.write_text(f"{head}{start}\n{table}\n{end}{rest.split(end, 1)[1]}")
        print(table)
