"""A reward model from the labels so far, as often as the owner likes: how right it is on prompts it has not seen, as labels arrive."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from accord.data.pairs import opinions
from accord.disk import append_lines, read_lines, repair_lines, write_lines
from accord.errors import UserError
from accord.feedback.agreement import agreement
from accord.feedback.store import Store

LOOK = 10.0  # seconds between two looks at whether there are enough new rankings


class Retraining:
    """Runs ``accord reward`` on a snapshot of the labels, in a process of its own, one at a time.

    Each is a folder in ``folder``: the snapshot, the reward model, and what was printed. ``history.jsonl`` has a row for each.

    Args:
        model: what it is trained from, as ``accord reward --model``.
        options: more of ``accord reward``'s options.
        every: train again when there are so many rankings more than the last time; 0: only when asked.
    """

    def __init__(self, store: Store, folder: Path, model: str, options: tuple[str, ...] = (), every: int = 0) -> None:
        self._store, self._folder, self._model, self._options, self._every = store, folder, model, options, every
        self._lock, self._running = threading.Lock(), False
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        repair_lines(folder / "history.jsonl")
        if every:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def running(self) -> bool:
        return self._running

    def history(self) -> list[dict[str, Any]]:
        """Rows: at, rankings, prompts, accuracy and ceiling (value, low, high), or error. The ceiling is how often two labelers agree."""
        return read_lines(self._folder / "history.jsonl")

    def start(self) -> None:
        """Begin, unless one runs.

        Raises:
            UserError: nobody has ranked anything, or the labels cannot be written down.
        """
        with self._lock:
            if self._running:
                return
            rankings = list(self._store.rankings())
            if not rankings:
                raise UserError("Nobody has ranked anything yet, so there is nothing to train on.")
            self._running = True
        try:
            here = self._new_folder()
            ranked = {r.prompt_id for r in rankings}
            write_lines(here / "rankings.jsonl", (r.to_json() for r in rankings))
            rows = (c.to_json() for key, group in self._store.completions().items() if key in ranked for c in group)
            write_lines(here / "completions.jsonl", rows)
            given = opinions(rankings)
            about: dict[str, Any] = {"at": time.time(), "rankings": len(given), "prompts": len(ranked)}
            ceiling = agreement(given).without_ties if given else None
            about["ceiling"] = ceiling.to_json() if ceiling else None
        except BaseException:
            self._running = False
            raise
        threading.Thread(target=self._train, args=(here, about), daemon=True).start()

    def _new_folder(self) -> Path:
        number = 1
        while (self._folder / str(number)).exists():
            number += 1
        (self._folder / str(number)).mkdir(parents=True)
        return self._folder / str(number)

    def _train(self, here: Path, about: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "accord", "reward", "--model", self._model, "--out", str(here / "reward"), *self._options]
        command += ["--completions", str(here / "completions.jsonl"), "--rankings", str(here / "rankings.jsonl")]
        try:
            self._run(here, about, command)
        except Exception as error:
            append_lines(self._folder / "history.jsonl", [about | {"accuracy": None, "error": f"{type(error).__name__}: {error}"}])
        finally:
            self._running = False

    def _run(self, here: Path, about: dict[str, Any], command: list[str]) -> None:
        with (here / "printed.txt").open("w", encoding="utf-8") as printed:
            self._process = subprocess.Popen(
                command, stdout=printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )  # Ctrl-C is for the server
            code = self._process.wait()
        if self._stopped.is_set():
            return
        if code == 0:
            report = json.loads((here / "reward/report.json").read_text(encoding="utf-8"))
            about |= {"accuracy": report["accuracy"], "error": None}
        else:
            lines = (here / "printed.txt").read_text(encoding="utf-8").strip().splitlines()
            about |= {"accuracy": None, "error": lines[-1] if lines else f"accord reward ended with code {code}"}
        append_lines(self._folder / "history.jsonl", [about])

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK):
            with suppress(UserError, SQLAlchemyError):  # a full disk, a database that starts anew: the next time
                last = max((row["rankings"] for row in self.history()), default=0)
                if not self._running and self._store.progress()["rankings"] >= last + self._every:
                    self.start()

    def stop(self) -> None:
        """End what runs; it is begun anew the next time."""
        self._stopped.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
