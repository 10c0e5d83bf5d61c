"""Where scores come from: reward models, functions, classifiers; alone or as a weighted sum, each logged by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from accord.data.records import Completion
from accord.errors import UserError, first_line
from accord.reward.functions import CallableSource, Contained, FunctionSource, Reject, RewardFunction
from accord.reward.model import RewardModel
from accord.reward.remote import RemoteSource
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout


class Source(Protocol):
    """One component of the reward."""

    name: str

    def score(self, rollout: Rollout) -> list[float | None]:
        """A finite number for each row, or None for a row to be left out."""


class Scores(NamedTuple):
    total: Tensor  # (B,) weighted sum; 0 where invalid
    valid: Tensor  # (B,) bool, False where a component gave None or failed
    parts: dict[str, list[float | None]]  # each component, unweighted
    rejects: Sequence[Reject] = ()  # what components failed on


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
        parts, rejects = {}, []
        for weight, source in self.sources:
            values = source.score(rollout)
            rejects += source.rejects if isinstance(source, Contained) else []
            parts[source.name] = values
            valid &= torch.tensor([v is not None for v in values], device=valid.device)
            total += weight * torch.tensor([v if v is not None else 0.0 for v in values], device=total.device)
        return Scores(torch.where(valid, total, 0.0), valid, parts, rejects)

    def close(self) -> None:
        for _, source in self.sources:
            if isinstance(source, (FunctionSource, RemoteSource)):
                source.close()


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


def parse_reward(
    spec: str | RewardModel | RewardFunction, policy: Policy, timeout: float, memory: float | None = None
) -> tuple[float, Source]:
    """``[WEIGHT*]SPEC``, or the object itself. SPEC: ``FOLDER | module:function | classifier:NAME[@LABEL] | http://...``"""
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
    if name.startswith(("http://", "https://")):
        return weight, RemoteSource(name, timeout)
    if Path(name).is_dir():
        return weight, RewardModelSource(name, RewardModel.load(name, policy), policy)
    if re.fullmatch(r"[\w.]+:\w+", name):
        return weight, FunctionSource(name, timeout, memory)
    raise UserError(
        f"Reward '{name}' is neither a folder, nor module:function, nor classifier:NAME, nor a service's URL. "
        "Train a reward model with accord reward, or write a function over texts."
    )


def build_reward(specs: Any, policy: Policy, timeout: float = 60.0, environment: str | None = None, memory: float | None = None) -> Reward:
    """A :class:`Reward` from one spec or a list of them (see :func:`parse_reward`), besides what an environment gives.

    ``timeout`` (seconds a call) and ``memory`` (gigabytes) are the limits of functions given by name.
    """
    many = [] if specs is None else specs if isinstance(specs, (list, tuple)) else [specs]
    if not many and environment is None:
        raise UserError("No reward given: use --reward FOLDER, module:function or classifier:NAME.")
    reward = Reward([] if environment is None else [(1.0, EnvironmentSource(environment))])
    try:
        for spec in many:
            reward.add(*parse_reward(spec, policy, timeout, memory))
    except UserError:
        reward.close()
        raise
    return reward
