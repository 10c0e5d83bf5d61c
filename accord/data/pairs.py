"""From raw rankings to the pairs a reward model learns from: a separate, documented step.

| two completions   | becomes                                                          |
|-------------------|------------------------------------------------------------------|
| different ranks   | a pair, preferred first                                          |
| same rank         | a tie: dropped here (Bradley-Terry has no ties)                  |
| ranked and F      | a pair, ranked first, weighted by ``fail_weight``                |
| F and F           | nothing                                                          |
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from accord.data.records import Completion, Logged, PairGroup, RankedCompletions, Ranking
from accord.errors import UserError


def pairs_of(ranking: Ranking, fail_weight: float = 1.0) -> list[tuple[int, int, float]]:
    """(preferred, other, weight) for every two completions that one ranking tells apart."""
    pairs = []
    for i, first in enumerate(ranking.ranks):
        for j in range(i + 1, len(ranking.ranks)):
            second = ranking.ranks[j]
            if first == second:
                continue
            if first is None or second is None:
                pairs.append((j, i, fail_weight) if first is None else (i, j, fail_weight))
            else:
                pairs.append((i, j, 1.0) if first < second else (j, i, 1.0))
    return pairs


def scored_by_rank(completions: dict[str, list[Completion]], rankings: Sequence[Ranking]) -> list[Logged]:
    """Each ranked completion with a score in [-1, 1]: the share of the prompt's others it stands above minus the share it
    stands below, averaged over labelers (Borda's count). F stands below every rank; completions without a ranking are left out.
    """
    given: dict[tuple[str, int], list[float]] = defaultdict(list)
    for ranking in rankings:
        answers_of(ranking, completions)
        places = [math.inf if rank is None else rank for rank in ranking.ranks]
        for k, place in enumerate(places):
            if len(places) > 1:
                above, below = sum(place < other for other in places), sum(place > other for other in places)
                given[ranking.prompt_id, k].append((above - below) / (len(places) - 1))
    if not given:
        raise UserError("The rankings compare no two completions, so no scores follow from them.")
    return [Logged(completions[prompt][k], sum(scores) / len(scores)) for (prompt, k), scores in given.items()]


def answers_of(ranking: Ranking, completions: dict[str, list[Completion]]) -> list[Completion]:
    """The completions that a ranking ranks."""
    answers = completions.get(ranking.prompt_id)
    if answers is None:
        raise UserError(f"A ranking by '{ranking.labeler}' names the prompt '{ranking.prompt_id}', which has no completions.")
    if len(ranking.ranks) != len(answers):
        raise UserError(
            f"Labeler '{ranking.labeler}' ranked {len(ranking.ranks)} completions of '{ranking.prompt_id}'; it has {len(answers)}."
        )
    return answers


def group_pairs(completions: dict[str, list[Completion]], rankings: Sequence[Ranking], fail_weight: float = 1.0) -> list[PairGroup]:
    """One group a prompt. Labelers who contradict each other give both pairs, each with its weight.

    Equal texts within a prompt are one completion: a pair of them would ask the model to prefer a text to
    itself, so it is dropped.
    """
    by_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        by_prompt[ranking.prompt_id].append(ranking)
    groups = []
    for given in by_prompt.values():
        weights: dict[tuple[int, int], float] = defaultdict(float)
        for ranking in given:
            answers = answers_of(ranking, completions)
            for better, worse, weight in pairs_of(ranking, fail_weight):
                if weight > 0 and answers[better].text != answers[worse].text:
                    weights[better, worse] += weight
        if weights:
            pairs = tuple((i, j, w) for (i, j), w in weights.items())
            groups.append(PairGroup(answers[0].prompt, tuple(answers), pairs))
    return groups


def grouped_pairs(ranked: RankedCompletions, fail_weight: float = 1.0) -> list[PairGroup]:
    """:func:`group_pairs` of everything the feedback stage collected."""
    return group_pairs(ranked.completions, ranked.rankings, fail_weight)
