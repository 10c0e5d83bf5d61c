"""The run folder: settings, metrics, every completion, checkpoints, the report."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from accord.errors import UserError
from accord.progress import console
from accord.rl.trainer import Saved

FORMAT = 1


class Run:
    """``runs/NAME/`` and the only writer in it while it is open.

    ``config.yaml``, ``metrics.jsonl``, ``completions.jsonl``, ``warnings.jsonl``, ``checkpoints/step-N/``.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self._keep = folder, keep
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel when the process ends
        except OSError:
            raise UserError(f"{folder} is in use by another accord process; wait for it or choose another name.") from None

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any]) -> Run:
        """A new run folder with its settings written down, defaults included."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"Run folder {folder} already exists. Go on with it: accord resume {folder}; or choose another --out.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        except OSError as error:
            raise disk_error(folder, error) from None
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> tuple[Run, dict[str, Any]]:
        """An existing run and its settings, torn last lines of its logs repaired."""
        folder = Path(folder)
        path = folder / "config.yaml"
        if not path.is_file():
            raise UserError(f"{folder} is not a run folder (it has no config.yaml); give the folder that --out named.")
        try:
            config = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        run = cls(folder)
        for name in ("metrics.jsonl", "completions.jsonl", "warnings.jsonl"):
            repair_lines(folder / name)
        return run, config

    def log(self, step: int, stats: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line of metrics and the step's completions."""
        self.append("completions.jsonl", rows)
        self.append("metrics.jsonl", [{"step": step, **stats}])

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            with (self.folder / name).open("a", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def warn(self, text: str) -> None:
        console.print(f"[bold yellow]Warning[/] {text}", soft_wrap=True)
        self.append("warnings.jsonl", [{"warning": text}])

    def read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    # Checkpoints: written aside, flushed to disk, renamed. A folder without a manifest is never read.

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], score: float | None) -> None:
        """Write ``checkpoints/step-N``; keep the newest two and the best by validation score."""
        root = self.folder / "checkpoints"
        final, aside = root / f"step-{step}", root / f".writing-{step}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, aside / "state.safetensors")
            digest = file_digest(aside / "state.safetensors")
            from accord import __version__

            manifest = {
                "format": FORMAT, "accord": __version__, "torch": torch.__version__, "step": step,
                "score": score, "sha256": digest, "about": about,
            }  # fmt: skip
            write_whole(aside / "manifest.json", json.dumps(manifest, indent=2))
            flush(aside / "state.safetensors")
            flush(aside)
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
            flush(root)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise disk_error(self.folder, error) from None
        self._drop_old()

    def checkpoints(self) -> list[tuple[int, Path, dict[str, Any]]]:
        """(step, folder, manifest) of every whole checkpoint, oldest first."""
        found = []
        for path in (self.folder / "checkpoints").glob("step-*"):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                found.append((int(manifest["step"]), path, manifest))
            except (OSError, ValueError, KeyError):
                console.print(f"[yellow]{path} is damaged and left out.[/]")
        return sorted(found, key=lambda c: c[0])

    def latest(self) -> Saved | None:
        """The newest checkpoint whose checksum is right, with the logs cut back to it."""
        for step, path, manifest in reversed(self.checkpoints()):
            if manifest["format"] > FORMAT:
                raise UserError(f"{path} has format {manifest['format']}, written by accord {manifest['accord']}; use that version.")
            state = path / "state.safetensors"
            if not state.is_file() or file_digest(state) != manifest["sha256"]:
                console.print(f"[yellow]{path} is damaged (checksum); the one before it is used.[/]")
                continue
            self._cut_back(step)
            return Saved(step, load_file(state), manifest["about"])
        self._cut_back(0)
        return None

    def best_score(self) -> float | None:
        scores = [m["score"] for _, _, m in self.checkpoints() if m["score"] is not None]
        return max(scores) if scores else None

    def _drop_old(self) -> None:
        found = self.checkpoints()
        keep = {path for _, path, _ in found[-self._keep :]}
        scored = [c for c in found if c[2]["score"] is not None]
        if scored:
            keep.add(max(scored, key=lambda c: c[2]["score"])[1])
        for _, path, _ in found:
            if path not in keep:
                shutil.rmtree(path)

    def _cut_back(self, step: int) -> None:
        """Drop what was logged after the checkpoint that training goes on from; it will be written again."""
        for name in ("metrics.jsonl", "completions.jsonl"):
            path = self.folder / name
            if path.exists():
                kept = [
                    line
                    for line in path.read_text().splitlines()
                    if 0 <= json.loads(line)["step"] < step or (step and json.loads(line)["step"] < 0)
                ]
                write_whole(path, "".join(line + "\n" for line in kept))


def disk_error(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write to {folder}: {error.strerror or error}. Make room or fix the permissions, then: accord resume {folder}")


def write_whole(path: Path, text: str) -> None:
    """Write aside and rename: the file is the old one or the new one, never half."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def repair_lines(path: Path) -> None:
    """Cut a last line that was not written whole."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
