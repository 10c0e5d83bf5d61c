"""Checkpoints: written aside, flushed to the disk, renamed; damage is seen and the one before is used."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accord.disk import disk_error, file_digest, flush, lock, patiently
from accord.errors import UserError
from accord.progress import console

FORMAT = 3
STATE, MANIFEST, SUMS = "state.safetensors", "manifest.json", "SHA256SUMS"


class Saved(NamedTuple):
    """What a checkpoint holds: the step to go on with, tensors, and what is no tensor."""

    step: int
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


class Checkpoints:
    """``step-N/`` folders: tensors, a manifest, and the checksums of both, which ``sha256sum -c SHA256SUMS`` checks too.

    The newest ``keep`` are kept, and the best by validation score.
    """

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = root, keep

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], score: float | None) -> None:
        """Write ``step-N``, and drop what is not kept any more.

        Raises:
            UserError: it could not be written. Those before it are whole.
        """
        from accord import __version__

        plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
        manifest = {
            "format": FORMAT, "accord": __version__, "torch": torch.__version__, "step": step,
            "score": None if score is None or math.isnan(score) else score, "about": about,
        }  # fmt: skip
        final, aside = self.root / f"step-{step}", self.root / f".writing-{step}"

        def write() -> None:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                save_file(plain, aside / STATE)
                (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
                (aside / SUMS).write_text(_sums(aside))
                for path in (aside / STATE, aside / MANIFEST, aside / SUMS, aside):
                    flush(path)
                if final.exists():
                    drop_folder(final)
                os.replace(aside, final)
                flush(self.root)
            except (OSError, SafetensorError):
                shutil.rmtree(aside, ignore_errors=True)
                raise

        patiently(self.root.parent, lambda: self.root.mkdir(parents=True, exist_ok=True))
        size = sum(t.numel() * t.element_size() for t in plain.values())
        patiently(self.root, write, needed=size + 2**20)
        self._drop_old()

    def all(self) -> list[tuple[int, Path, dict[str, Any]]]:
        """(step, folder, manifest) of every checkpoint whose manifest can be read, oldest first."""
        found = []
        for path in self.root.glob("step-*"):
            try:
                manifest = json.loads((path / MANIFEST).read_bytes())
                if not {"format", "accord", "step", "score", "about"} <= manifest.keys():
                    raise ValueError("fields are missing")
                if manifest["score"] is not None and type(manifest["score"]) not in (int, float):
                    raise ValueError("the score is no number")
                found.append((int(manifest["step"]), path, manifest))
            except (OSError, ValueError, TypeError, AttributeError, RecursionError):
                console.print(f"[yellow]{path}: its manifest is damaged; it is left out.[/]", soft_wrap=True)
        return sorted(found, key=lambda c: c[0])

    def newest(self) -> Saved | None:
        """The newest whose checksums are right; nothing is changed.

        Raises:
            UserError: there are some, but none is whole; or one is of another version's format.
        """
        for step, path, manifest in reversed(self.all()):
            if manifest["format"] not in (2, FORMAT) and _signed(path):
                raise UserError(f"{path} has format {manifest['format']}, written by accord {manifest['accord']}; use that version.")
            if not _whole(path, manifest):
                console.print(f"[yellow]{path} is damaged (checksum); the one before it is used.[/]", soft_wrap=True)
                continue
            return Saved(step, load_file(path / STATE), manifest["about"])
        if any(self.root.glob("step-*")):
            raise UserError(f"No checkpoint in {self.root} is whole. Delete that folder to train again from the start.")
        return None

    def clean(self) -> None:
        """Remove what a process left half written or half deleted, and what it would have dropped next."""
        for left in self.root.glob(".*-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._drop_old()

    def forget(self) -> None:
        """Drop every checkpoint."""
        for path in self.root.glob("step-*"):
            self._drop(path)

    def _drop_old(self) -> None:
        found = [c for c in self.all() if _signed(c[1])]  # what a damaged manifest says decides nothing
        keep = {path for _, path, _ in found[-self.keep :]}
        scored = [c for c in found if c[2]["score"] is not None]
        if scored:
            keep.add(max(scored, key=lambda c: c[2]["score"])[1])
        for _, path, _ in found:
            if path not in keep:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        patiently(self.root, lambda: drop_folder(path))


@contextmanager
def until_done(folder: Path) -> Iterator[Checkpoints]:
    """Checkpoints of work whose result is elsewhere: they are in ``folder`` until the block ends without an error.

    Raises:
        UserError: another process is at it, the folder cannot be made or deleted, or it holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from None
    with lock(folder):
        foreign = sorted(p.name for p in folder.iterdir() if not re.fullmatch(r"\.lock|step-\d+|\.(writing|dropping)-.*", p.name))
        if foreign:
            raise UserError(f"{folder} is where checkpoints would be kept, and it holds something else ({foreign[0]}); move that folder.")
        shutil.rmtree(_out_of_sight(folder), ignore_errors=True)  # of a process that ended while it deleted
        checkpoints = Checkpoints(folder)
        checkpoints.clean()
        try:
            yield checkpoints
        except BaseException:
            if not any(folder.glob("step-*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        patiently(folder.parent, lambda: drop_folder(folder))


def drop_folder(path: Path) -> None:
    """Out of sight at once, then deleted: one that is half deleted is never taken for a damaged one."""
    aside = _out_of_sight(path)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside)


def _out_of_sight(path: Path) -> Path:
    return path.with_name(f".dropping-{path.name}")


# What a checkpoint holds of an optimizer.


def adam_state(adam: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moments and step counts of named parameters."""
    return {f"{name}/{key}": torch.as_tensor(value) for name, p in parameters.items() for key, value in adam.state.get(p, {}).items()}


def load_adam_state(adam: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Take over what :func:`adam_state` gave."""
    for name, p in parameters.items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in state]
        adam.state[p] = {key: state[f"{name}/{key}"].to(p.device, copy=True) for key in keys}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sums(folder: Path) -> str:
    return "".join(f"{file_digest(folder / name)}  {name}\n" for name in (MANIFEST, STATE))


def _signed(folder: Path) -> bool:
    """Whether the manifest is the one that was written, of whatever format; true where there is no telling."""
    sums = folder / SUMS
    return not sums.is_file() or file_digest(folder / MANIFEST).encode() in sums.read_bytes()


def _whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the files are those that were written. Format 2 had the state's checksum in its manifest and none of the manifest."""
    try:
        if manifest["format"] == 2:
            return file_digest(folder / STATE) == manifest.get("sha256")
        return (folder / SUMS).read_bytes() == _sums(folder).encode()
    except OSError:
        return False
