"""From raw rankings to the pairs a reward model learns from: a separate, documented step.

| two completions   | becomes                                                          |
|-------------------|------------------------------------------------------------------|
| different ranks   | a pair, preferred first                                          |
| same rank         | a tie: dropped here (Bradley-Terry has no ties)                  |
| ranked and F      | a pair, ranked first, weighted by ``fail_weight``                |
| F and F           | nothing                                                          |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from accord.data.records import Completion, PairGroup, RankedCompletions, Ranking
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


def group_pairs(completions: dict[str, list[Completion]], rankings: Sequence[Ranking], fail_weight: float = 1.0) -> list[PairGroup]:
    """One group a prompt. Labelers who contradict each other give both pairs, each with its weight.

    Equal texts within a prompt are one completion: a pair of them would ask the model to prefer a text to
    itself, so it is dropped.
    """
    by_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        by_prompt[ranking.prompt_id].append(ranking)
    groups = []
    for prompt_id, given in by_prompt.items():
        answers = completions.get(prompt_id)
        if answers is None:
            raise UserError(f"A ranking by '{given[0].labeler}' names the prompt '{prompt_id}', which has no completions.")
        weights: dict[tuple[int, int], float] = defaultdict(float)
        for ranking in given:
            if len(ranking.ranks) != len(answers):
                raise UserError(
                    f"Labeler '{ranking.labeler}' ranked {len(ranking.ranks)} completions of '{prompt_id}'; it has {len(answers)}."
                )
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
