"""The KL leash: estimators of KL[policy || reference] a token, and what sets its coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL[policy || reference] from the sampled token, nats, same shape.

    With d = log pi - log pi_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, unbiased and may be
    negative; k2 = d^2 / 2, biased and low in variance; k3 = exp(-d) - 1 + d, unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown estimator {estimator!r}; use one of {ESTIMATORS}")


@dataclass
class FixedKL:
    """A constant coefficient."""

    coef: float

    def update(self, kl: float, samples: int) -> None:
        del kl, samples

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}


@dataclass
class AdaptiveKL:
    """Steers the coefficient so that the KL of a completion stays near ``target`` nats.

    Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e * samples / horizon.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, samples: int) -> None:
        """``kl``: mean nats a completion of this iteration; ``samples``: its number of completions."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * samples / self.horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}


KLController = FixedKL | AdaptiveKL
