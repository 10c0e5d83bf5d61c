"""Which of the data a step takes, and which are computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


def in_turn(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which of ``count`` things step ``step`` takes: every one once in a seeded order, then all again in another order."""
    orders: dict[int, list[int]] = {}
    picked = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        picked.append(orders[epoch][index])
    return picked


def packs(chosen: Iterable[int], count: Callable[[int], int], longest: Callable[[int], int], tokens: int) -> list[list[int]]:
    """Groups of rows in their order, cut where their rows would have more padded tokens than that; a group stays whole.

    Args:
        chosen: which groups.
        count: rows of a group.
        longest: tokens of a group's longest row.
    """
    parts: list[list[int]] = []
    rows = widest = 0
    for i in chosen:
        rows, widest = rows + count(i), max(widest, longest(i))
        if parts and rows * widest <= tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
            rows, widest = count(i), longest(i)
    return parts
