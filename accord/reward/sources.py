"""Where scores come from: reward models, functions, classifiers; alone or as a weighted sum, each logged by itself."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from accord.data.records import Completion
from accord.errors import UserError, first_line
from accord.reward.model import RewardModel
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout

RewardFunction = Callable[[list[str], list[str]], Sequence[float | None]]


class Source(Protocol):
    """One component of the reward."""

    name: str

    def score(self, rollout: Rollout) -> list[float | None]:
        """A finite number for each row, or None for a row to be left out."""


class Scores(NamedTuple):
    total: Tensor  # (B,) weighted sum; 0 where invalid
    valid: Tensor  # (B,) bool, False where a component gave None
    parts: dict[str, list[float | None]]  # each component, unweighted


class Reward:
    """A weighted sum of sources."""

    def __init__(self, sources: Sequence[tuple[float, Source]]) -> None:
        self.sources = list(sources)

    def add(self, weight: float, source: Source) -> None:
        """Another component; its name is made unique, for the log."""
        same = sum(other.name.split("#")[0] == source.name for _, other in self.sources)
        if same:
            source.name = f"{source.name}#{same + 1}"
        self.sources.append((weight, source))

    def __call__(self, rollout: Rollout) -> Scores:
        total = torch.zeros(len(rollout), device=rollout.tokens.device)
        valid = torch.ones(len(rollout), dtype=torch.bool, device=rollout.tokens.device)
        parts = {}
        for weight, source in self.sources:
            values = source.score(rollout)
            parts[source.name] = values
            valid &= torch.tensor([v is not None for v in values], device=valid.device)
            total += weight * torch.tensor([v if v is not None else 0.0 for v in values], device=total.device)
        return Scores(torch.where(valid, total, 0.0), valid, parts)

    def close(self) -> None:
        for _, source in self.sources:
            if isinstance(source, FunctionSource):
                source.close()


def check_scores(name: str, values: Any, rollout: Rollout) -> list[float | None]:
    """One finite number or None a completion, or an error that names the function and the sample."""
    if hasattr(values, "tolist"):  # an array or tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise UserError(f"Reward '{name}' must return a list; it returned {type(values).__name__}.")
    if len(values) != len(rollout):
        raise UserError(f"Reward '{name}' returned {len(values)} scores for {len(rollout)} completions; return one for each, None to skip.")
    out: list[float | None] = []
    for row, value in enumerate(values):
        if value is None:
            out.append(None)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"Reward '{name}' returned {value!r} for completion {rollout.indices[row]} of prompt "
                f"'{rollout.prompts[row].id}' ({rollout.texts[row][:60]!r}); return a finite number, or None to skip it."
            )
        out.append(number)
    return out


class FunctionSource:
    """``package.module:function`` in a worker process with a time limit."""

    def __init__(self, path: str, timeout: float = 60.0) -> None:
        self.name, self.timeout = path, timeout
        command = [sys.executable, "-m", "accord.reward.worker", path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # it finds what this process finds
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._answers = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self._receive("could not be imported")

    def score(self, rollout: Rollout) -> list[float | None]:
        try:
            self._questions.send(([p.text for p in rollout.prompts], list(rollout.texts)))
        except OSError:
            raise UserError(f"Reward '{self.name}': its process has ended; see its own output above.") from None
        return check_scores(self.name, self._receive("raised"), rollout)

    def _receive(self, failed: str) -> Any:
        try:
            if not self._answers.poll(self.timeout):
                self.close()
                raise UserError(
                    f"Reward '{self.name}' did not answer within {self.timeout:g} s and was stopped; make it faster or raise reward_timeout."
                )
            kind, value = self._answers.recv()
        except (EOFError, OSError, pickle.UnpicklingError, AttributeError, ImportError):
            raise UserError(f"Reward '{self.name}': its process died (exit code {self._process.wait()}); it must return a list.") from None
        if kind == "error":
            raise UserError(f"Reward '{self.name}' {failed}: {value}")
        return value

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with whatever the function started
        self._process.wait()
        self._questions.close()
        self._answers.close()


class CallableSource:
    """A Python function given in a notebook: called directly, trusted, without a time limit."""

    def __init__(self, function: RewardFunction) -> None:
        self.name, self._function = getattr(function, "__name__", "function"), function

    def score(self, rollout: Rollout) -> list[float | None]:
        try:
            values = self._function([p.text for p in rollout.prompts], list(rollout.texts))
        except Exception as error:
            raise UserError(f"Reward '{self.name}' raised: {type(error).__name__}: {error}") from error
        return check_scores(self.name, values, rollout)


class EnvironmentSource:
    """What an environment gave during the episode, summed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, rollout: Rollout) -> list[float | None]:
        assert rollout.step_rewards is not None
        return list(rollout.step_rewards.sum(-1).tolist())


class RewardModelSource:
    """A reward model. If its trunk is the policy's own, it reads the activations that the rollout kept."""

    def __init__(self, name: str, model: RewardModel, policy: Policy) -> None:
        self.name, self.model = name, model
        self._same_tokens = model.tokenizer.fingerprint == policy.tokenizer.fingerprint
        self.on_trunk = model.sits_on(policy.start)

    def score(self, rollout: Rollout) -> list[float | None]:
        if not self._same_tokens:
            rows = zip(rollout.prompts, rollout.texts, rollout.finished.tolist(), strict=True)
            rollout = self.model.encode([Completion(prompt, text, finished) for prompt, text, finished in rows])
        elif not self.on_trunk:
            rollout = replace(rollout, trunk=None)
        return list(self.model.score_rollout(rollout).tolist())


class ClassifierSource:
    """A sequence-classification model of Hugging Face: log-odds of one label (its score, if it has one label)."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from accord.nn.loading import default_device, model_folder

        self.name = name
        source, _, label = name.removeprefix("classifier:").partition("@")
        folder = model_folder(source)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizer and model classes raise anything from KeyError to a bare Exception
            raise UserError(f"{folder} is not a usable sequence classifier: {first_line(error)}") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model.to(default_device()).eval()
        labels = {str(v): int(k) for k, v in self._model.config.id2label.items()}
        if label and label not in labels:
            raise UserError(f"{folder} has no label '{label}'; it has {', '.join(labels)}.")
        if not label and len(labels) > 1:
            raise UserError(f"{folder} has the labels {', '.join(labels)}; say which is good: {name}@LABEL")
        self._index = labels[label] if label else 0

    @torch.no_grad()
    def score(self, rollout: Rollout) -> list[float | None]:
        out: list[float | None] = []
        for start in range(0, len(rollout), 32):
            texts = [t if t.strip() else "." for t in rollout.texts[start : start + 32]]  # no text, no tokens
            batch = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
            logits = self._model(**batch.to(self._model.device)).logits.float()
            if logits.shape[-1] > 1:
                odds = torch.log_softmax(logits, -1)[:, self._index]
                logits = (odds - torch.log1p(-odds.exp().clamp(max=1 - 1e-6)))[:, None]
            out.extend(logits[:, 0].tolist())
        return out


def parse_reward(spec: str | RewardModel | RewardFunction, policy: Policy, timeout: float) -> tuple[float, Source]:
    """``[WEIGHT*]FOLDER | [WEIGHT*]module:function | [WEIGHT*]classifier:NAME[@LABEL]``, or the object itself."""
    if isinstance(spec, RewardModel):
        return 1.0, RewardModelSource("reward_model", spec, policy)
    if not isinstance(spec, str):
        return 1.0, CallableSource(spec)
    match = re.fullmatch(r"(?:([-+0-9.eE]+)\*)?(.+)", spec)
    assert match is not None
    try:
        weight = float(match[1]) if match[1] else 1.0
    except ValueError:
        raise UserError(f"Reward '{spec}': the weight '{match[1]}' is not a number; write for example 0.5*{match[2]}") from None
    name = match[2]
    if name.startswith("classifier:"):
        return weight, ClassifierSource(name)
    if Path(name).is_dir():
        return weight, RewardModelSource(name, RewardModel.load(name, policy), policy)
    if re.fullmatch(r"[\w.]+:\w+", name):
        return weight, FunctionSource(name, timeout)
    raise UserError(
        f"Reward '{name}' is neither a folder, nor module:function, nor classifier:NAME. "
        "Train a reward model with accord reward, or write a function over texts."
    )


def build_reward(specs: Any, policy: Policy, timeout: float = 60.0, environment: str | None = None) -> Reward:
    """A :class:`Reward` from one spec or a list of them (see :func:`parse_reward`), besides what an environment gives."""
    many = [] if specs is None else specs if isinstance(specs, (list, tuple)) else [specs]
    if not many and environment is None:
        raise UserError("No reward given: use --reward FOLDER, module:function or classifier:NAME.")
    reward = Reward([] if environment is None else [(1.0, EnvironmentSource(environment))])
    try:
        for spec in many:
            reward.add(*parse_reward(spec, policy, timeout))
    except UserError:
        reward.close()
        raise
    return reward
