"""Rewards that are functions of texts, contained: what one does wrong costs a sample, not the run.

A function given by name runs in a process of its own (:mod:`accord.reward.worker`) with a limit on time and memory. When it
raises, hangs or dies on a batch, the batch is halved until the completions it fails on are known; they are left out, and why.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from accord.errors import UserError
from accord.reward.worker import plain
from accord.rollout.rollout import Rollout

RewardFunction = Callable[[list[str], list[str]], Sequence[float | None]]


NOT_ASKED = "not asked: the function failed on too many others"


class Reject(NamedTuple):
    """A completion that a reward failed on."""

    reward: str
    row: int
    cause: str


def rejected_rows(rejects: Sequence[Reject]) -> set[int]:
    """The completions that some reward failed on."""
    return {reject.row for reject in rejects}


def told(rejects: Sequence[Reject], asked: int) -> str:
    """How many completions were rejected, and the commonest cause."""
    causes = Counter(f"'{reject.reward}': {reject.cause}" for reject in rejects if reject.cause != NOT_ASKED)
    cause, _ = causes.most_common(1)[0]
    others = f" (and {len(causes) - 1} other causes)" if len(causes) > 1 else ""
    return f"{len(rejected_rows(rejects))} of {asked} completions could not be scored: reward {cause}{others}"


class Failed(Exception):
    """A call gave nothing. ``halve``: smaller calls may tell which completion is to blame."""

    def __init__(self, cause: str, halve: bool = True) -> None:
        super().__init__(cause)
        self.cause, self.halve = cause, halve


class Contained:
    """Asks a function for the scores of a rollout, and finds out which completions it fails on.

    Attributes:
        rejects: those of the latest call, by row.
    """

    GIVE_UP = 0.25  # of a rollout's completions: with more rejected, the rest is not asked one by one

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        self.rejects: list[Reject] = []

    def ask(self, prompts: list[str], completions: list[str], timeout: float) -> Any:
        """What the function returns, element by element as :func:`accord.reward.worker.plain` gives it.

        Raises:
            Failed: it returned nothing that could be used.
        """
        raise NotImplementedError

    def score(self, rollout: Rollout) -> list[float | None]:
        prompts, texts = [p.text for p in rollout.prompts], list(rollout.texts)
        out: list[float | None] = [None] * len(texts)
        self.rejects = []
        waiting = [(list(range(len(texts))), self.timeout)]
        while waiting:
            rows, timeout = waiting.pop()
            if len(self.rejects) > max(self.GIVE_UP * len(texts), 1):
                self._reject(rows, NOT_ASKED)
                continue
            try:
                values = self.ask([prompts[i] for i in rows], [texts[i] for i in rows], timeout)
            except Failed as failed:
                if len(rows) == 1 or not failed.halve:
                    self._reject(rows, failed.cause)
                else:  # smaller calls take less time, so a hang is told sooner
                    shorter, middle = max(timeout / 2, min(self.timeout, 5.0)), len(rows) // 2
                    waiting += [(rows[middle:], shorter), (rows[:middle], shorter)]
                continue
            self._take(rows, values, out)
        self.rejects.sort(key=lambda reject: reject.row)
        return out

    def _take(self, rows: Sequence[int], values: Sequence[Any], out: list[float | None]) -> list[int]:
        """Put what can be used into ``out`` and reject the rest; the rows that could be used."""
        taken = []
        for row, value in zip(rows, values, strict=True):
            odd = value["returned"] if isinstance(value, dict) else value if value is not None and not math.isfinite(value) else None
            if odd is not None:
                self._reject([row], f"it returned {odd}; return a finite number, or None to skip")
            else:
                out[row] = value
                taken.append(row)
        return taken

    def _reject(self, rows: Sequence[int], cause: str) -> None:
        self.rejects += [Reject(self.name, row, cause) for row in rows]


class FunctionSource(Contained):
    """``package.module:function`` in a worker process, which is started again when it dies.

    Args:
        timeout: seconds a call may take.
        memory: gigabytes the function may hold; None is no limit.
    """

    def __init__(self, path: str, timeout: float = 60.0, memory: float | None = None) -> None:
        super().__init__(path, timeout)
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except Failed as failed:
            raise UserError(f"Reward '{path}' {failed.cause}") from None

    def ask(self, prompts: list[str], completions: list[str], timeout: float) -> Any:
        if self._process is None:
            self._start()
        try:
            self._questions.send((prompts, completions))
        except OSError:
            raise self._ended() from None
        return self._receive(timeout)

    def _start(self) -> None:
        # On Linux a child's end can be tied to the thread that made it, and only the main thread lasts as long as the process.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        command = [sys.executable, "-m", "accord.reward.worker", self.name, str(self._memory or 0), str(parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # it finds what this process finds
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        assert process.stdin is not None and process.stdout is not None
        self._questions = Connection(os.dup(process.stdin.fileno()), readable=False)
        self._answers, self._unread = os.dup(process.stdout.fileno()), b""
        process.stdin.close()
        process.stdout.close()
        self._process = process
        try:
            self._receive(self.timeout)
        except Failed as failed:
            self.close()
            raise Failed(failed.cause, halve=False) from None

    def _receive(self, timeout: float) -> Any:
        try:
            line = self._line(time.monotonic() + timeout)
        except (EOFError, OSError):
            raise self._ended() from None
        if line is None:
            self.close()
            raise Failed(f"did not answer within {timeout:g} s and was stopped; make it faster or raise reward_timeout")
        try:
            kind, value = json.loads(line)
        except (ValueError, TypeError):  # the function has written where it should not
            self.close()
            raise Failed("garbled its own answer; it writes to descriptors that are not its own") from None
        if kind != "ok":
            raise Failed(value, halve=kind == "error")
        return value

    def _line(self, until: float) -> bytes | None:
        """The next line of the worker, or None when the time is up."""
        while b"\n" not in self._unread:
            if not select.select([self._answers], [], [], max(until - time.monotonic(), 0))[0]:
                return None
            if not (some := os.read(self._answers, 2**16)):
                raise EOFError
            self._unread += some
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> Failed:
        process = self._process
        self.close()
        code = None if process is None else process.returncode
        told = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Failed(f"its process died ({told}); see its own output above")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever the function started
        process.wait()
        self._questions.close()
        os.close(self._answers)


class CallableSource(Contained):
    """A Python function given in a notebook: called directly, without limits on time and memory."""

    def __init__(self, function: RewardFunction) -> None:
        super().__init__(getattr(function, "__name__", "function"), math.inf)
        self._function = function

    def ask(self, prompts: list[str], completions: list[str], timeout: float) -> Any:
        try:
            values = self._function(prompts, completions)
        except Exception as error:
            raise Failed(f"it raised {type(error).__name__}: {error}") from error
        try:
            return plain(values, len(completions))
        except TypeError as error:
            raise Failed(str(error), halve=False) from None
