"""Progress bars with an ETA, and the one place where Ctrl-C is turned into an orderly stop."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from accord.errors import Interrupted

console = Console(stderr=False, highlight=False)
Item = TypeVar("Item")


def several(count: int, noun: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class _Stop:
    requested = False
    """Set by the first SIGINT or SIGTERM; read at the points where stopping loses nothing."""
    deferred = 0
    """How many blocks are open that must not end half-way."""


@contextmanager
def orderly_stop() -> Iterator[None]:
    """Within: the first SIGINT or SIGTERM asks for a stop at the next safe point, a second one leaves at once."""

    def ask(signum: int, frame: FrameType | None) -> None:
        if _Stop.requested:
            sys.exit(130)
        _Stop.requested = True
        console.print("\n[yellow]Stopping as soon as nothing is lost by it; press again to leave at once.[/]")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    _Stop.requested = False
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        _Stop.requested = False


def stop_requested() -> bool:
    return _Stop.requested


def safe_point(saved: str) -> None:
    """Raise :class:`Interrupted` if a stop was asked for. ``saved`` says what is kept."""
    if _Stop.requested and not _Stop.deferred:
        raise Interrupted(f"Stopped as asked. {saved}")


@contextmanager
def to_the_end() -> Iterator[None]:
    """Within: safe points wait; what has begun is finished."""
    _Stop.deferred += 1
    try:
        yield
    finally:
        _Stop.deferred -= 1


@contextmanager
def bar(label: str, total: int, unit: str = "") -> Iterator[Bar]:
    """A progress bar: ``with bar("Sampling", 100) as b: b.advance(1, "12 tok/s")``."""
    columns = (
        TextColumn("[bold]{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as progress:
        yield Bar(progress, label, total)


class Bar:
    """A running bar; in a log file (no terminal) it prints a plain line at each tenth instead."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress, self._label, self._total = progress, label, total
        self._task = progress.add_task(label, total=total, note="")
        self._done, self._tenth = 0, 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        self._progress.update(self._task, advance=count, note=note)
        tenth = 10 * self._done // max(self._total, 1)
        if self._progress.disable and tenth > self._tenth:
            self._tenth = tenth
            console.print(f"  {self._label}: {self._done}/{self._total} {note}", soft_wrap=True)


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield the items under a progress bar."""
    with bar(label, total) as progress:
        for item in items:
            yield item
            progress.advance()
