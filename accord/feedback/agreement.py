"""How far labelers agree, with each other and with known answers, and how much each is worth.

Everything is computed from raw rankings; a reviewer's decision, made in sight of the others', is none of them. Two completions that a labeler ranked are a *comparison*: -1 (the first is
better), 0 (they share a rank, or both are ``F``) or 1. ``F`` stands below every rank. Which of the two is called the first
means nothing, so statistics that know the values take every comparison from both sides.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from accord.data.pairs import opinions, rankings_by_prompt
from accord.data.records import Ranking
from accord.data.statistics import Estimate, bootstrap_ratio
from accord.errors import UserError

Level = Literal["nominal", "ordinal", "interval"]
DRAWS = 1000


class Comparison(NamedTuple):
    """What one labeler says of two completions of a prompt."""

    prompt: str
    first: int
    second: int
    labeler: str
    value: int  # -1: the first is better; 0: equal; 1: the second is better


def comparisons(rankings: Iterable[Ranking]) -> list[Comparison]:
    """Every two completions of every ranking."""
    out = []
    for r in rankings:
        places = r.places
        out += [
            Comparison(r.prompt_id, i, j, r.labeler, (places[i] > places[j]) - (places[i] < places[j]))
            for i, j in combinations(range(len(places)), 2)
        ]
    return out


# Coefficients.


def krippendorff_alpha(units: Iterable[Sequence[Any]], level: Level = "nominal") -> float:
    """Krippendorff's alpha: 1 - observed / expected disagreement (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        units: the values that each unit was given; units with fewer than two say nothing. Ordinal and interval values are numbers.

    Returns:
        1 where all agree, 0 where they agree as often as by chance; nan where there is nothing to tell (one value, or no two of a unit).
    """
    pairable = [list(values) for values in units if len(values) > 1]
    names: list[Any] = sorted({v for values in pairable for v in values}, key=lambda v: (str(type(v)), v))
    if len(names) < 2:
        return math.nan
    at = {name: k for k, name in enumerate(names)}
    coincidence = np.zeros((len(names), len(names)))
    for values in pairable:
        counts = np.bincount([at[v] for v in values], minlength=len(names)).astype(float)
        coincidence += _coincidence(counts)
    return _alpha(coincidence, names, level)


def _coincidence(counts: np.ndarray) -> np.ndarray:
    """What a unit whose values were given so often adds to the table of coincidences; nothing where there is no second value."""
    return (np.outer(counts, counts) - np.diag(counts)) / max(counts.sum() - 1, 1)


def _alpha(coincidence: np.ndarray, names: Sequence[Any], level: Level) -> float:
    totals = coincidence.sum(0)
    n, delta = totals.sum(), _differences(names, totals, level)
    expected = float((np.outer(totals, totals) * delta).sum() / max(n - 1, 1))
    return math.nan if expected == 0 else 1 - float((coincidence * delta).sum()) / expected


def _differences(names: Sequence[Any], totals: np.ndarray, level: Level) -> np.ndarray:
    """Squared difference of every two values."""
    if level == "nominal":
        return 1 - np.eye(len(names))
    if level == "interval":
        numbers = np.array(names, dtype=float)
        return np.asarray((numbers[:, None] - numbers) ** 2)
    upto = np.cumsum(totals)
    out = np.zeros((len(names), len(names)))
    for c, k in combinations(range(len(names)), 2):
        out[c, k] = out[k, c] = (upto[k] - (upto[c] - totals[c]) - (totals[c] + totals[k]) / 2) ** 2
    return out


def kendall_w(ranks: Sequence[Sequence[float]]) -> float:
    """Kendall's coefficient of concordance, corrected for ties (Kendall & Smith 1939; Siegel & Castellan 1988, 9.16).

    Args:
        ranks: one row a labeler, one place an item, equal places are ties. (m, n)

    Returns:
        0 (no concord) to 1 (all the same); nan where every labeler ties everything.
    """
    table = np.array([_average_ranks(row) for row in ranks])
    m, n = table.shape
    spread = float(((table.sum(0) - m * (n + 1) / 2) ** 2).sum())
    ties = sum(c**3 - c for row in ranks for c in Counter(row).values())
    whole = m * (m * (n**3 - n) - ties)
    return math.nan if whole == 0 else 12 * spread / whole


def _average_ranks(places: Sequence[float]) -> np.ndarray:
    """Places as ranks 1 to n, ties sharing their mean."""
    values = np.array(places, dtype=float)
    return np.asarray((values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) + 1) / 2)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa (1960) of two labelers' marks of the same things; nan where both always give one and the same mark."""
    n = len(first)
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, two = Counter(first), Counter(second)
    chance = sum(one[mark] * two[mark] for mark in one) / n**2
    return math.nan if chance == 1 else (agree - chance) / (1 - chance)


# Labelers as noisy witnesses.


@dataclass(frozen=True)
class DawidSkene:
    """What the votes say once each labeler's ways are known.

    Attributes:
        answers: unit -> probability of each category.
        confusion: labeler -> (C,C), the probability of each mark (column) given the true category (row).
        quality: labeler -> probability that a mark is right, over the categories as they occur.
    """

    categories: list[Any]
    answers: dict[Hashable, np.ndarray]
    confusion: dict[str, np.ndarray]
    quality: dict[str, float]


def dawid_skene(votes: Iterable[tuple[Hashable, str, Any]], iterations: int = 200, smoothing: float = 5.0) -> DawidSkene:
    """Expectation maximisation of Dawid & Skene (1979), from the votes' shares.

    Args:
        votes: (unit, labeler, category).
        smoothing: marks that every labeler is credited with for each true category, placed as all labelers' marks of it are: one with
            few votes is taken for an average one.

    Raises:
        UserError: there are no votes.
    """
    given = list(votes)
    if not given:
        raise UserError("There are no votes to learn labelers' quality from.")
    units, labelers = (list(dict.fromkeys(v[k] for v in given)) for k in (0, 1))
    categories = sorted({v[2] for v in given}, key=lambda v: (str(type(v)), v))
    place = [{name: k for k, name in enumerate(names)} for names in (units, labelers, categories)]
    u, who, mark = (np.array([place[k][v[k]] for v in given]) for k in range(3))
    c = len(categories)
    posterior = np.zeros((len(units), c))
    np.add.at(posterior, (u, mark), 1.0)
    posterior /= posterior.sum(1, keepdims=True)
    given_true = np.zeros((len(labelers), c, c))  # labeler, mark, true category
    for _ in range(iterations):
        counts = np.zeros_like(given_true)
        np.add.at(counts, (who, mark), posterior[u])
        everyone = counts.sum(0) + 1e-9
        counts += smoothing * everyone / everyone.sum(0)
        given_true = counts / (counts.sum(1, keepdims=True) + 1e-300)
        log = np.tile(np.log(posterior.mean(0) + 1e-300), (len(units), 1))
        np.add.at(log, u, np.log(given_true[who, mark] + 1e-300))
        moved = np.exp(log - log.max(1, keepdims=True))
        moved /= moved.sum(1, keepdims=True)
        change = float(np.abs(moved - posterior).max())
        posterior = moved
        if change < 1e-6:
            break
    prior = posterior.mean(0)
    return DawidSkene(
        categories,
        answers={unit: posterior[k] for unit, k in place[0].items()},
        confusion={who: given_true[k].T for who, k in place[1].items()},
        quality={who: float(prior @ np.diag(given_true[k])) for who, k in place[1].items()},
    )


def quality_of(rankings: Iterable[Ranking]) -> DawidSkene:
    """:func:`dawid_skene` of the rankings' comparisons."""
    both = ((c, side) for c in comparisons(opinions(rankings)) for side in (1, -1))
    return dawid_skene(((c.prompt, c.first, c.second, side), c.labeler, side * c.value) for c, side in both)


def labeler_weights(rankings: Sequence[Ranking]) -> dict[str, float]:
    """What each labeler's rankings should count for in reward training, from how their comparisons agree with all others'.

    The log-odds of being right against a given wrong answer (:func:`dawid_skene`), which is how independent witnesses are best
    weighed, not below 0, divided by their mean.
    """
    found = quality_of(rankings)
    wrong = max(len(found.categories) - 1, 1)
    odds = {who: max(0.0, math.log(q * wrong / (1 - q))) for who, raw in found.quality.items() for q in [min(max(raw, 0.01), 0.99)]}
    mean = sum(odds.values()) / len(odds)
    return {who: value / mean if mean > 0 else 1.0 for who, value in odds.items()}


# All of it.


@dataclass(frozen=True)
class LabelerReport:
    """One labeler: how many rankings, shares of F and of ties, agreement with the others and with gold (both strict comparisons only)."""

    rankings: int
    fails: float
    ties: float
    with_others: Estimate | None
    with_gold: Estimate | None
    quality: float


class OfPrompt(NamedTuple):
    """How far labelers agree on one prompt: share of comparisons that are the same, and Kendall's W (None: all of them tie all)."""

    prompt: str
    same: float
    kendall_w: float | None


@dataclass(frozen=True)
class Agreement:
    """Statistics of a set of rankings; intervals are 95%, by bootstrap over prompts. None: nothing to tell it from.

    Attributes:
        with_ties: share of the comparisons of two labelers of one prompt that are the same of better, equal, worse.
        without_ties: the same where neither says equal.
        alpha: Krippendorff's, ordinal, of the comparisons, each from both sides.
        kendall_w: mean of the prompts' coefficients.
        kappa_fail: of ``F`` or not, completion by completion: Cohen's, the mean over pairs of labelers weighted by what they share.
        disputed: prompts that two labelers ranked, by agreement, the least first.
    """

    prompts: int
    rankings: int
    with_ties: Estimate | None
    without_ties: Estimate | None
    alpha: Estimate | None
    kendall_w: Estimate | None
    kappa_fail: Estimate | None
    labelers: dict[str, LabelerReport]
    disputed: list[OfPrompt]


def agreement(rankings: Sequence[Ranking], gold: str | None = None, draws: int = DRAWS, seed: int = 0) -> Agreement:
    """Every statistic of these rankings.

    Args:
        gold: the labeler whose rankings are known to be right; not counted among the others.

    Raises:
        UserError: there are no rankings, a labeler ranked a prompt twice, two ranked different numbers of completions, or gold ranked nothing.
    """
    rankings = opinions(rankings)
    by_prompt = _by_prompt(rankings)
    if gold is not None and not any(r.labeler == gold for r in rankings):
        raise UserError(f"No ranking is by '{gold}', who was named as gold.")
    people = {prompt: [r for r in given if r.labeler != gold] for prompt, given in by_prompt.items()}
    people = {prompt: given for prompt, given in people.items() if given}
    counts, names = _Counts.of(list(people.values())), list(people)
    fails = _Marks.of([{r.labeler: [rank is None for rank in r.ranks] for r in given} for given in people.values()])
    pairs = lambda some: _ratio(some[:, 0], some[:, 1], names, draws, seed)
    w = {p: kendall_w([r.places for r in given]) for p, given in people.items() if len(given) > 1}
    w = {p: value for p, value in w.items() if not math.isnan(value)}
    rates = {p: float(a / n) for p, (a, n) in zip(names, counts.same, strict=True) if n}
    everyone = [r for given in people.values() for r in given]
    quality = quality_of(everyone).quality if rates else {}
    return Agreement(
        prompts=len(people),
        rankings=len(everyone),
        with_ties=pairs(counts.same),
        without_ties=pairs(counts.strict),
        alpha=_resampled(len(names), counts.alpha, draws, seed),
        kendall_w=_ratio(list(w.values()), [1.0] * len(w), list(w), draws, seed),
        kappa_fail=_resampled(len(names), fails.kappa, draws, seed),
        labelers=_labelers(by_prompt, gold, quality, draws, seed),
        disputed=sorted((OfPrompt(p, same, w.get(p)) for p, same in rates.items()), key=lambda of: (of.same, of.prompt)),
    )


def mark_kappa(prompts: Sequence[Mapping[str, Sequence[bool]]], draws: int = DRAWS, seed: int = 0) -> Estimate | None:
    """Cohen's kappa of whether completions are marked: the mean over pairs of labelers, weighted by what they share.

    Args:
        prompts: of each prompt its labelers' marks, one a completion.

    Returns:
        With a 95% interval by bootstrap over prompts; None where no two labelers say anything to tell it from.
    """
    return _resampled(len(prompts), _Marks.of(prompts).kappa, draws, seed)


def _by_prompt(rankings: Sequence[Ranking]) -> dict[str, list[Ranking]]:
    """:func:`rankings_by_prompt`, where all are of the same completions."""
    found = rankings_by_prompt(rankings)
    if not found:
        raise UserError("There are no rankings to compare.")
    for prompt, (first, *others) in found.items():
        for r in others:
            if len(first.ranks) != len(r.ranks):
                raise UserError(
                    f"Of '{prompt}' '{first.labeler}' ranked {len(first.ranks)} completions and '{r.labeler}' {len(r.ranks)}; they must be of the same."
                )
    return dict(sorted(found.items()))  # so that the bootstrap's draws do not depend on who was first


@dataclass(frozen=True)
class _Counts:
    """What adds up over P prompts. ``times``, below, is how often each prompt is taken."""

    same: np.ndarray  # (P,2): comparisons of two labelers that are the same, and all
    strict: np.ndarray  # (P,2): the same among those in which neither says equal
    coincidence: np.ndarray  # (P,3,3) of comparisons, as Krippendorff counts them

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Ranking]]) -> _Counts:
        same, strict = np.zeros((len(prompts), 2)), np.zeros((len(prompts), 2))
        coincidence = np.zeros((len(prompts), 3, 3))
        for p, given in enumerate(prompts):
            units: dict[tuple[int, int], list[int]] = defaultdict(list)
            for c in comparisons(given):
                units[c.first, c.second].append(c.value)
            for values in units.values():
                less, equal, more = counts = [values.count(v) for v in (-1, 0, 1)]
                coincidence[p] += _coincidence(np.array(counts, dtype=float))
                same[p] += sum(map(_twos, counts)), _twos(less + equal + more)
                strict[p] += _twos(less) + _twos(more), _twos(less + more)
        return cls(same, strict, coincidence)

    def alpha(self, times: np.ndarray) -> float:
        one_side = np.tensordot(times, self.coincidence, 1)
        return _alpha(one_side + one_side[::-1, ::-1], (-1, 0, 1), "ordinal")


@dataclass(frozen=True)
class _Marks:
    """What adds up of two labelers' marks of the same completions."""

    counts: np.ndarray  # (R,4) of one prompt: marked by neither, the second, the first, both
    prompt: np.ndarray  # (R,) whose
    pair: np.ndarray  # (R,) and by which two

    @classmethod
    def of(cls, prompts: Sequence[Mapping[str, Sequence[bool]]]) -> _Marks:
        counts, prompt, pair = [], [], []
        pairs: dict[tuple[str, str], int] = {}
        for p, given in enumerate(prompts):
            for a, b in combinations(sorted(given), 2):
                both = [2 * x + y for x, y in zip(given[a], given[b], strict=True)]
                counts.append([both.count(kind) for kind in range(4)])
                prompt.append(p)
                pair.append(pairs.setdefault((a, b), len(pairs)))
        return cls(np.array(counts, dtype=float).reshape(-1, 4), np.array(prompt, dtype=int), np.array(pair, dtype=int))

    def kappa(self, times: np.ndarray) -> float:
        if not len(self.pair):
            return math.nan
        drawn = self.counts * times[self.prompt, None]
        table = np.stack([np.bincount(self.pair, weights=drawn[:, k]) for k in range(4)])
        n = table.sum(0)
        some = n > 0
        neither, second, first, both = table[:, some] / n[some]
        chance = (first + both) * (second + both) + (1 - first - both) * (1 - second - both)
        told = chance < 1 - 1e-12
        if not told.any():
            return math.nan
        kappa = (neither + both - chance)[told] / (1 - chance[told])
        return float(np.average(kappa, weights=n[some][told]))


def _twos(n: int) -> float:
    """Ways to choose two."""
    return n * (n - 1) / 2


def _ratio(tops: Any, bottoms: Any, prompts: Sequence[str], draws: int, seed: int) -> Estimate | None:
    return bootstrap_ratio(tops, bottoms, prompts, draws, seed) if np.sum(bottoms) else None


def _resampled(prompts: int, statistic: Callable[[np.ndarray], float], draws: int, seed: int) -> Estimate | None:
    """A statistic of how often each prompt is taken: of each once, with a percentile interval over resampled ones. None where it
    hangs on so few prompts that one resample in twenty has nothing to tell it from."""
    value = statistic(np.ones(prompts))
    if math.isnan(value):
        return None
    luck = np.random.default_rng(seed)
    drawn = [statistic(luck.multinomial(prompts, np.full(prompts, 1 / prompts)).astype(float)) for _ in range(draws)]
    if np.isnan(drawn).mean() > 0.05:
        return None
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _labelers(
    by_prompt: Mapping[str, list[Ranking]], gold: str | None, quality: Mapping[str, float], draws: int, seed: int
) -> dict[str, LabelerReport]:
    """Everyone but gold, by name."""
    mine: dict[str, list[Ranking]] = defaultdict(list)
    others: dict[str, list[tuple[str, int, int]]] = defaultdict(list)  # prompt, comparisons that are the same, and all
    right: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    said: dict[str, list[int]] = defaultdict(list)
    for prompt, given in by_prompt.items():
        values = {r.labeler: [c.value for c in comparisons([r])] for r in given}
        for r in given:
            mine[r.labeler].append(r)
            said[r.labeler] += values[r.labeler]
            for other in values.keys() - {r.labeler}:
                both = [(a, b) for a, b in zip(values[r.labeler], values[other], strict=True) if a and b]
                (right if other == gold else others)[r.labeler].append((prompt, sum(a == b for a, b in both), len(both)))
    told = lambda rows: _ratio([a for _, a, _ in rows], [n for _, _, n in rows], [p for p, _, _ in rows], draws, seed)
    share = lambda marks: sum(marks) / len(marks) if marks else 0.0
    return {
        who: LabelerReport(
            len(mine[who]),
            share([rank is None for r in mine[who] for rank in r.ranks]),
            share([value == 0 for value in said[who]]),
            told(others[who]),
            told(right[who]),
            quality.get(who, math.nan),
        )
        for who in sorted(mine.keys() - {gold})
    }
