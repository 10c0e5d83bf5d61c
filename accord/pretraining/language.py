"""Language modelling: a model from nothing, and the task of telling each token from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.data.batching import packs
from accord.nn.budget import TokenBudget
from accord.nn.loading import default_device, resolve_dtype
from accord.nn.logprobs import token_stats
from accord.nn.memory import keep_freed_memory
from accord.nn.transformer import ModelConfig, Transformer
from accord.nn.weights import parse_config
from accord.pretraining.settings import PretrainSettings
from accord.pretraining.sizes import config_of, size_of
from accord.pretraining.tokens import Batch, Parts, Rows
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.supervised.training import Task
from accord.text.tokenizer import Tokenizer

SPREAD = 0.02
"""Standard deviation of first weights."""


def new_config(tokenizer: Tokenizer, settings: PretrainSettings) -> tuple[dict[str, Any], ModelConfig]:
    """Of the model that the settings ask for, as a file has it and read."""
    grouped = settings.attention == "grouped"
    raw = config_of(size_of(settings.size), tokenizer.size, settings.context, tokenizer.eos_ids[0], grouped, settings.positions)
    return raw, parse_config(raw)


def new_policy(tokenizer: Tokenizer, settings: PretrainSettings) -> Policy:
    """A model of first weights, all of which train: normal with standard deviation 0.02, of what layers add to the residual stream
    0.02 / sqrt(2 * layers) (Radford et al. 2019, section 2.3)."""
    raw, config = new_config(tokenizer, settings)
    device = default_device()
    if device.type == "cpu":
        keep_freed_memory()  # before the first product
    model = Transformer(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0.0, SPREAD / math.sqrt(2 * config.num_hidden_layers) if last else SPREAD, generator=generator)
    model.compute_dtype = resolve_dtype(settings.dtype)
    model = model.to(device)
    return Policy(model, tokenizer, raw, "scratch", model, "full", trunk_layers=model.depth)


def loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """-sum log p of the batch's tokens, each after those before it in its row, nats."""
    at = model.geometry(batch.layout)
    states = model.upper(model.lower(at, 0), at, 0)
    return -token_stats(states, model.output_matrix, batch.told, entropic=False).logprobs[: batch.own].sum()


class Language(Task):
    """Minimise -log p of each token after those before it in its document, a mean over those of the whole optimizer step.

    The parts of documents are in a new order each epoch; a step takes as many as begin within its tokens.
    """

    name = "Pretraining"

    def __init__(self, train: Rows, heldout: Rows, settings: PretrainSettings) -> None:
        self.settings, self.train, self._held_rows, self._text = settings, train.cut(settings.context), heldout, train.tokens.digest
        self.heldout = heldout.cut(settings.context)
        self.each = int(self.train.sizes.sum())
        self.total = settings.tokens or math.ceil(settings.epochs * self.each)
        self.steps = math.ceil(self.total / settings.tokens_per_step)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        if self.steps > 1 and not len(self.parts_of(self.steps - 1)):  # what is left is of a row that the step before it took
            self.steps -= 1

    @property
    def digests(self) -> Mapping[str, str]:
        return {"text": self._text, "validation": self._held_rows.digest}

    def parts_of(self, step: int) -> np.ndarray:
        """Numbers of the rows that a step takes: those whose first token is one of the step's own, counted from the start of training."""
        first, last = step * self.settings.tokens_per_step, min((step + 1) * self.settings.tokens_per_step, self.total)
        found = []
        for epoch in range(first // self.each, (last - 1) // self.each + 1):
            order, begins = self._epoch(epoch)
            a, b = np.searchsorted(begins, (first - epoch * self.each, last - epoch * self.each))
            found.append(order[a:b])
        return np.concatenate(found)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.train))
            sizes = self.train.sizes[order]
            self._order = (epoch, order, np.cumsum(sizes) - sizes)
        return self._order[1:]

    def accumulate(self, policy: Policy, step: int, tokens: int) -> dict[str, float]:
        numbers = self.parts_of(step)
        count, total = int(self.train.sizes[numbers].sum()), 0.0
        for part in in_micro_batches(self.train, numbers, tokens):
            loss = loss_sum(self._model(policy), self.train.batch(part, policy.device)) / max(count, 1)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total, "tokens": float(count)}

    @torch.no_grad()
    def measure(self, policy: Policy, budget: TokenBudget) -> dict[str, float]:
        """``loss``: nats a token; ``bits_per_byte`` of the texts, with what it takes to tell where they end; ``perplexity``: e^loss."""
        numbers = np.arange(len(self.heldout))

        def work(tokens: int) -> float:
            parts = in_micro_batches(self.heldout, numbers, tokens)
            return math.fsum(float(loss_sum(self._model(policy), self.heldout.batch(part, policy.device))) for part in parts)

        total = budget.fit(work)
        loss = total / int(self.heldout.sizes.sum())
        return {"loss": loss, "bits_per_byte": total / math.log(2) / self._held_rows.bytes, "perplexity": math.exp(min(loss, 700.0))}

    def show(self, policy: Policy, step: int) -> list[Mapping[str, Any]]:
        s = self.settings
        room = min(s.sample_tokens, s.context - 1)
        if not s.samples or room < 1:
            return []
        end, names = policy.tokenizer.eos_ids[0], [f"sample-{k + 1}" for k in range(s.samples)]
        written = Engine(policy, s.samples).go_on([[end]] * s.samples, names, Sampling(1.0, max_new_tokens=room, seed=s.seed))
        return [
            {"step": step, "id": name, "prompt": "", "completion": policy.tokenizer.decode(tokens), "finished": finished, "score": None}
            for name, (tokens, _, finished) in zip(names, written, strict=True)
        ]

    @staticmethod
    def _model(policy: Policy) -> Transformer:
        assert isinstance(policy.model, Transformer)
        return policy.model


def in_micro_batches(parts: Parts, numbers: np.ndarray, tokens: int) -> list[list[int]]:
    """Rows, longest first, in packs of at most so many padded tokens."""
    order = numbers[np.argsort(-parts.sizes[numbers], kind="stable")].tolist()
    return packs(order, lambda i: 1, lambda i: int(parts.sizes[i]), tokens)
