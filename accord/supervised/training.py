"""Supervised fine-tuning: the loop that reads as its algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from accord.checkpoints import Saved, under
from accord.data.batching import in_turn
from accord.errors import Diverged, UserError
from accord.nn.budget import TokenBudget
from accord.optimizer import Optimizer
from accord.progress import bar, console, safe_point, stop_requested
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.scoring import score_states, states_of
from accord.supervised.examples import Encoded
from accord.supervised.settings import SFTSettings

AT_ONCE = 64  # examples that are measured together


class Recorder(Protocol):
    """Where a run is written (:class:`accord.runs.Run`)."""

    def log(self, step: int, stats: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None: ...
    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], score: float | None) -> None: ...
    def latest(self) -> Saved | None: ...


@dataclass
class Tuned:
    """What came of it. Losses are of the held-out examples, nats a token, before and after; None where none were held out."""

    policy: Policy
    steps: int
    before: float | None
    after: float | None


def tune(start: Policy, train: Encoded, heldout: Encoded | None, settings: SFTSettings, run: Recorder) -> Tuned:
    """Fit a policy that starts from ``start`` to the examples: minimise -log p of the tokens that count, a mean over those of the
    whole optimizer step.

    Continues from the run's latest checkpoint, if it has one, with the numbers an uninterrupted run would have had.

    Raises:
        UserError: a checkpoint does not fit the settings.
        Diverged: the numbers are not finite any more; nothing was saved of that.
    """
    state = State.begin(start, settings)
    steps = math.ceil(settings.epochs * len(train) / settings.examples_per_step)
    saved = run.latest()
    state.about["validation"] = heldout.digest if heldout is not None else ""
    first = state.restore(saved)
    before, after = state.about["before"], state.about["after"]
    if first == 0 and heldout is not None:
        before = state.about["before"] = loss_of(state.policy, heldout, state.budget)
        run.log(-1, {"validation_loss": before}, [])
    with bar("SFT", steps) as progress:
        progress.advance(first)
        for step in range(first, steps):
            begun = time.perf_counter()
            rollout = train.rollout(in_turn(len(train), step, settings.examples_per_step, settings.seed))
            state.optimizer.set_rate(share := rate_at(step, steps, settings))
            stats = state.step(rollout)
            stats |= {"seconds/update": time.perf_counter() - begun, "learning_rate": settings.rate * share}
            last = step + 1 == steps
            if heldout is not None and ((step + 1) % settings.validate_every == 0 or last):
                after = state.about["after"] = stats["validation_loss"] = loss_of(state.policy, heldout, state.budget)
            run.log(step, stats, [])
            progress.advance(1, f"loss {stats['loss']:.3f}" + (f" held out {after:.3f}" if after is not None else ""))
            if (step + 1) % settings.checkpoint_every == 0 or last or stop_requested():
                tensors = state.tensors()
                if not all(bool(t.isfinite().all()) for t in tensors.values()):
                    raise Diverged(f"Step {step}: a weight is not finite any more, so nothing is saved of it; lower learning_rate.")
                held = stats.get("validation_loss")
                run.save(step + 1, tensors, state.about | state.counts(), None if held is None else -held)
            if not last:
                safe_point("Training is saved.")
    state.optimizer.release()
    return Tuned(state.policy, steps, before, after)


def rate_at(step: int, steps: int, settings: SFTSettings) -> float:
    """Share of the learning rate at a step: a linear rise over the first ``warmup`` of the steps, then down to a tenth."""
    rise = math.ceil(settings.warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1, steps - 1 - rise)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.schedule]
    return left if settings.schedule == "constant" else 0.1 + 0.9 * left


def sft_loss(policy: Policy, rollout: Rollout, count: int) -> Tensor:
    """-sum log p of the tokens that count (``response_mask``), divided by ``count``: those of the whole optimizer step."""
    states = states_of(policy.model, rollout, 0)
    return -score_states(policy.model, rollout, states, 1.0, entropic=False).logprobs.sum() / count


@torch.no_grad()
def loss_of(policy: Policy, examples: Encoded, budget: TokenBudget) -> float:
    """Mean -log p of the examples' tokens that count, nats a token."""
    count, total = examples.counted, 0.0
    for start in range(0, len(examples), AT_ONCE):
        rollout = examples.rollout(range(start, min(start + AT_ONCE, len(examples))))
        total += budget.fit(
            lambda tokens, r=rollout: math.fsum(float(sft_loss(policy, r.select(rows), count)) for rows in r.micro_batches(tokens))  # type: ignore[misc]
        )
    return total


class State:
    """Everything that changes while training, and so everything a checkpoint holds. Random numbers are not among it: each is drawn
    from the seed and the step it is for."""

    def __init__(self, policy: Policy, settings: SFTSettings) -> None:
        self.policy, self.budget = policy, TokenBudget(settings.micro_batch_tokens)
        remedy = "or look for examples that are no text"
        self.optimizer = Optimizer(
            {"policy": (policy.trainable(), settings.rate)}, settings.max_grad_norm, settings.max_nonfinite, self.budget, remedy,
            settings.weight_decay,
        )  # fmt: skip
        self.about: dict[str, Any] = {"before": None, "after": None}

    @classmethod
    def begin(cls, start: Policy, settings: SFTSettings) -> State:
        top = settings.top_layers if settings.adaptation == "split" else 1  # where nothing is split off it means nothing
        return cls(start.adapt(settings.adaptation, top, settings.lora_rank, settings.lora_alpha, settings.seed), settings)

    def step(self, rollout: Rollout) -> dict[str, float]:
        """One optimizer step over these examples."""
        count, halved = int(rollout.response_mask.sum()), self.budget.halved

        def accumulate(tokens: int) -> dict[str, float]:
            total = 0.0
            for rows in rollout.micro_batches(tokens):
                loss = sft_loss(self.policy, rollout.select(rows), count)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            return {"loss": total}

        stats = self.optimizer.take(accumulate)
        if self.budget.halved > halved:
            console.print(f"[bold yellow]Memory ran out[/]; micro-batches now have {self.budget.tokens} tokens. The gradient is the same.", soft_wrap=True)  # fmt: skip
        return stats | {"tokens": float(count), "skipped_updates": float(self.optimizer.skipped)}

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
                    f"The checkpoint of step {saved.step} does not fit the settings ({name}); adaptation, top_layers and lora_rank in "
                    "config.yaml must be those the run started with."
                )
            parameter.data.copy_(tensor)
        self.optimizer.load_state(under("optimizer/", saved.tensors))
        if saved.about["validation"] == self.about["validation"]:  # else the losses are of other examples
            self.about |= {name: saved.about[name] for name in ("before", "after")}
        self.optimizer.skipped, self.optimizer.in_a_row = int(saved.about["skipped"]), int(saved.about["in_a_row"])
        self.budget.tokens = min(self.budget.tokens, saved.about["micro_batch_tokens"] or self.budget.tokens)
        return saved.step
