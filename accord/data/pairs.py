"""From raw rankings to the pairs a reward model learns from: a separate, documented step.

| two completions   | becomes                                                          |
|-------------------|------------------------------------------------------------------|
| different ranks   | a pair, preferred first                                          |
| same rank         | a tie: for the losses that know ties; Bradley-Terry drops it     |
| ranked and F      | a pair, ranked first, weighted by ``fail_weight``                |
| F and F           | nothing                                                          |
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

from accord.data.records import Completion, Logged, Pair, PairGroup, RankedCompletions, Ranking
from accord.errors import UserError, did_you_mean


def pairs_of(ranking: Ranking, fail_weight: float = 1.0) -> tuple[list[Pair], list[Pair]]:
    """The pairs and the ties of one ranking."""
    used = sorted({rank for rank in ranking.ranks if rank is not None})
    places = [len(used) if rank is None else used.index(rank) for rank in ranking.ranks]  # 1, 2, 2, 4 stands as 1, 2, 2, 3
    pairs, ties = [], []
    for i, j in combinations(range(len(places)), 2):
        if places[i] == places[j]:
            if ranking.ranks[i] is not None:
                ties.append(Pair(i, j))
            continue
        better, worse = (i, j) if places[i] < places[j] else (j, i)
        weight = fail_weight if ranking.ranks[worse] is None else 1.0
        pairs.append(Pair(better, worse, weight, places[worse] - places[better]))
    return pairs, ties


def scored_by_rank(
    completions: Mapping[str, list[Completion]], rankings: Sequence[Ranking], labeler_weights: Mapping[str, float] | None = None
) -> list[Logged]:
    """Each ranked completion with a score in [-1, 1]: the share of the prompt's others it stands above minus the share it
    stands below, averaged over labelers (Borda's count). F stands below every rank; completions that nobody compared are left out.
    """
    given: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for ranking in (r for mine in rankings_by_prompt(rankings).values() for r in mine):
        answers_of(ranking, completions)
        trust = _trust(ranking, labeler_weights or {})
        if trust <= 0:
            continue
        places = ranking.places
        for k, place in enumerate(places):
            if len(places) > 1:
                above, below = sum(place < other for other in places), sum(place > other for other in places)
                given[ranking.prompt_id, k].append(((above - below) / (len(places) - 1), trust))
    return [
        Logged(completions[prompt][k], math.fsum(s * w for s, w in scores) / math.fsum(w for _, w in scores))
        for (prompt, k), scores in given.items()
    ]


def rankings_by_prompt(rankings: Iterable[Ranking]) -> dict[str, list[Ranking]]:
    """What stands of each prompt: one ranking a labeler, or where reviewers have decided the last decision alone.

    Raises:
        UserError: a labeler ranked, or decided, a prompt twice.
    """
    found: dict[str, dict[str, Ranking]] = defaultdict(dict)
    decided: dict[str, dict[str, Ranking]] = defaultdict(dict)
    for ranking in rankings:
        mine = (decided if ranking.decision else found)[ranking.prompt_id]
        if ranking.labeler in mine:
            did = "decided" if ranking.decision else "ranked"
            raise UserError(f"Labeler '{ranking.labeler}' {did} the prompt '{ranking.prompt_id}' twice; keep one of the two.")
        mine[ranking.labeler] = ranking
    last = {prompt: [list(given.values())[-1]] for prompt, given in decided.items()}
    return {prompt: list(given.values()) for prompt, given in found.items()} | last


def opinions(rankings: Iterable[Ranking]) -> list[Ranking]:
    """What labelers said of their own accord: all but the decisions."""
    return [ranking for ranking in rankings if not ranking.decision]


def answers_of(ranking: Ranking, completions: Mapping[str, list[Completion]]) -> list[Completion]:
    """The completions that a ranking ranks."""
    answers = completions.get(ranking.prompt_id)
    if answers is None:
        raise UserError(f"A ranking by '{ranking.labeler}' names the prompt '{ranking.prompt_id}', which has no completions.")
    if len(ranking.ranks) != len(answers):
        raise UserError(
            f"Labeler '{ranking.labeler}' ranked {len(ranking.ranks)} completions of '{ranking.prompt_id}'; it has {len(answers)}."
        )
    return answers


def group_pairs(
    completions: Mapping[str, list[Completion]],
    rankings: Sequence[Ranking],
    fail_weight: float = 1.0,
    labeler_weights: Mapping[str, float] | None = None,
) -> list[PairGroup]:
    """One group a prompt. Labelers who contradict each other give both pairs, each with its weight; a pair that several
    give has the sum of their weights and the mean of its distances.

    Equal texts within a prompt are one completion: a pair of them would ask the model to prefer a text to
    itself, so it is dropped.

    Args:
        labeler_weights: what a labeler's rankings count for, within a prompt and among prompts; 1 for those not named, and for decisions.

    Raises:
        UserError: a ranking is of other completions, a labeler ranked a prompt twice, or a weight is of nobody who ranked.
    """
    weights = labeler_weights or {}
    refuse_unknown(weights, {ranking.labeler for ranking in rankings})
    groups = []
    for given in rankings_by_prompt(rankings).values():
        trusts = [_trust(ranking, weights) for ranking in given]
        found: tuple[dict[tuple[int, int], list[Pair]], ...] = (defaultdict(list), defaultdict(list))
        for ranking, trust in zip(given, trusts, strict=True):
            answers = answers_of(ranking, completions)
            for kind, some in zip(found, pairs_of(ranking, fail_weight), strict=True):
                for pair in some:
                    if pair.weight * trust > 0 and answers[pair.preferred].text != answers[pair.other].text:
                        kind[pair[:2]].append(pair._replace(weight=pair.weight * trust))
        pairs, ties = (tuple(_together(some) for some in kind.values()) for kind in found)
        if pairs or ties:
            groups.append(PairGroup(answers[0].prompt, tuple(answers), pairs, ties, sum(trusts) / len(trusts)))
    return groups


def _trust(ranking: Ranking, weights: Mapping[str, float]) -> float:
    return 1.0 if ranking.decision else weights.get(ranking.labeler, 1.0)


def refuse_unknown(weights: Mapping[str, float], labelers: Collection[str]) -> None:
    """Raises:
    UserError: a weight is of nobody who ranked.
    """
    for who in sorted(weights.keys() - labelers):
        raise UserError(f"There is a weight for '{who}', who ranked nothing.{did_you_mean(who, labelers)}")


def _together(same: Sequence[Pair]) -> Pair:
    weight = sum(pair.weight for pair in same)
    return same[0]._replace(weight=weight, distance=sum(pair.weight * pair.distance for pair in same) / weight)


def grouped_pairs(ranked: RankedCompletions, fail_weight: float = 1.0) -> list[PairGroup]:
    """:func:`group_pairs` of everything the feedback stage collected."""
    return group_pairs(ranked.completions, ranked.rankings, fail_weight)
