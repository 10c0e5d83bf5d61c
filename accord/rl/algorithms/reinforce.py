"""The policy gradient itself (Williams 1992), one optimizer step a rollout.

What stands for the advantage makes it REINFORCE (return minus a moving average), RLOO (score minus the mean
of the prompt's other completions; Ahmadian et al. 2024, eq. 8) or advantage actor-critic (a critic and GAE;
Mnih et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from accord.rl.algorithms.base import Algorithm
from accord.rl.experience import Experience
from accord.rl.objective import policy_gradient, step_sizes
from accord.rollout.scoring import Scored


class Reinforce(Algorithm):
    """J = E_t[log pi(a_t|s_t) A_t]: its gradient is the policy gradient."""

    def surrogate(self, scored: Scored, rows: Experience, count: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        objective = policy_gradient(scored.logprobs, rows.advantages, rows.mask, count)
        return objective, step_sizes(scored.logprobs - rows.old_logprobs, rows.mask, count)
