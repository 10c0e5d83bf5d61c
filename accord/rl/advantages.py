"""Returns and advantages from per-token rewards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accord.rl.masked import ROUNDING


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


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{k>=0} gamma^k r_{t+k} over the chosen tokens from t on, (B,T), 0 outside the response.

    (Sutton & Barto 2018, eq. 3.8.) As in :func:`gae`, tokens that the policy did not choose are stepped over.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0).returns


def leave_one_out(totals: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """A_i = R_i - mean of the other completions' R of the same prompt (Ahmadian et al. 2024, eq. 8). All (B,).

    Args:
        totals: R, one number a completion. group: (B,) int, equal for completions of one prompt.
        valid: (B,) bool; others do not count and get 0. A completion without valid others gets 0.
    """
    same = (group[:, None] == group[None, :]) & valid[None, :] & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    others = same.sum(-1)
    baseline = (same * torch.where(valid, totals, 0.0)[None, :]).sum(-1) / others.clamp(min=1)
    return torch.where(valid & (others > 0), totals - baseline, 0.0)


def group_normalised(totals: Tensor, group: Tensor, valid: Tensor, eps: float = 1e-8) -> Tensor:
    """A_i = (R_i - mean) / (standard deviation + eps) within the prompt's completions (Shao et al. 2024, sec. 4.1.2).

    Population standard deviation, as everywhere in accord. A group whose completions score alike gets 0.
    Arguments as for :func:`leave_one_out`.
    """
    same = (group[:, None] == group[None, :]) & valid[None, :]
    count = same.sum(-1).clamp(min=1)
    totals = torch.where(valid, totals, 0.0)
    mean = (same * totals[None, :]).sum(-1) / count
    variance = (same * (totals[None, :] - mean[:, None]) ** 2).sum(-1) / count
    deviation, largest = variance.sqrt(), (same * totals.abs()[None, :]).amax(-1)
    return torch.where(valid & (deviation > ROUNDING * largest), (totals - mean) / (deviation + eps), 0.0)


def truncated_ratio(logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old(a|s) / mu(a|s), cap): what a token drawn from mu counts for pi_old (Ionides 2008, eq. 2).

    logprobs, sampled_logprobs: nats, of the policy as it is trained and as it sampled.
    """
    return (logprobs - sampled_logprobs).exp().clamp(max=cap)


def n_step_targets(rewards: Tensor, bootstrap: Tensor, mask: Tensor, gamma: float, n: int) -> Tensor:
    """y_t = sum_{k<n} gamma^k r_{t+k} + gamma^n b_{t+n} over the chosen tokens, (B,T), 0 outside the response.

    (Sutton & Barto 2018, eq. 7.1.) After the last chosen token the episode is over: no reward, no bootstrap.

    Args:
        bootstrap: (B,T), the value b of the state before each token.
    """
    target = bootstrap
    for _ in range(n):
        shifted = torch.zeros_like(target)
        following = target.new_zeros(len(target))
        for t in range(target.shape[1] - 1, -1, -1):
            shifted[:, t] = following
            following = torch.where(mask[:, t], target[:, t], following)
        target = rewards + gamma * shifted
    return torch.where(mask, target, 0.0)
