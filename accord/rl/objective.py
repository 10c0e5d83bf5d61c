"""The PPO objective as the field writes it (Schulman et al. 2017, eq. 7 and 9):

    J(theta) = E_t[ J_CLIP(theta) - c1 * L_VF(theta) + c2 * S[pi_theta](s_t) ]

Each term is a pure function of tensors. Means are over the response tokens of the whole optimizer step:
``count`` is their number, and a micro-batch that holds some of them contributes its share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accord.rl.masked import masked_mean


class ClippedSurrogate(NamedTuple):
    objective: Tensor  # scalar, J_CLIP, to be maximised
    clip_fraction: Tensor  # scalar, share of tokens whose gradient the clip removes
    ratio_error: Tensor  # scalar, mean |ratio - 1|
    approx_kl: Tensor  # scalar, k3 estimate of KL[old || new] a token, nats


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float,
    count: Tensor | float | None = None,
) -> ClippedSurrogate:
    """J_CLIP = E_t[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)], r_t = pi(a_t|s_t) / pi_old(a_t|s_t) (eq. 7).

    pi_old is the policy that sampled; the frozen reference is not in here. All tensors (B,T).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    ratio = log_ratio.exp()
    advantages = advantages.detach()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    with torch.no_grad():
        clip_fraction = masked_mean((clipped < unclipped).float(), mask, count)
        ratio_error = masked_mean((ratio - 1).abs(), mask, count)
        approx_kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask, count)
    objective = masked_mean(torch.minimum(unclipped, clipped), mask, count)
    return ClippedSurrogate(objective, clip_fraction, ratio_error, approx_kl)


def ratio_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """E_t[r_t A_t], r_t = pi(a_t|s_t) / pi_old(a_t|s_t): TRPO's objective (Schulman et al. 2015, eq. 14). All (B,T)."""
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()
    return masked_mean(ratio * advantages.detach(), mask, count)


def policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """E_t[log pi(a_t|s_t) A_t], whose gradient is the policy gradient (Williams 1992; Sutton & Barto 2018, eq. 13.8). All (B,T)."""
    return masked_mean(torch.where(mask, logprobs, 0.0) * advantages.detach(), mask, count)


def step_sizes(log_ratio: Tensor, mask: Tensor, count: Tensor) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, a token: mean |ratio - 1|, and the k3 estimate of KL[old, new]. log_ratio (B,T)."""
    with torch.no_grad():
        log_ratio = torch.where(mask, log_ratio, 0.0)
        return {
            "ratio_error": masked_mean((log_ratio.exp() - 1).abs(), mask, count),
            "kl_old_new": masked_mean(torch.expm1(log_ratio) - log_ratio, mask, count),
        }


class ValueLoss(NamedTuple):
    loss: Tensor  # scalar, L_VF, to be minimised
    clip_fraction: Tensor  # scalar


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    old_values: Tensor | None = None,
    clip: float | None = None,
    count: Tensor | float | None = None,
) -> ValueLoss:
    """L_VF = E_t[ (V(s_t) - R_t)^2 / 2 ]; with ``clip``, the larger of that and of V kept within ``clip`` of V_old.

    (Schulman et al. 2017, eq. 9; the clipped form is that paper's code.) All tensors (B,T).
    """
    error = (values - returns.detach()) ** 2
    if clip is None or old_values is None:
        return ValueLoss(0.5 * masked_mean(error, mask, count), torch.zeros(()))
    old = old_values.detach()
    near = old + (values - old).clamp(-clip, clip)
    near_error = (near - returns.detach()) ** 2
    with torch.no_grad():
        fraction = masked_mean((near_error > error).float(), mask, count)
    return ValueLoss(0.5 * masked_mean(torch.maximum(error, near_error), mask, count), fraction)


def expectile_loss(error: Tensor, tau: float, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """E_t[|tau - 1(u_t < 0)| u_t^2], u (B,T): least where u's tau-expectile is 0 (Kostrikov et al. 2022, eq. 3)."""
    weight = torch.where(error < 0, 1 - tau, tau)
    return masked_mean(weight * error**2, mask, count)


def entropy_bonus(entropy: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """S = E_t[ H[pi(. | s_t)] ] in nats, of the whole next-token distribution. entropy (B,T)."""
    return masked_mean(entropy, mask, count)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[R - V] / Var[R] over the mask: 1 is perfect, 0 no better than a constant; NaN if R is constant."""
    target, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(correction=0) / target.var(correction=0)
