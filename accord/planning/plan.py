"""A plan: parts of the memory, stages with their tokens and time, and what this machine has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from accord.errors import UserError
from accord.nn.loading import default_device
from accord.nn.memory import keeps
from accord.progress import console

GIB = 2**30
ADAM = 16  # bytes a trained weight: itself, its gradient and two moments in fp32
KEPT, KEPT_SHARE = 0.5 * GIB, 0.15
"""Freed memory that the C library has not given back at the peak, and how it grows with what is in use: measured with 4 trained
layers, with 6, and with all (bench/LOG.md)."""


@dataclass(frozen=True)
class Part:
    """A part of the memory. ``when``: always, sampling or updating. ``remedy``: the setting that makes it smaller."""

    name: str
    bytes: float
    when: str
    remedy: str


@dataclass(frozen=True)
class Stage:
    name: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Memory in bytes, time in seconds. ``stages`` is empty where only a try can tell (environments). ``of``: the stage of several
    whose memory it is; ``samples``: whether completions are sampled."""

    parts: list[Part]
    stages: list[Stage]
    available: float
    of: str = ""
    samples: bool = True

    @classmethod
    def of_memory(cls, parts: list[Part], device: torch.device) -> Plan:
        """Without stages yet, and with what this process may take: what it may still, and what it has."""
        return cls(parts, [], available_memory(device) + resident_memory())

    @property
    def memory(self) -> float:
        """The peak."""
        return peak_of(self.parts)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.memory <= self.available

    def check(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            UserError: naming the largest part that a setting can shrink, and the setting.
        """
        if self.fits:
            return
        phase = max(("sampling", "updating"), key=lambda when: bytes_of(self.parts, when))
        largest = max((p for p in self.parts if p.when in ("always", phase) and p.remedy), key=lambda p: p.bytes)
        raise UserError(
            f"This run needs about {self.memory / GIB:.1f} GiB of memory and {self.available / GIB:.1f} GiB are free, so it is not "
            f"started. Its largest part is {largest.name} ({largest.bytes / GIB:.1f} GiB): {largest.remedy}."
        )

    def show(self) -> None:
        """Print it, a line a part and a stage."""
        console.print(
            f"Memory: about {self.memory / GIB:.1f} GiB at the peak{f', in {self.of}' if self.of else ''} ({self.available / GIB:.1f} GiB are free)",
            soft_wrap=True,
        )
        for part in self.parts:
            if part.bytes >= 0.01 * self.memory:
                when = "" if part.when == "always" else f", while {part.when}"
                console.print(f"[dim]  {part.bytes / GIB:6.2f} GiB  {part.name}{when}[/]", soft_wrap=True)
        if self.stages:
            length = ", if what is sampled uses its whole length" if self.samples else ""
            console.print(f"Time: about {minutes(self.seconds)} on this machine{length}", soft_wrap=True)
            for stage in self.stages:
                console.print(f"[dim]  {minutes(stage.seconds):>9}  {stage.name}: {stage.tokens:,} tokens[/]", soft_wrap=True)
        elif self.fits:
            console.print("[dim]How long an environment's episodes take only playing them can tell.[/]", soft_wrap=True)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def available_memory(device: torch.device) -> float:
    """Bytes that this process may still take: of the GPU, or of the machine and of the container it runs in."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(float(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(float(limit) - float(used))
    return min(free)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def resident_memory() -> float:
    """Bytes this process holds now."""
    fields = _read("/proc/self/statm").split()
    return float(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0.5 * GIB


def peak_of(parts: Sequence[Part]) -> float:
    """What is always there, and the larger of what sampling and updating need."""
    return bytes_of(parts, "always") + max(bytes_of(parts, "sampling"), bytes_of(parts, "updating"))


def bytes_of(parts: Sequence[Part], when: str) -> float:
    return sum(p.bytes for p in parts if p.when == when)


def with_freed(parts: list[Part], fixed: float = KEPT) -> list[Part]:
    """And what is freed meanwhile, but kept for reuse. ``fixed``: bytes of it whatever is in use."""
    if not keeps() or default_device().type != "cpu":
        return parts
    return [*parts, Part("freed memory that is kept for reuse", fixed + KEPT_SHARE * peak_of(parts), "always", "")]
