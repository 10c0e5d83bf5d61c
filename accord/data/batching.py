"""Which of the data a step takes."""

from __future__ import annotations

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
