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


# Advantages, a row or a group at a time.


def returns_to_go(rewards, gamma):
    """Sutton & Barto 2018, eq. 3.8."""
    n = len(rewards)
    return np.array([sum(gamma**k * rewards[t + k] for k in range(n - t)) for t in range(n)])


def leave_one_out(scores):
    """Ahmadian et al. 2024, eq. 8, within one prompt."""
    k = len(scores)
    if k < 2:
        return np.zeros(k)
    return np.array([scores[i] - sum(scores[j] for j in range(k) if j != i) / (k - 1) for i in range(k)])


def group_normalised(scores):
    """Shao et al. 2024, section 4.1.2, population standard deviation."""
    scores = np.asarray(scores)
    return (scores - scores.mean()) / (scores.std() + 1e-8)


def n_step(rewards, bootstrap, gamma, n):
    """Sutton & Barto 2018, eq. 7.1, over one row's chosen tokens."""
    m = len(rewards)
    out = []
    for t in range(m):
        y = sum(gamma**k * rewards[t + k] for k in range(min(n, m - t)))
        out.append(y + (gamma**n * bootstrap[t + n] if t + n < m else 0.0))
    return np.array(out)


# Whole objectives, over flat lists of tokens.


def kl(p, q):
    """KL[p || q] from log-probabilities over the vocabulary."""
    return (np.exp(p) * (p - q)).sum(-1)


def entropy(logp):
    return -(np.exp(logp) * logp).sum(-1)


def ilql(q, y, q_target, v, among, tokens, tau, cql):
    """Snell et al. 2022, eq. 4 (TD and expectile) and 5 (CQL), over flat lists of tokens; among (N,V) is Q(s, .) up to V(s)."""
    td = np.mean([(a - b) ** 2 for a, b in zip(q, y, strict=True)])
    expectile = np.mean([abs(tau - (1.0 if u < 0 else 0.0)) * u**2 for u in q_target - v])
    picked = [log_softmax(row)[token] for row, token in zip(among, tokens, strict=True)]
    return td + expectile - cql * np.mean(picked)


def nucleus(logp, top_p):
    """Holtzman et al. 2020, eq. 2: the smallest set of likeliest tokens with mass of at least top_p."""
    allowed = np.zeros(len(logp), dtype=bool)
    mass = 0.0
    for token in np.argsort(-logp):
        if mass >= top_p:
            break
        allowed[token] = True
        mass += np.exp(logp[token])
    return allowed
