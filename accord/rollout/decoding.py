"""One batch of completions while it is being written: where each row is, and the step that gives every row a token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.data.records import Prompt
from accord.errors import Diverged
from accord.nn.foreign import ForeignModel
from accord.nn.logprobs import LogitsProcessor, log_softmax_of
from accord.progress import safe_point
from accord.rollout.decoder import Decoder
from accord.rollout.guides import Guide
from accord.rollout.pieces import Pieces, pieces_for
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout
from accord.rollout.sampling import Sampling, draw, restrict

Progress = Callable[[int, int], None]
"""Called with (completions done since the last call, tokens sampled since the last call)."""

BURST = 8  # steps a GPU takes before it is asked which rows have ended; a row that has ended idles until then
BUCKET = 64  # cache slots a GPU looks at, rounded up to this: a graph is recorded for each


@dataclass
class Output:
    """The arrays that N completions are written into. Row N is nobody's: what free rows do goes there."""

    jobs: list[tuple[int, int]]  # (prompt, number among its completions)
    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor  # (N+1,) prompt tokens
    counts: Tensor  # (N+1,) response tokens so far
    finished: Tensor
    trunk: Tensor | None
    split: int

    @classmethod
    def make(cls, policy: Policy, encoded: list[list[int]], jobs: list[tuple[int, int]], new: int, keep_trunk: bool) -> Output:
        device, slots, N = policy.device, max(map(len, encoded)) + new, len(jobs)
        tokens = torch.full((N + 1, slots), policy.tokenizer.pad_id)
        for row, (p, _) in enumerate(jobs):
            tokens[row, : len(encoded[p])] = torch.tensor(encoded[p])
        lengths = torch.tensor([*(len(encoded[p]) for p, _ in jobs), 0], device=device)
        D = policy.model.output_matrix.shape[1]
        keep = keep_trunk and policy.split > 0
        trunk = torch.zeros(N + 1, slots, D, dtype=policy.model.compute_dtype, device=device) if keep else None
        counts = torch.zeros(N + 1, dtype=torch.long, device=device)
        logprobs = torch.zeros(N + 1, slots, device=device)
        return cls(jobs, tokens.to(device), logprobs, lengths, counts, counts.bool(), trunk, policy.split)

    def record(self, job: Tensor, position: Tensor, tokens: Tensor, logprobs: Tensor, done: Tensor) -> None:
        self.tokens[job, position] = tokens
        self.logprobs[job, position] = logprobs
        self.finished[job] = done
        self.counts[job] += 1
        self.counts[-1:] = 0

    def response(self, row: int) -> list[int]:
        start = int(self.lengths[row])
        return self.tokens[row, start : start + int(self.counts[row])].tolist()

    def rollout(self, prompts: list[Prompt], indices: list[int], texts: list[str]) -> Rollout:
        N, columns = len(prompts), torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        lengths, counts = self.lengths[:N, None], self.counts[:N, None]
        token_mask = columns < lengths + counts
        rollout = Rollout(
            tokens=self.tokens[:N],
            positions=columns.expand(N, -1),
            token_mask=token_mask,
            response_mask=token_mask & (columns >= lengths),
            engine_logprobs=self.logprobs[:N],
            finished=self.finished[:N],
            prompts=prompts,
            indices=indices,
            texts=texts,
            trunk=None if self.trunk is None else self.trunk[:N],
            trunk_cut=self.split,
        )
        return rollout.select(torch.arange(N, device=self.tokens.device))


class Decoding:
    """R rows that write the N completions of an :class:`Output`, each row the next one when it has ended one.

    Nothing in :meth:`step` waits for the device or depends on what was drawn, so a GPU records it as a graph and
    replays that.

    Attributes:
        job: (R,) which completion a row is writing; N where it is free.
    """

    def __init__(
        self, decoders: list[Decoder], out: Output, luck: Tensor, eos_ids: Sequence[int], sampling: Sampling, guide: Guide | None
    ) -> None:
        self.decoders, self.out, self.sampling, self.guide = decoders, out, sampling, guide
        self.luck, self.eos = luck, torch.tensor(eos_ids, device=luck.device)
        self.queue = deque(range(len(out.jobs)))
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        self.burst, self.bucket = (BURST, BUCKET) if luck.is_cuda else (1, 1)

    def run(self, rows: int, report: Progress) -> None:
        """Write all completions, up to ``rows`` of them side by side."""
        try:
            with torch.cuda.device(self.luck.device) if self.luck.is_cuda else nullcontext():
                self._run(min(rows, len(self.out.jobs)), report)
        finally:
            self.graphs.clear()
            for decoder in self.decoders:
                decoder.release()

    def _run(self, rows: int, report: Progress) -> None:
        N, device, slots = len(self.out.jobs), self.luck.device, self.out.tokens.shape[1]
        self.job = torch.full((rows,), N, device=device)
        self.hidden = [torch.zeros(rows, d.matrix.shape[1], dtype=d.matrix.dtype, device=device) for d in self.decoders]
        for decoder in self.decoders:
            decoder.allocate(rows, slots)
        records = self.luck.is_cuda and self.sampling.max_new_tokens > self.burst  # else a graph would not be replayed
        written, left = 0, N
        while True:
            busy = self.job < N
            free = rows - int(busy.sum())
            if self.queue and (4 * free >= rows or free == rows):
                self._fill((~busy).nonzero()[:, 0])
            elif free == rows:
                return
            elif 4 * free >= rows and not records:  # nothing left to fill them with
                self._shrink(busy.nonzero()[:, 0])
                rows -= free
            furthest = int((self.out.lengths + self.out.counts)[self.job].max()) + 1
            longest = min(-(-(furthest + self.burst - 1) // self.bucket) * self.bucket, slots)
            if records:
                self._replay(longest)
            else:
                for _ in range(min(self.burst, self.sampling.max_new_tokens)):
                    self.step(longest)
            safe_point("What was finished before is kept.")
            total, now_left = int(self.out.counts.sum()), len(self.queue) + int((self.job < N).sum())
            report(left - now_left, total - written)
            written, left = total, now_left

    @torch.no_grad()
    def step(self, longest: int) -> None:
        """Every row chooses its next token and reads it. No position is larger than ``longest - 1``."""
        out, job, sampling, N = self.out, self.job, self.sampling, len(self.out.jobs)
        count, position = out.counts[job], (out.lengths + out.counts)[job]
        processor = None if self.guide is None else self.guide.processor(self.hidden[-1], self.decoders[-1].matrix)
        chance = self.luck[job.clamp(max=N - 1), count.clamp(max=self.luck.shape[1] - 1)]
        first = self.decoders[0]
        logprobs, tokens = choose(first.logits(self.hidden[0]), chance, sampling, first.pieces, processor)
        done = (tokens[:, None] == self.eos).any(-1)
        out.record(job, position, tokens, logprobs, done)
        # Finished rows read their last token too: scores and bootstrapped values look at it.
        for number, decoder in enumerate(self.decoders):
            hidden, trunk = decoder.step(tokens, position, out.split, longest)
            self.hidden[number].copy_(hidden)
            if number == 0 and out.trunk is not None:
                out.trunk[job, position] = trunk
        self.job.masked_fill_(done | (count + 1 >= sampling.max_new_tokens), N)

    def _fill(self, free: Tensor) -> None:
        """Read the prompts of the next completions (each prompt once) into free rows."""
        out, jobs = self.out, [self.queue.popleft() for _ in range(min(len(free), len(self.queue)))]
        first = {out.jobs[job][0]: job for job in reversed(jobs)}  # of each prompt, one completion that has its tokens
        order = {prompt: number for number, prompt in enumerate(first)}
        source = torch.tensor([order[out.jobs[job][0]] for job in jobs], device=free.device)
        readers = torch.tensor(list(first.values()), device=free.device)
        lengths, rows, job_ids = out.lengths[readers], free[: len(jobs)], torch.tensor(jobs, device=free.device)
        width = int(lengths.max())
        for number, decoder in enumerate(self.decoders):
            last, trunk = decoder.prefill(out.tokens[readers, :width], lengths, rows, source, out.split)
            self.hidden[number][rows] = last[source]
            if number == 0 and out.trunk is not None:
                out.trunk[job_ids, :width] = trunk[source]
        self.job[rows] = job_ids

    def _shrink(self, rows: Tensor) -> None:
        for decoder in self.decoders:
            decoder.keep(rows)
        self.job, self.hidden = self.job[rows], [h[rows] for h in self.hidden]

    def _replay(self, longest: int) -> None:
        """A burst of steps on a GPU. The first with this ``longest`` runs as it is, which also warms up what a graph needs."""
        left = self.burst
        if longest not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(longest)
            torch.cuda.current_stream().wait_stream(side)
            left -= 1
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
            self.graphs[longest] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[longest], pool=self.pool):
                self.step(longest)
        for _ in range(left):
            self.graphs[longest].replay()


def choose(
    logits: Tensor, luck: Tensor, sampling: Sampling, pieces: Pieces, processor: LogitsProcessor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token a row and give its log-probability under the distribution it was drawn from. logits (B,V), luck (B,)."""
    if processor is None and not sampling.top_k and sampling.top_p == 1:
        tokens, drawn = pieces.draw(logits, luck, sampling.temperature)
        if not drawn.is_cuda and not bool(torch.isfinite(drawn).all()):
            raise Diverged(
                "The model's logits are not finite, so nothing can be sampled: its weights are damaged, or training has diverged."
            )
        return drawn, tokens
    logprobs = log_softmax_of(logits, sampling.temperature or 1.0, processor)
    if sampling.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        if sampling.top_k or sampling.top_p < 1:
            logprobs = restrict(logprobs, sampling.top_k, sampling.top_p)
        tokens = draw(logprobs, luck)
    return logprobs.gather(-1, tokens[:, None])[:, 0], tokens


def decode_foreign(
    policy: Policy, out: Output, job_range: range, luck: Tensor, sampling: Sampling, report: Progress, guide: Guide | None
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
    matrix, pieces = policy.model.output_matrix, pieces_for(device, model.compute_dtype)
    for _ in range(sampling.max_new_tokens):
        hidden, cache = model.advance(tokens, positions, mask, cache)
        count = out.counts[job]
        logprobs, chosen = choose(
            hidden @ matrix.to(hidden.dtype).t(),
            luck[job, count.clamp(max=luck.shape[1] - 1)],
            sampling,
            pieces,
            None if guide is None else guide.processor(hidden, matrix),
        )
        done = torch.isin(chosen, eos)
        at = lengths + count
        out.record(job[active], at[active], chosen[active], logprobs[active], done[active])
        ended = active & (done | (count + 1 >= sampling.max_new_tokens))
        safe_point("What was finished before is kept.")
        report(int(ended.sum()), int(active.sum()))
        tokens, positions = chosen[:, None], at[:, None]
        mask = torch.cat((mask, active[:, None]), dim=1)
        active &= ~ended
        if not active.any():
            return
