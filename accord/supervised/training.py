"""Supervised training: the loop that reads as its algorithm, whatever is learned."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from accord.checkpoints import Saved, under
from accord.errors import Diverged, UserError
from accord.nn.budget import TokenBudget
from accord.optimizer import Optimizer
from accord.progress import bar, console, safe_point, stop_requested
from accord.rollout.policy import Policy
from accord.supervised.settings import LoopSettings


class Recorder(Protocol):
    """Where a run is written (:class:`accord.runs.Run`)."""

    def log(self, step: int, stats: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None: ...
    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], score: float | None) -> None: ...
    def latest(self) -> Saved | None: ...


class Task(ABC):
    """What is learned, from what, and how well.

    Attributes:
        name: in words, for the progress bar.
        steps: optimizer steps in all.
    """

    name: str
    steps: int

    @property
    @abstractmethod
    def digests(self) -> Mapping[str, str]:
        """Of everything it is learned from; ``validation`` is what it is measured on."""

    def begin(self) -> None:  # noqa: B027 (most need nothing)
        """What is to be computed once, before the first step."""

    @abstractmethod
    def accumulate(self, policy: Policy, step: int, tokens: int) -> dict[str, float]:
        """Add up the gradient of a step's loss in micro-batches of so many tokens; returns its ``loss`` and what else is to be told."""

    def show(self, policy: Policy, step: int) -> Sequence[Mapping[str, Any]]:
        """Completions to look at, as rows of ``completions.jsonl``; asked for when something is measured."""
        return []

    @abstractmethod
    def measure(self, policy: Policy, budget: TokenBudget) -> dict[str, float]:
        """``loss`` and what else is measured on what is held out; nothing where nothing is."""


@dataclass
class Tuned:
    """What came of it. ``before`` and ``after``: what was measured on what is held out; empty where nothing was."""

    policy: Policy
    steps: int
    before: dict[str, float]
    after: dict[str, float]


def tune(policy: Policy, task: Task, settings: LoopSettings, run: Recorder) -> Tuned:
    """Fit a policy, of which something trains, to a task.

    Continues from the run's latest checkpoint, if it has one, with the numbers an uninterrupted run would have had.

    Raises:
        UserError: a checkpoint does not fit the settings.
        Diverged: the numbers are not finite any more; nothing was saved of that.
    """
    state = State(policy, settings)
    state.about["validation"] = task.digests["validation"]
    first = state.restore(run.latest())
    if first < task.steps:
        task.begin()
    if first == 0 and (before := task.measure(state.policy, state.budget)):
        state.about["before"] = before
        run.log(-1, heldout(before), [])
    with bar(task.name, task.steps) as progress:
        progress.advance(first)
        for step in range(first, task.steps):
            begun = time.perf_counter()
            state.optimizer.set_rate(share := rate_at(step, task.steps, settings))
            stats = state.step(task, step)
            stats |= {"seconds/update": time.perf_counter() - begun, "learning_rate": settings.rate * share}
            last = step + 1 == task.steps
            measured = task.measure(state.policy, state.budget) if (step + 1) % settings.validate_every == 0 or last else {}
            state.about["after"] = measured or state.about["after"]
            run.log(step, stats | heldout(measured), task.show(state.policy, step) if measured else [])
            progress.advance(1, "loss " + ", held out ".join(f"{m['loss']:.3f}" for m in (stats, state.about["after"]) if m))
            if (step + 1) % settings.checkpoint_every == 0 or last or stop_requested():
                tensors = state.tensors()
                if not all(bool(t.isfinite().all()) for t in tensors.values()):
                    raise Diverged(f"Step {step}: a weight is not finite any more, so nothing is saved of it; lower learning_rate.")
                run.save(step + 1, tensors, state.about | state.counts(), -measured["loss"] if measured else None)
            if not last:
                safe_point("Training is saved.")
    state.optimizer.release()
    return Tuned(state.policy, task.steps, state.about["before"], state.about["after"])


def heldout(measured: Mapping[str, float]) -> dict[str, float]:
    """What was measured, as a run's metrics name it."""
    return {f"validation_{name}": value for name, value in measured.items()}


def rate_at(step: int, steps: int, settings: LoopSettings) -> float:
    """Share of the learning rate at a step: a linear rise over the first ``warmup`` of the steps, then down to ``final_rate`` at
    the last."""
    rise = math.ceil(settings.warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1, steps - 1 - rise)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.schedule]
    return left if settings.schedule == "constant" else settings.final_rate + (1 - settings.final_rate) * left


class State:
    """Everything that changes while training, and so everything a checkpoint holds. Random numbers are not among it: each is drawn
    from the seed and the step it is for."""

    def __init__(self, policy: Policy, settings: LoopSettings) -> None:
        self.policy, self.budget = policy, TokenBudget(settings.micro_batch_tokens)
        remedy = "or look for rows that are no text"
        self.optimizer = Optimizer(
            {"policy": (policy.trainable(), settings.rate)}, settings.max_grad_norm, settings.max_nonfinite, self.budget, remedy,
            settings.weight_decay, settings.betas, settings.optimizer,
        )  # fmt: skip
        self.about: dict[str, Any] = {"before": {}, "after": {}}

    def step(self, task: Task, step: int) -> dict[str, float]:
        """One optimizer step."""
        halved = self.budget.halved
        stats = self.optimizer.take(lambda tokens: task.accumulate(self.policy, step, tokens))
        if self.budget.halved > halved:
            console.print(f"[bold yellow]Memory ran out[/]; micro-batches now have {self.budget.tokens} tokens. The gradient is the same.", soft_wrap=True)  # fmt: skip
        return stats | {"skipped_updates": float(self.optimizer.skipped)}

    def tensors(self) -> dict[str, Tensor]:
        out = {f"policy/{n}": p.detach() for n, p in self.policy.trainable().items()}
        return out | {f"optimizer/{n}": t for n, t in self.optimizer.state().items()}

    def counts(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors and losses."""
        o = self.optimizer
        return {"skipped": o.skipped, "in_a_row": o.in_a_row, "micro_batch_tokens": self.budget.tokens if self.budget.halved else None}

    def restore(self, saved: Saved | None) -> int:
        """Take over a checkpoint; returns the step to go on with."""
        if saved is None:
            return 0
        for name, parameter in self.policy.trainable().items():
            tensor = saved.tensors.get(f"policy/{name}")
            if tensor is None or tensor.shape != parameter.shape:
                raise UserError(
                    f"The checkpoint of step {saved.step} does not fit the settings ({name}); what "
                    "trains, as config.yaml has it, must be those the run started with."
                )
            parameter.data.copy_(tensor)
        self.optimizer.load_state(under("optimizer/", saved.tensors))
        if saved.about["validation"] == self.about["validation"]:  # else the losses are of other examples
            self.about |= {name: dict(saved.about[name]) for name in ("before", "after") if isinstance(saved.about[name], dict)}
        self.optimizer.skipped, self.optimizer.in_a_row = int(saved.about["skipped"]), int(saved.about["in_a_row"])
        self.budget.tokens = min(self.budget.tokens, saved.about["micro_batch_tokens"] or self.budget.tokens)
        return saved.step
