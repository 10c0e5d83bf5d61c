"""What two scores say of how a labeler compares the two: Bradley-Terry, and two models that know ties.

d is the difference of the scores, preferred minus other.

| model         | P(preferred)                        | P(tie)                                  |
|---------------|-------------------------------------|-----------------------------------------|
| Bradley-Terry | sigma(d)                            | none: ties are dropped                  |
| Davidson      | e^(d/2) / (e^(d/2) + e^(-d/2) + nu) | nu / (e^(d/2) + e^(-d/2) + nu)          |
| Rao-Kupper    | sigma(d - lambda)                   | (e^(2 lambda) - 1) sigma(d - lambda) sigma(-d - lambda) |

Bradley & Terry 1952; Davidson 1970, eq. 2.4; Rao & Kupper 1967, eq. 2.3 (theta = e^lambda). The one parameter is learned
with the scores, from a start at which two equal scores tie as often as the training comparisons do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accord.data.records import Pair, PairGroup
from accord.reward.settings import RewardSettings

RATE = 0.03
"""Learning rate of the tie parameter: one number, which the layers' rate would hardly move."""


class Comparison(nn.Module):
    """Negative log-likelihoods of preferences and ties.

    Args:
        tied: share of the comparisons that are ties, where learning starts.
    """

    def __init__(self, settings: RewardSettings, tied: float = 0.0) -> None:
        super().__init__()
        self.ties, self.margin = settings.ties, settings.margin
        tied = min(max(tied, 0.01), 0.9)
        if self.ties == "davidson":
            self.parameter = nn.Parameter(torch.tensor(math.log(2 * tied / (1 - tied))))  # log nu
        elif self.ties == "rao-kupper":
            self.parameter = nn.Parameter(torch.tensor(math.log(math.expm1(math.log((1 + tied) / (1 - tied))))))  # softplus^-1(lambda)

    def preferred(self, d: Tensor) -> Tensor:
        """-log P(the first is preferred), for score differences of any shape."""
        if self.ties == "davidson":
            return self._davidson(d) - d / 2
        return F.softplus(self.threshold - d) if self.ties == "rao-kupper" else F.softplus(-d)

    def tied(self, d: Tensor) -> Tensor:
        """-log P(a tie).

        Raises:
            ValueError: the model has no ties.
        """
        if self.ties == "davidson":
            return self._davidson(d) - self.parameter
        if self.ties == "drop":
            raise ValueError("Bradley-Terry gives ties no probability")
        at = self.threshold
        return F.softplus(at - d) + F.softplus(at + d) - torch.log(torch.expm1(2 * at))

    @property
    def threshold(self) -> Tensor:
        """nu of Davidson, lambda of Rao-Kupper."""
        return self.parameter.exp() if self.ties == "davidson" else F.softplus(self.parameter)

    def _davidson(self, d: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack([d / 2, -d / 2, self.parameter.to(d.dtype).expand_as(d)]), 0)

    def loss(self, scores: Tensor, groups: Sequence[PairGroup], offsets: Sequence[int]) -> Tensor:
        """Mean over groups, times their weights, of the weighted mean over a group's comparisons of -log P (Ouyang et al. 2022, eq. 1).

        A preference over ``distance`` ranks must be won by ``margin * (distance - 1)`` (Touvron et al. 2023, eq. 2).

        Args:
            scores: (N,) raw scores; group g's completions start at ``offsets[g]``.
        """
        total = scores.new_zeros(())
        for group, at in zip(groups, offsets, strict=True):
            losses, weights = [], []
            for pairs, loss in ((group.pairs, self._won), (group.ties if self.ties != "drop" else (), lambda d, _: self.tied(d))):
                if pairs:
                    losses.append(loss(differences(scores, pairs, at), pairs))
                    weights.append(scores.new_tensor([pair.weight for pair in pairs]))
            weight = torch.cat(weights)
            total = total + group.weight * (torch.cat(losses) * weight).sum() / weight.sum()
        return total / len(groups)

    def _won(self, d: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return self.preferred(d - self.margin * d.new_tensor([pair.distance - 1 for pair in pairs]) if self.margin else d)


def differences(scores: Tensor, pairs: Sequence[Pair], at: int = 0) -> Tensor:
    """Score of the preferred minus the other's, of each pair of a group whose completions start at ``at``."""
    better, worse = (torch.tensor([at + pair[side] for pair in pairs], device=scores.device) for side in (0, 1))
    return scores[better] - scores[worse]


def length_slope(groups: Sequence[PairGroup], lengths: Sequence[Sequence[int]]) -> float:
    """How much longer completions are preferred: b of P(preferred) = sigma(b * log(length / length of the other)).

    Fitted to the groups' pairs by Newton's method, with the lightest of ridges. 0: length says nothing.
    """
    x = torch.tensor([math.log(own[p.preferred] / own[p.other]) for group, own in zip(groups, lengths, strict=True) for p in group.pairs])
    w = torch.tensor([p.weight for group in groups for p in group.pairs])
    b = torch.zeros((), dtype=torch.float64)
    x, w = x.double(), w.double()
    for _ in range(50):
        p = torch.sigmoid(b * x)
        slope, curvature = (w * (1 - p) * x).sum() - 1e-3 * b, (w * p * (1 - p) * x * x).sum() + 1e-3
        b = b + slope / curvature
        if abs(slope / curvature) < 1e-9:
            break
    return float(b)
