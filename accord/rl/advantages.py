"""Returns and advantages from per-token rewards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    advantages: Tensor  # (B,T) fp32, 0 outside the response
    returns: Tensor  # (B,T) fp32, the value function's target, 0 outside the response


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 11-16).

    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma * lam * A_{t+1};  R_t = A_t + V(s_t).

    t runs over the tokens the policy chose; tokens between them (an environment's turn) are stepped over,
    so the next state of a turn's last token is the first state of the next turn. After the last chosen
    token the episode is over and the value is 0.

    Args:
        rewards, values: (B,T); values[t] is V of the state before token t.
        mask: (B,T) bool, the response mask.
        gamma: discount in [0,1]. lam: the bias-variance trade-off in [0,1].
    """
    B, T = rewards.shape
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(B)
    next_advantage = values.new_zeros(B)
    for t in range(T - 1, -1, -1):
        chosen = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(chosen, advantage, 0.0)
        next_advantage = torch.where(chosen, advantage, next_advantage)
        next_value = torch.where(chosen, values[:, t], next_value)
    returns = torch.where(mask, advantages + values, 0.0)
    return Advantages(advantages, returns)
