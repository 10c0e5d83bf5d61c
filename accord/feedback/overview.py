"""What the owner of a label store wants to know of it, from its raw labels."""

from __future__ import annotations

import datetime
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from accord.data.pairs import opinions
from accord.data.records import Ranking
from accord.data.statistics import Estimate, bootstrap_ratio
from accord.feedback.agreement import Agreement, LabelerReport, agreement, comparisons, mark_kappa
from accord.feedback.statements import AGAIN
from accord.feedback.store import FLAGS, Store

KNOWN = "\0known"  # the name of known ranks among labelers; nobody can have it
SAYS = ("better", "equal", "worse")


@dataclass(frozen=True)
class LabelerRow:
    """One labeler's work.

    Attributes:
        seconds: the median on an item; None if the page never told.
        last: when they answered last.
        report: of their rankings of real items; None if there are none.
        with_gold: agreement with known ranks, of strict comparisons.
        repeated: how often they say the same of two completions that they were shown again.
    """

    name: str
    done: int
    skipped: int
    seconds: float | None
    last: float
    report: LabelerReport | None
    with_gold: Estimate | None
    repeated: Estimate | None


@dataclass(frozen=True)
class Overview:
    """All of it.

    Attributes:
        days: rankings by day, the last two weeks in which there were any.
        confusion: comparisons of items shown twice, first answer by second: ``confusion[a][b]`` with :data:`SAYS`.
        longer: of strict comparisons, how often the longer completion is preferred, in characters.
        flags: of each flag that was set: on how many completions, by everybody, and Cohen's kappa of setting it or not.
    """

    progress: dict[str, int]
    days: list[tuple[str, int]]
    agreement: Agreement | None
    labelers: list[LabelerRow]
    confusion: list[list[int]]
    longer: Estimate | None
    flags: dict[str, tuple[int, Estimate | None]]


def overview(store: Store) -> Overview:
    """Reads every label; seconds for some ten thousand."""
    rankings, effort = opinions(store.rankings()), store.effort()
    found = agreement(rankings) if rankings else None
    known = [Ranking(prompt, KNOWN, ranks) for prompt, ranks in store.known()]
    on_gold = list(store.rankings("gold"))
    asked = {r.prompt_id for r in on_gold}
    gold = agreement([*on_gold, *(r for r in known if r.prompt_id in asked)], KNOWN).labelers if on_gold else {}
    said_first = {(r.prompt_id, r.labeler): r for r in rankings}
    again = [(said_first[r.prompt_id, r.labeler], r) for r in store.rankings(number=AGAIN) if (r.prompt_id, r.labeler) in said_first]
    work: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in effort:
        work[row["name"]].append(row)
    rows = []
    for name, mine in sorted(work.items()):
        seconds = [row["seconds"] for row in mine if row["seconds"]]
        rows.append(
            LabelerRow(
                name,
                done=sum(row["state"] == "done" for row in mine),
                skipped=sum(row["state"] == "skipped" for row in mine),
                seconds=statistics.median(seconds) if seconds else None,
                last=mine[-1]["closed"],
                report=found.labelers.get(name) if found else None,
                with_gold=gold[name].with_gold if name in gold else None,
                repeated=_repeated([pair for pair in again if pair[0].labeler == name]),
            )
        )
    return Overview(store.progress(), _days(effort), found, rows, _confusion(again), _longer(store, rankings), _flags(store))


def _days(effort: list[dict[str, Any]]) -> list[tuple[str, int]]:
    done = Counter(datetime.datetime.fromtimestamp(row["closed"]).strftime("%Y-%m-%d") for row in effort if row["state"] == "done")
    return sorted(done.items())[-14:]


def _twice(pairs: list[tuple[Ranking, Ranking]]) -> list[tuple[str, int, int]]:
    """(prompt, value at first, value again) of every comparison."""
    return [(a.prompt, a.value, b.value) for one, two in pairs for a, b in zip(comparisons([one]), comparisons([two]), strict=True)]


def _repeated(pairs: list[tuple[Ranking, Ranking]]) -> Estimate | None:
    told = _twice(pairs)
    return bootstrap_ratio([float(a == b) for _, a, b in told], [1.0] * len(told), [p for p, _, _ in told]) if told else None


def _confusion(pairs: list[tuple[Ranking, Ranking]]) -> list[list[int]]:
    """From both sides: which of two completions is called the first means nothing."""
    counts = Counter((sign * a + 1, sign * b + 1) for _, a, b in _twice(pairs) for sign in (1, -1))
    return [[counts[a, b] for b in range(3)] for a in range(3)]


def _flags(store: Store) -> dict[str, tuple[int, Estimate | None]]:
    given: dict[str, dict[str, list[tuple[str, ...]]]] = defaultdict(dict)
    for prompt, name, label in store.labels():
        if label.flags or label.ranks:  # who skipped without a flag says nothing of them
            given[prompt][name] = list(label.flags) or [()] * len(label.ranks)
    found = {}
    for flag in FLAGS:
        marks = [{name: [flag in some for some in said] for name, said in by_name.items()} for by_name in given.values()]
        count = sum(sum(said) for by_name in marks for said in by_name.values())
        if count:
            found[flag] = (count, mark_kappa(marks))
    return found


def _longer(store: Store, rankings: list[Ranking]) -> Estimate | None:
    wins, prompts = [], []
    ranked = {r.prompt_id for r in rankings}
    lengths = {key: [len(c.text) for c in group] for key, group in store.completions().items() if key in ranked}
    for c in comparisons(rankings):
        difference = lengths[c.prompt][c.second] - lengths[c.prompt][c.first]
        if c.value and difference:
            wins.append(float(c.value * difference > 0))
            prompts.append(c.prompt)
    return bootstrap_ratio(wins, [1.0] * len(wins), prompts) if wins else None
