"""Sampling completions: continuous batching over a static cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from accord.data.records import Prompt
from accord.errors import UserError
from accord.nn.foreign import ForeignModel
from accord.rollout.decoder import Decoder
from accord.rollout.decoding import Decoding, Output, Progress, decode_foreign
from accord.rollout.guides import Guide
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling, uniforms
from accord.text.tokenizer import Tokenizer


class Engine:
    """Samples from a policy; keeps the fused copies of frozen layers between calls.

    Args:
        rows: completions decoded side by side; finished ones make room for the next in the queue.
        weights: ``same`` as the policy's, or ``int8``: rounded to eight bits a number, so that what is sampled from is
            another distribution; its log-probabilities are the rollout's ``engine_logprobs``.

    Raises:
        UserError: int8 for a model that accord does not compute itself.
    """

    def __init__(self, policy: Policy, rows: int = 64, weights: str = "same") -> None:
        self.policy, self.rows, self.weights = policy, rows, weights
        if isinstance(policy.model, ForeignModel) and weights != "same":
            raise UserError(f"accord does not compute '{policy.raw.get('model_type')}' models itself, so it cannot sample in {weights}.")
        self._decoder = None if isinstance(policy.model, ForeignModel) else Decoder(policy.model, precision=weights)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        per_prompt: int,
        sampling: Sampling,
        keep_trunk: bool = False,
        on_progress: Progress | None = None,
        guide: Guide | None = None,
    ) -> Rollout:
        """``per_prompt`` completions of each prompt, rows in the order of the prompts.

        Args:
            keep_trunk: store the activations at the policy's split for every token, so that scoring and
                updates need not compute the trunk again. With int8 weights they are not the trunk's, and not kept.
            guide: makes another distribution of the policy's, which is then sampled.

        Raises:
            UserError: a prompt and its completion do not fit the model's context.
        """
        encoded = [encode_checked(self.policy, prompt, sampling.max_new_tokens) for prompt in prompts]
        jobs = [(p, k) for p in range(len(prompts)) for k in range(per_prompt)]
        out = self._generate(encoded, jobs, _names(prompts, per_prompt), sampling, keep_trunk, guide, on_progress)
        texts = [self.policy.tokenizer.decode(out.response(row)) for row in range(len(jobs))]
        return out.rollout([prompts[p] for p, _ in jobs], [k for _, k in jobs], texts)

    @torch.no_grad()
    def go_on(
        self, contexts: list[list[int]], names: list[str], sampling: Sampling, guide: Guide | None = None
    ) -> list[tuple[list[int], list[float], bool]]:
        """Continue each context: (tokens, their log-probabilities, whether an end token was chosen). Luck goes by name."""
        out = self._generate(contexts, [(i, 0) for i in range(len(contexts))], names, sampling, False, guide)
        written = []
        for row in range(len(contexts)):
            start = int(out.lengths[row])
            tokens = out.response(row)
            written.append((tokens, out.logprobs[row, start : start + len(tokens)].tolist(), bool(out.finished[row])))
        return written

    def _generate(
        self,
        encoded: list[list[int]],
        jobs: list[tuple[int, int]],
        names: list[str],
        sampling: Sampling,
        keep_trunk: bool,
        guide: Guide | None,
        on_progress: Progress | None = None,
    ) -> Output:
        out = Output.make(self.policy, encoded, jobs, sampling.max_new_tokens, keep_trunk and self.weights == "same")
        luck = uniforms(sampling.seed, names, sampling.max_new_tokens).to(out.tokens.device)
        report = on_progress or (lambda done, tokens: None)
        if self._decoder is None:
            if guide is not None and guide.model is not None:
                raise UserError("A second model at decoding (nlpo, a reference) needs a model that accord computes itself.")
            for start in range(0, len(jobs), self.rows):
                decode_foreign(self.policy, out, range(start, min(start + self.rows, len(jobs))), luck, sampling, report, guide)
        else:
            self._decoder.refresh()
            self._decode(out, luck, sampling, report, guide)
        return out

    def _decode(self, out: Output, luck: Tensor, sampling: Sampling, report: Progress, guide: Guide | None) -> None:
        assert self._decoder is not None
        decoders = [self._decoder]
        if guide is not None and guide.model is not None:
            if isinstance(guide.model, ForeignModel):
                raise UserError("A second model at decoding (nlpo, a reference) needs a model that accord computes itself.")
            decoders.append(Decoder(guide.model, self._decoder, self.weights))
        Decoding(decoders, out, luck, self.policy.tokenizer.eos_ids, sampling, guide).run(self.rows, report)


def _names(prompts: Sequence[Prompt], per_prompt: int) -> list[str]:
    """What each completion's luck belongs to; a prompt that is in the batch again is told apart."""
    seen: dict[str, int] = {}
    names = []
    for prompt in prompts:
        again = seen.get(prompt.id, 0)
        seen[prompt.id] = again + 1
        names += [f"{prompt.id}{f'#{again}' if again else ''}/{k}" for k in range(per_prompt)]
    return names


class Reader(Protocol):
    """What reads prompts: a policy or a reward model."""

    tokenizer: Tokenizer

    @property
    def context(self) -> int: ...


def encode_named(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt.

    Raises:
        UserError: it has none, or cannot be encoded; the message names it.
    """
    try:
        ids = tokenizer.encode_prompt(prompt.content)
    except UserError as error:
        raise UserError(f"Prompt '{prompt.id}': {error}") from None
    if not ids:
        raise UserError(f"Prompt '{prompt.id}' has no tokens.")
    return ids


def encode_checked(policy: Reader, prompt: Prompt, room: int) -> list[int]:
    """Ids of a prompt that leaves ``room`` tokens of the context for its completion."""
    ids = encode_named(policy.tokenizer, prompt)
    if len(ids) + room > policy.context:
        raise UserError(
            f"Prompt '{prompt.id}' has {len(ids)} tokens; with {room} new ones it exceeds the model's context of "
            f"{policy.context}. Shorten it or lower max_new_tokens."
        )
    return ids
