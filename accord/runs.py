"""The run folder: settings and their history, metrics, every completion, checkpoints, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from torch import Tensor

from accord.checkpoints import Checkpoints, Saved
from accord.disk import append_lines, disk_error, flush, lock, patiently, read_lines, repair_lines, write_lines, write_whole
from accord.errors import UserError
from accord.progress import console

STEPPED = ("metrics.jsonl", "timings.jsonl", "completions.jsonl", "rejects.jsonl", "warnings.jsonl")
"""Logs whose rows are of a training step; they are cut back to the checkpoint that training goes on from."""
LOGS = (*STEPPED, "history.jsonl", "stages.jsonl", "gates.jsonl", "sampled.jsonl")
FREE = {
    "max_steps", "stop_at_score", "kl_stop", "kl_warn", "checkpoint_every", "reward_timeout", "reward_memory", "max_rejected",
    "max_nonfinite", "on_divergence", "micro_batch_tokens", "entropy_warn", "flat_groups_warn", "saturation_warn", "value_warn",
    "gates",
}  # fmt: skip
"""Settings that say when to stop, to save, to warn or to be content, and do not change what a step computes (but for rounding)."""


class Run:
    """``runs/NAME/`` and the only writer in it while it is open.

    ``config.yaml``, ``history.jsonl`` (the settings it was started with, and each change since), ``metrics.jsonl``,
    ``timings.jsonl``, ``completions.jsonl``, ``warnings.jsonl``, ``checkpoints/step-N/``.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.saved, self.allow_changes = folder, Checkpoints(folder / "checkpoints", keep), False
        self._accepted: list[dict[str, Any]] = []  # changes that are written down with the first thing that is made with them
        self._lock = lock(folder)

    def close(self) -> None:
        """Let another writer in."""
        self._lock.close()

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any]) -> Run:
        """A new run folder with its settings written down, defaults included."""
        folder = Path(folder)
        refuse_existing(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from None
        run = cls(folder)
        write_lines(folder / "history.jsonl", [{"config": dict(config)}])
        write_whole(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        return run

    @classmethod
    def open(cls, folder: str | Path, allow_changes: bool = False) -> tuple[Run, dict[str, Any]]:
        """An existing run and its settings, torn last lines of its logs repaired.

        Raises:
            UserError: it is no run folder, it is in use, it is damaged, or ``config.yaml`` has other settings than the run was
                started with, which would change what its numbers mean, and ``allow_changes`` is not given.
        """
        folder = Path(folder)
        path = folder / "config.yaml"
        if not path.is_file():
            raise UserError(f"{folder} is not a run folder (it has no config.yaml); give the folder that --out named.")
        try:
            config = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict) or "command" not in config:
            raise UserError(f"{path} is damaged: it names no command.")
        return cls._opened(folder, config, allow_changes, "in config.yaml"), config

    @classmethod
    def go_on(cls, folder: str | Path, config: Mapping[str, Any], allow_changes: bool = False) -> Run:
        """An existing run, with settings that its caller gives; ``config.yaml`` has these then.

        Raises:
            UserError: it is in use, or they differ from what the run was started with.
        """
        run = cls._opened(Path(folder), config, allow_changes, "in this call")
        write_whole(run.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        return run

    @classmethod
    def _opened(cls, folder: Path, config: Mapping[str, Any], allow_changes: bool, where: str) -> Run:
        run = cls(folder)
        try:
            for name in LOGS:
                repair_lines(folder / name)
            run.allow_changes = allow_changes
            run.agree("config", config, where)
        except BaseException:
            run.close()
            raise
        return run

    def agree(self, kind: str, found: Mapping[str, Any], where: str) -> None:
        """Compare what the run goes on with to what it was started with (``history.jsonl``), and write down each difference.

        Args:
            kind: ``config``, or ``inputs``: the digests of what was read.
            where: that, in words.

        Raises:
            UserError: something differs that is not :data:`FREE`, and changes are not allowed.
        """
        rows = self.read("history.jsonl")
        before: dict[str, Any] = {}
        for row in rows:
            if kind in row:
                before = _flat(row[kind])
            elif row.get("changed") == kind:
                before |= {change["setting"]: change["to"] for change in row["changes"]}
        if not before:
            self.append("history.jsonl", [{kind: dict(found)}])
            return
        now = _flat(found)
        names = [n for n in dict.fromkeys([*before, *now]) if before.get(n) != now.get(n)]
        if not names:
            return
        told = ", ".join(f"{n} {before.get(n)!r} -> {now.get(n)!r}" for n in names)
        fixed = [n for n in names if not FREE & set(n.split("."))]
        if fixed and not self.allow_changes:
            those = ", ".join(_told(n, before, now) for n in fixed)
            raise UserError(
                f"{self.folder} was started with something else {where}: {those}. What it has learned so far is not what these say. "
                f"Put them back, start a new run, or accept it: accord resume {self.folder} --allow-changes (from Python: allow_changes=True)"
            )
        console.print(f"Going on with changed settings: {told}", soft_wrap=True, markup=False)
        newest = self.saved.all()
        changes = [{"setting": n, "from": before.get(n), "to": now.get(n)} for n in names]
        self._accepted.append({"changed": kind, "step": newest[-1][0] if newest else 0, "changes": changes})

    def log(self, step: int, stats: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line of metrics and the step's completions; how long it took is a line of ``timings.jsonl``."""
        seconds = {name.removeprefix("seconds/"): value for name, value in stats.items() if name.startswith("seconds/")}
        self.append("completions.jsonl", rows)
        if seconds:
            self.append("timings.jsonl", [{"step": step, **seconds}])
        self.append("metrics.jsonl", [{"step": step, **{n: v for n, v in stats.items() if not n.startswith("seconds/")}}])

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._accepted:
            append_lines(self.folder / "history.jsonl", self._accepted)
            self._accepted = []
        append_lines(self.folder / name, rows)

    def amend(self, step: int, stats: Mapping[str, float]) -> None:
        """Add to a step's metrics what could not be measured when it was made."""
        rows = self.read("metrics.jsonl")
        write_lines(self.folder / "metrics.jsonl", [{**row, **stats} if row["step"] == step else row for row in rows])

    def warn(self, step: int, name: str, text: str) -> None:
        """A named warning: in the terminal, in ``warnings.jsonl``, in the report."""
        console.print(f"[bold yellow]Warning[/] [dim]{name}[/] step {step}: {escape(text)}", soft_wrap=True)
        self.append("warnings.jsonl", [{"step": step, "name": name, "warning": text}])

    def read(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.folder / name)

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], score: float | None) -> None:
        """Write a checkpoint. What the logs say up to here is on the disk before it."""
        for path in (self.folder / name for name in STEPPED):
            if path.exists():
                patiently(self.folder, lambda path=path: flush(path))  # type: ignore[misc]
        self.saved.save(step, tensors, about, score)

    def latest(self) -> Saved | None:
        """The newest whole checkpoint, with the logs cut back to it.

        Raises:
            UserError: there are checkpoints, but none is whole; starting over would delete the logs.
        """
        self.saved.clean()
        saved = self.saved.newest()
        self._cut_back(saved.step if saved else 0)
        return saved

    def _cut_back(self, step: int) -> None:
        """Drop what was logged after the checkpoint that training goes on from; it will be written again."""
        for name in STEPPED:
            rows = self.read(name)
            if name == "warnings.jsonl":  # until format 2 of the checkpoints they named no step
                rows = [row for row in rows if "step" in row]
            for number, row in enumerate(rows, 1):
                if type(row.get("step")) is not int:
                    raise UserError(
                        f"{self.folder / name}, row {number}: it names no step, so it is not a row that accord wrote; delete it."
                    )
            kept = [row for row in rows if row["step"] < step and (step > 0 or row["step"] >= 0)]
            if len(kept) < len(rows):
                write_lines(self.folder / name, kept)


def refuse_existing(folder: Path, resumable: bool = True) -> None:
    """A run never writes into what is there already. What a process left that ended before the first setting was written is nothing."""
    unborn = {".lock", "history.jsonl", "history.jsonl.part", "config.yaml.part"}
    if folder.exists() and (not folder.is_dir() or not {p.name for p in folder.iterdir()} <= unborn):
        go_on = f"Go on with it: accord resume {folder}; or choose" if resumable else "Choose"
        raise UserError(f"Run folder {folder} already exists. {go_on} another --out.")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    if not isinstance(values, dict):
        return {prefix: values}
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return out


def _told(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name not in now:
        return f"{name} is missing (it was {_short(before[name])})"
    return (
        f"{name} is new ({_short(now[name])})"
        if name not in before
        else f"{name} (it was {_short(before[name])}, it is {_short(now[name])})"
    )


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."
