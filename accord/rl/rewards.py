"""From one score a completion to a reward a token."""

from __future__ import annotations

from torch import Tensor

TRUNCATION = ("penalize", "bootstrap", "nothing")


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    last: Tensor,
    kl_coef: float,
    finished: Tensor,
    truncation: str = "penalize",
    penalty: float = 1.0,
    gamma: float = 1.0,
    final_values: Tensor | None = None,
) -> Tensor:
    """r_t = -kl_coef * KL_t, and the score on the last response token (Ouyang et al. 2022, eq. 2).

    Args:
        scores: (B,), one number a completion.
        kl: (B,T) per-token KL estimate.
        mask: (B,T) bool, the response mask. last: (B,) its last True column.
        finished: (B,) bool; False is a completion that the length limit cut.
        truncation: what a cut completion gets besides its score: ``penalize`` subtracts ``penalty``;
            ``bootstrap`` adds gamma * V(state after the last token), since the episode did not end there;
            ``nothing``.
        final_values: (B,), V of the state after the last token; needed by ``bootstrap``.

    Returns:
        (B,T) rewards, 0 outside the response.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    terminal = scores.to(rewards.dtype)
    cut = (~finished).to(rewards.dtype)
    if truncation == "penalize":
        terminal = terminal - penalty * cut
    elif truncation == "bootstrap":
        if final_values is None:
            raise ValueError("truncation='bootstrap' needs final_values")
        terminal = terminal + gamma * final_values * cut
    elif truncation != "nothing":
        raise ValueError(f"unknown truncation {truncation!r}; use one of {TRUNCATION}")
    return rewards.scatter_add(1, last[:, None], terminal[:, None])
