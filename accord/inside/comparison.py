"""Two models on the same text: how well each tells it, how often they agree, how far apart they are, and what each writes."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import torch

from accord.data.charts import line_chart
from accord.data.records import Prompt
from accord.data.statistics import Estimate, bootstrap_ratio
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.nn.logprobs import exact_kl, token_stats
from accord.progress import bar, safe_point
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.rollout import Rollout, Row, from_rows
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import states_of

BEGINNING = 24
"""Tokens of a document that are continued side by side."""
PORTION = 1024  # positions whose logits are compared at once
BUDGET = 4096


@dataclass
class Told:
    """One model on the text. ``perplexity``: e^(nats a token), with its 95% interval, resampling documents; ``bits_per_byte``,
    of the bytes of those tokens, can be compared between tokenizers."""

    model: str
    perplexity: Estimate
    bits_per_byte: Estimate
    tokens: int


@dataclass
class Compared:
    """Of two models. ``agreement``, ``kl`` and ``kl_by_position`` are None where the tokenizers make different tokens of the text.

    Attributes:
        agreement: share of the places at which both find the same next token likeliest.
        kl, kl_back: KL[a || b] and KL[b || a] over the whole vocabulary, nats a token.
        kl_by_position: (place in its window, mean KL[a || b], places).
        samples: of each beginning the completion by a and by b, with the same random numbers.
    """

    a: Told
    b: Told
    documents: int
    agreement: Estimate | None
    kl: Estimate | None
    kl_back: Estimate | None
    kl_by_position: list[tuple[int, float, int]] | None
    samples: list[tuple[str, str, str]]

    def to_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return (
                value.to_json()
                if isinstance(value, Estimate)
                else {k: plain(v) for k, v in value.__dict__.items()}
                if isinstance(value, Told)
                else value
            )

        return {name: plain(value) for name, value in self.__dict__.items()}


@torch.no_grad()
def compare(a: Policy, b: Policy, texts: Sequence[str], window: int = 512, samples: int = 4, max_new_tokens: int = 64, seed: int = 0) -> Compared:  # fmt: skip
    """Measure both on documents, in windows of so many tokens; a window knows nothing of what is before it but one token.

    Raises:
        UserError: no document has two tokens.
    """
    window = min(window, a.context, b.context)
    texts = [text for text in texts if text.strip()]
    ids = [policy.tokenizer.encode_texts(texts) for policy in (a, b)]
    rows = [_windows(some, window) for some in ids]
    told = [_told(policy, texts, own, some) for policy, own, some in zip((a, b), ids, rows, strict=True)]
    agreement = kl = back = positions = None
    if ids[0] == ids[1]:
        agreement, kl, back, positions = _apart(a, b, rows[0])
    return Compared(
        told[0], told[1], len(texts), agreement, kl, back, positions, _side_by_side(a, b, texts[:samples], max_new_tokens, seed)
    )


def _windows(ids: Sequence[list[int]], window: int) -> list[Row]:
    """Each token of a document but its first is told once: a window begins with the last token of the one before."""
    rows = []
    for number, own in enumerate(ids):
        for start in range(0, len(own) - 1, window - 1):
            row = Row(Prompt(str(number), ""), 0)
            row.extend(own[start : start + 1], False)
            row.extend(own[start + 1 : start + window], True)
            rows.append(row)
    if not rows:
        raise UserError("No document has two tokens; give more text.")
    return rows


def _bytes(policy: Policy, token: int) -> int:
    """Of a document's first token, which may end within a character."""
    text = policy.tokenizer.decode([token])
    return len(text.encode()) if "\ufffd" not in text else len(str(policy.tokenizer.inner.convert_ids_to_tokens(token)))


def _batches(policy: Policy, rows: Sequence[Row], tokens: int) -> list[Rollout]:
    size = max(1, tokens // max(len(row.tokens) for row in rows))
    return [
        from_rows(some, [True] * len(some), [""] * len(some), policy.tokenizer.pad_id, torch.device("cpu"), sampled=False).to(policy.device)
        for some in (rows[i : i + size] for i in range(0, len(rows), size))
    ]


def _told(policy: Policy, texts: Sequence[str], ids: Sequence[list[int]], rows: Sequence[Row]) -> Told:
    def work(tokens: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with bar("Reading", len(rows)) as progress:
            for rollout in _batches(policy, rows, tokens):
                safe_point("Nothing is kept of the comparison.")
                states = states_of(policy.model, rollout, 0)
                chosen = rollout.response_mask
                logprobs = token_stats(states, policy.model.output_matrix, rollout.tokens[chosen], entropic=False).logprobs
                for prompt, own in zip(rollout.prompts, logprobs.split(chosen.sum(1).tolist()), strict=True):
                    found[prompt.id][0] -= float(own.double().sum())
                    found[prompt.id][1] += len(own)
                progress.advance(len(rollout))
        return found

    by_document = TokenBudget(BUDGET).fit(work)
    names = list(by_document)
    nats, counts = zip(*by_document.values(), strict=True)
    mean = bootstrap_ratio(nats, counts, names)
    sizes = [max(1, len(texts[int(name)].encode()) - _bytes(policy, ids[int(name)][0])) * math.log(2) for name in names]
    perplexity = Estimate(*(math.exp(min(value, 700.0)) for value in (mean.value, mean.low, mean.high)))
    return Told(policy.source, perplexity, bootstrap_ratio(nats, sizes, names), int(sum(counts)))


def _apart(a: Policy, b: Policy, rows: Sequence[Row]) -> tuple[Estimate, Estimate, Estimate, list[tuple[int, float, int]]]:
    size = min(p.model.output_matrix.shape[0] for p in (a, b))  # rows beyond are no token of one of them
    mine_out, their_out = (p.model.output_matrix[:size] for p in (a, b))

    def work(tokens: int) -> tuple[dict[str, list[float]], dict[int, list[float]]]:
        found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        places: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with bar("Comparing", len(rows)) as progress:
            for rollout in _batches(a, rows, tokens):
                safe_point("Nothing is kept of the comparison.")
                mine, theirs = (states_of(p.model, rollout, 0) for p in (a, b))
                kl = exact_kl(mine, mine_out, theirs, their_out)
                back = exact_kl(theirs, their_out, mine, mine_out)
                same = torch.cat([
                    (x @ mine_out.to(x.dtype).t()).argmax(-1) == (y @ their_out.to(y.dtype).t()).argmax(-1)
                    for x, y in zip(mine.split(PORTION), theirs.split(PORTION), strict=True)
                ]).float()  # fmt: skip
                counts = rollout.response_mask.sum(1).tolist()
                for prompt, s, k, r in zip(rollout.prompts, same.split(counts), kl.split(counts), back.split(counts), strict=True):
                    found[prompt.id] = [
                        x + y for x, y in zip(found[prompt.id], (float(s.sum()), float(k.sum()), float(r.sum()), len(s)), strict=True)
                    ]
                    for place, value in enumerate(k.tolist(), 1):
                        places[place][0] += value
                        places[place][1] += 1
                progress.advance(len(rollout))
        return found, places

    by_document, by_place = TokenBudget(BUDGET).fit(work)
    columns = list(zip(*by_document.values(), strict=True))
    agreement, kl, back = (bootstrap_ratio(column, columns[3], list(by_document)) for column in columns[:3])
    return agreement, kl, back, [(place, total / count, int(count)) for place, (total, count) in sorted(by_place.items())]


def _side_by_side(a: Policy, b: Policy, texts: Sequence[str], most: int, seed: int) -> list[tuple[str, str, str]]:
    if not texts:
        return []
    sides, beginnings = [], list[str]()
    for policy in (a, b):
        ids = [own[:BEGINNING] for own in policy.tokenizer.encode_texts(texts)]
        room = min(most, policy.context - max(map(len, ids)))
        if room < 1:
            return []
        written = Engine(policy, len(ids)).go_on(
            ids, [f"sample-{k}" for k in range(len(ids))], Sampling(1.0, max_new_tokens=room, seed=seed)
        )
        beginnings = beginnings or [policy.tokenizer.decode(own) for own in ids]
        sides.append([policy.tokenizer.decode(tokens) for tokens, _, _ in written])
    return list(zip(beginnings, *sides, strict=True))


def table(found: Compared) -> list[tuple[str, str, str]]:
    """Rows for people: what, of a, of b."""
    rows = [
        ("perplexity", str(found.a.perplexity), str(found.b.perplexity)),
        ("bits a byte", str(found.a.bits_per_byte), str(found.b.bits_per_byte)),
        ("tokens told", f"{found.a.tokens:,}", f"{found.b.tokens:,}"),
    ]
    if found.kl is not None and found.kl_back is not None:
        rows.append(("KL to the other, nats a token", str(found.kl), str(found.kl_back)))
    return rows


def page(found: Compared) -> str:
    """A self-contained page."""
    points: dict[str, Sequence[tuple[float, float]]] = {"KL": [(place, kl) for place, kl, _ in found.kl_by_position or []]}
    note = f"KL[{found.a.model} || {found.b.model}], nats a token, by the token's place in its window."
    template = jinja2.Environment(autoescape=True).from_string((files("accord.inside") / "compare.html.j2").read_text())
    return template.render(
        found=found, table=table(found), style=(files("accord.data") / "page.css").read_text(),
        chart=line_chart("How far apart", points, note, "place") if found.kl_by_position else "",
    )  # fmt: skip


def as_json(found: Compared) -> str:
    return json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n"
