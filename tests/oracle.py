"""The formulas again, in NumPy and float64, written from the papers and one row at a time."""

import numpy as np


def log_softmax(z):
    z = np.asarray(z, dtype=np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def gae(rewards, values, gamma, lam):
    """Schulman et al. 2016, eq. 16, as the explicit double sum over one row's chosen tokens."""
    n = len(rewards)
    following = np.append(values[1:], 0.0)
    delta = np.asarray(rewards) + gamma * following - np.asarray(values)
    return np.array([sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)])


def clipped(logp, old, adv, eps):
    """Schulman et al. 2017, eq. 7, over a flat list of tokens."""
    r = np.exp(np.asarray(logp) - np.asarray(old))
    return np.mean([min(ri * a, min(max(ri, 1 - eps), 1 + eps) * a) for ri, a in zip(r, adv, strict=True)])


def value_loss(v, ret, old=None, clip=None):
    v, ret = np.asarray(v), np.asarray(ret)
    if clip is None:
        return 0.5 * np.mean((v - ret) ** 2)
    near = np.asarray(old) + np.clip(v - old, -clip, clip)
    return 0.5 * np.mean(np.maximum((v - ret) ** 2, (near - ret) ** 2))
