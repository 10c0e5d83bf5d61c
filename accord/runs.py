"""The run folder: settings, metrics, every completion, checkpoints, the report."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accord.data.sources import read_lines
from accord.errors import UserError
from accord.progress import console
from accord.rl.trainer import Saved

FORMAT = 2
LOGS = ("metrics.jsonl", "completions.jsonl", "warnings.jsonl", "stages.jsonl", "gates.jsonl", "sampled.jsonl", "rejects.jsonl")


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
        refuse_existing(folder)
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
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict) or "command" not in config:
            raise UserError(f"{path} is damaged: it names no command.")
        run = cls(folder)
        for name in LOGS:
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
        return read_lines(self.folder / name)

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
                "score": None if score is None or math.isnan(score) else score, "sha256": digest, "about": about,
            }  # fmt: skip
            write_whole(aside / "manifest.json", json.dumps(manifest, indent=2))
            flush(aside / "state.safetensors")
            flush(aside)
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
            flush(root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise disk_error(self.folder, error) from None
        self._drop_old()

    def checkpoints(self) -> list[tuple[int, Path, dict[str, Any]]]:
        """(step, folder, manifest) of every checkpoint whose manifest is whole, oldest first."""
        found = []
        for path in (self.folder / "checkpoints").glob("step-*"):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                if not {"format", "accord", "step", "score", "sha256", "about"} <= manifest.keys():
                    raise ValueError("fields are missing")
                found.append((int(manifest["step"]), path, manifest))
            except (OSError, ValueError, TypeError, AttributeError):
                console.print(f"[yellow]{path}: its manifest is damaged; it is left out.[/]", soft_wrap=True)
        return sorted(found, key=lambda c: c[0])

    def latest(self) -> Saved | None:
        """The newest checkpoint whose checksum is right, with the logs cut back to it.

        Raises:
            UserError: there are checkpoints, but none is whole; starting over would delete the logs.
        """
        for unfinished in (self.folder / "checkpoints").glob(".writing-*"):
            shutil.rmtree(unfinished)
        saved = self.newest()
        self._cut_back(saved.step if saved else 0)
        return saved

    def newest(self) -> Saved | None:
        """The newest checkpoint whose checksum is right; nothing is changed."""
        for step, path, manifest in reversed(self.checkpoints()):
            if manifest["format"] != FORMAT:
                raise UserError(f"{path} has format {manifest['format']}, written by accord {manifest['accord']}; use that version.")
            state = path / "state.safetensors"
            if not state.is_file() or file_digest(state) != manifest["sha256"]:
                console.print(f"[yellow]{path} is damaged (checksum); the one before it is used.[/]", soft_wrap=True)
                continue
            return Saved(step, load_file(state), manifest["about"])
        if any((self.folder / "checkpoints").glob("step-*")):
            raise UserError(f"No checkpoint in {self.folder / 'checkpoints'} is whole. Delete that folder to train again from the start.")
        return None

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
        for name in ("metrics.jsonl", "completions.jsonl", "rejects.jsonl"):
            path = self.folder / name
            if path.exists():
                kept = [row for row in read_lines(path) if row["step"] < step and (step > 0 or row["step"] >= 0)]
                write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def refuse_existing(folder: Path, resumable: bool = True) -> None:
    """A run never writes into what is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        go_on = f"Go on with it: accord resume {folder}; or choose" if resumable else "Choose"
        raise UserError(f"Run folder {folder} already exists. {go_on} another --out.")


def disk_error(folder: Path, error: OSError | SafetensorError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"Cannot write to {folder}: {reason}. Make room or fix the permissions, then: accord resume {folder}")


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
