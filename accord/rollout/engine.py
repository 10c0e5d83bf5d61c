"""Sampling completions: continuous batching over a static cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accord.data.records import Prompt
from accord.errors import UserError
from accord.nn.foreign import ForeignModel
from accord.nn.logprobs import LogitsProcessor, log_softmax_logits
from accord.rollout.decoder import Decoder
from accord.rollout.guides import Guide
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling, draw, restrict, uniforms
from accord.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (completions done since the last call, tokens sampled since the last call)."""


class Engine:
    """Samples from a policy; keeps the fused copies of frozen layers between calls.

    Args:
        rows: completions decoded side by side; finished ones make room for the next in the queue.
    """

    def __init__(self, policy: Policy, rows: int = 64) -> None:
        self.policy, self.rows = policy, rows
        self._decoder = None if isinstance(policy.model, ForeignModel) else Decoder(policy.model)

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
                updates need not compute the trunk again.
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
    ) -> _Output:
        out = _Output.make(self.policy, encoded, jobs, sampling.max_new_tokens, keep_trunk)
        luck = uniforms(sampling.seed, names, sampling.max_new_tokens).to(out.tokens.device)
        report = on_progress or (lambda done, tokens: None)
        if self._decoder is None:
            if guide is not None and guide.model is not None:
                raise UserError("A second model at decoding (nlpo, a reference) needs a model that accord computes itself.")
            for start in range(0, len(jobs), self.rows):
                _decode_foreign(self.policy, out, range(start, min(start + self.rows, len(jobs))), luck, sampling, report, guide)
        else:
            self._decoder.refresh()
            self._decode(out, luck, sampling, report, guide)
        return out

    def _decode(self, out: _Output, luck: Tensor, sampling: Sampling, report: Progress, guide: Guide | None) -> None:
        assert self._decoder is not None
        decoders, device = [self._decoder], out.tokens.device
        if guide is not None and guide.model is not None:
            if isinstance(guide.model, ForeignModel):
                raise UserError("A second model at decoding (nlpo, a reference) needs a model that accord computes itself.")
            decoders.append(Decoder(guide.model, self._decoder))
        queue = deque(range(len(out.jobs)))
        rows = min(self.rows, len(queue))
        for decoder in decoders:
            decoder.allocate(rows, out.tokens.shape[1])
        job_of = torch.full((rows,), -1, device=device)  # -1: a free row
        hidden = [torch.zeros(rows, d.matrix.shape[1], dtype=d.matrix.dtype, device=device) for d in decoders]
        eos = torch.tensor(self.policy.tokenizer.eos_ids, device=device)
        while True:
            free = (job_of < 0).nonzero()[:, 0]
            if queue and (len(free) * 4 >= rows or len(free) == rows):
                filled, job_ids = _fill(decoders, out, [queue.popleft() for _ in range(min(len(free), len(queue)))], free, hidden)
                job_of[filled] = job_ids
            elif len(free) == rows:
                return
            elif len(free) * 4 >= rows:  # nothing left to fill them with: drop the empty rows
                busy = (job_of >= 0).nonzero()[:, 0]
                for decoder in decoders:
                    decoder.keep(busy)
                job_of, hidden, rows = job_of[busy], [h[busy] for h in hidden], len(busy)
            active = job_of >= 0
            job = job_of.clamp(min=0)
            count = out.counts[job]
            processor = None if guide is None else guide.processor(hidden[-1], decoders[-1].matrix)
            logprobs, tokens = choose(hidden[0], decoders[0].matrix, luck[job, count.clamp(max=luck.shape[1] - 1)], sampling, processor)
            position = out.lengths[job] + count
            done = torch.isin(tokens, eos)
            out.record(job[active], position[active], tokens[active], logprobs[active], done[active])
            # Finished rows read their last token too: scores and bootstrapped values look at it.
            position = torch.where(active, position, 0)
            steps = [decoder.step(tokens, position, out.split, int(position.max()) + 1) for decoder in decoders]
            hidden, trunk = [h for h, _ in steps], steps[0][1]
            if out.trunk is not None:
                out.trunk[job[active], position[active]] = trunk[active]
            ended = active & (done | (count + 1 >= sampling.max_new_tokens))
            report(int(ended.sum()), int(active.sum()))
            job_of = torch.where(ended, -1, job_of)


def _fill(decoders: list[Decoder], out: _Output, jobs: list[int], free: Tensor, hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Read the prompts of these jobs (each prompt once) into free rows."""
    job_ids = torch.tensor(jobs, device=free.device)
    prompts = list(dict.fromkeys(out.jobs[j][0] for j in jobs))
    source = torch.tensor([prompts.index(out.jobs[j][0]) for j in jobs], device=free.device)
    first = torch.tensor([jobs[source.tolist().index(i)] for i in range(len(prompts))], device=free.device)
    lengths, rows = out.lengths[first], free[: len(jobs)]
    width = int(lengths.max())
    for number, decoder in enumerate(decoders):
        last, trunk = decoder.prefill(out.tokens[first, :width], lengths, rows, source, out.split)
        hidden[number][rows] = last[source]
        if number == 0 and out.trunk is not None:
            out.trunk[job_ids, :width] = trunk[source]
    return rows, job_ids


def choose(
    hidden: Tensor, matrix: Tensor, luck: Tensor, sampling: Sampling, processor: LogitsProcessor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token a row and give its log-probability under the distribution it was drawn from."""
    logprobs = log_softmax_logits(hidden, matrix, sampling.temperature or 1.0, processor)
    if sampling.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        if sampling.top_k or sampling.top_p < 1:
            logprobs = restrict(logprobs, sampling.top_k, sampling.top_p)
        tokens = draw(logprobs, luck)
    return logprobs.gather(-1, tokens[:, None])[:, 0], tokens


@dataclass
class _Output:
    """The arrays a rollout is written into."""

    jobs: list[tuple[int, int]]
    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor  # (N,) prompt tokens
    counts: Tensor  # (N,) response tokens so far
    finished: Tensor
    trunk: Tensor | None
    split: int
    width: int

    @classmethod
    def make(cls, policy: Policy, encoded: list[list[int]], jobs: list[tuple[int, int]], new: int, keep_trunk: bool) -> _Output:
        device, slots, N = policy.device, max(map(len, encoded)) + new, len(jobs)
        tokens = torch.full((N, slots), policy.tokenizer.pad_id)
        for row, (p, _) in enumerate(jobs):
            tokens[row, : len(encoded[p])] = torch.tensor(encoded[p])
        lengths = torch.tensor([len(encoded[p]) for p, _ in jobs], device=device)
        D = policy.model.output_matrix.shape[1]
        keep = keep_trunk and policy.split > 0
        trunk = torch.zeros(N, slots, D, dtype=policy.model.compute_dtype, device=device) if keep else None
        zeros = torch.zeros(N, dtype=torch.long, device=device)
        logprobs = torch.zeros(N, slots, device=device)
        return cls(jobs, tokens.to(device), logprobs, lengths, zeros, zeros.bool(), trunk, policy.split, D)

    def record(self, job: Tensor, position: Tensor, tokens: Tensor, logprobs: Tensor, done: Tensor) -> None:
        self.tokens[job, position] = tokens
        self.logprobs[job, position] = logprobs
        self.finished[job] = done
        self.counts[job] += 1

    def response(self, row: int) -> list[int]:
        start = int(self.lengths[row])
        return self.tokens[row, start : start + int(self.counts[row])].tolist()

    def rollout(self, prompts: list[Prompt], indices: list[int], texts: list[str]) -> Rollout:
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        token_mask = columns < (self.lengths + self.counts)[:, None]
        rollout = Rollout(
            tokens=self.tokens,
            positions=columns.expand_as(self.tokens),
            token_mask=token_mask,
            response_mask=token_mask & (columns >= self.lengths[:, None]),
            engine_logprobs=self.logprobs,
            finished=self.finished,
            prompts=prompts,
            indices=indices,
            texts=texts,
            trunk=self.trunk,
            trunk_cut=self.split,
        )
        return rollout.select(torch.arange(len(prompts), device=self.tokens.device))


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


def encode_checked(policy: Reader, prompt: Prompt, room: int) -> list[int]:
    """Ids of a prompt that leaves ``room`` tokens of the context for its completion."""
    try:
        ids = policy.tokenizer.encode_prompt(prompt.content)
    except UserError as error:
        raise UserError(f"Prompt '{prompt.id}': {error}") from None
    if not ids:
        raise UserError(f"Prompt '{prompt.id}' has no tokens.")
    if len(ids) + room > policy.context:
        raise UserError(
            f"Prompt '{prompt.id}' has {len(ids)} tokens; with {room} new ones it exceeds the model's context of "
            f"{policy.context}. Shorten it or lower max_new_tokens."
        )
    return ids


def _decode_foreign(
    policy: Policy, out: _Output, job_range: range, luck: Tensor, sampling: Sampling, report: Progress, guide: Guide | None
) -> None:
    """Static batches through ``transformers``' own cache, left-padded."""
    model, device = policy.model, policy.device
    assert isinstance(model, ForeignModel)
    job = torch.tensor(list(job_range), device=device)
    lengths = out.lengths[job]
    width = int(lengths.max())
    shift = (width - lengths)[:, None]
    columns = torch.arange(width, device=device)[None]
    mask = columns >= shift
    tokens = out.tokens[job].gather(1, (columns - shift).clamp(min=0))
    positions, cache = (columns - shift).clamp(min=0), None
    eos = torch.tensor(policy.tokenizer.eos_ids, device=device)
    active = torch.ones(len(job), dtype=torch.bool, device=device)
    matrix = policy.model.output_matrix
    for _ in range(sampling.max_new_tokens):
        hidden, cache = model.advance(tokens, positions, mask, cache)
        count = out.counts[job]
        logprobs, chosen = choose(
            hidden,
            matrix,
            luck[job, count.clamp(max=luck.shape[1] - 1)],
            sampling,
            None if guide is None else guide.processor(hidden, matrix),
        )
        done = torch.isin(chosen, eos)
        at = lengths + count
        out.record(job[active], at[active], chosen[active], logprobs[active], done[active])
        ended = active & (done | (count + 1 >= sampling.max_new_tokens))
        report(int(ended.sum()), int(active.sum()))
        tokens, positions = chosen[:, None], at[:, None]
        mask = torch.cat((mask, active[:, None]), dim=1)
        active &= ~ended
        if not active.any():
            return
