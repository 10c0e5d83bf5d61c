"""Proximal policy optimization, clipped (Schulman et al. 2017, eq. 7), as used from human feedback (Ouyang et al. 2022).

GRPO (Shao et al. 2024, eq. 3) is this surrogate over group-normalised scores, with the KL in the loss. That paper
averages within each completion first; here, as everywhere, the mean is over all tokens of the optimizer step, so that a
token weighs the same in a long completion as in a short one (Yu et al. 2025, eq. 8).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from accord.rl.algorithms.base import Algorithm
from accord.rl.experience import Experience
from accord.rl.objective import clipped_surrogate
from accord.rollout.scoring import Scored


class PPO(Algorithm):
    """J_CLIP = E_t[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)], several epochs over each rollout."""

    def surrogate(self, scored: Scored, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        out = clipped_surrogate(scored.logprobs, rows.old_logprobs, rows.advantages, rows.mask, self.settings.clip_epsilon, count)
        return out.objective, {
            "clip_fraction": out.clip_fraction,
            "ratio_error": out.ratio_error,
            "kl_old_new": out.approx_kl,
        }
