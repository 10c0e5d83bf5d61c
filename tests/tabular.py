"""A policy, a reference and a critic that are tables, in float64: small enough for finite differences of everything.

The state before a token is the sum of an embedding of the token before it and one of its column; logits are a
product with an output matrix. :class:`World` computes the same in NumPy.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from accord.data.records import Prompt
from accord.nn.foreign import ForeignModel
from accord.rl.experience import Experience
from accord.rl.kl import kl_estimate
from accord.rollout.rollout import Rollout

V, D, B, T = 7, 3, 6, 11


class Table(ForeignModel):
    def __init__(self, seed, scale=1.0):
        nn.Module.__init__(self)
        rng = np.random.default_rng(seed)
        self.compute_dtype = torch.float64
        for name, shape in (("by_token", (V, D)), ("by_column", (T, D)), ("matrix", (V, D))):
            setattr(self, name, nn.Parameter(torch.tensor(rng.normal(size=shape) * scale)))

    def near(self, other, distance):
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data + distance * mine.data
        return self

    @property
    def device(self):
        return torch.device("cpu")

    def hidden(self, tokens, positions, mask):
        return self.by_token[tokens] + self.by_column[positions]

    @property
    def output_matrix(self):
        return self.matrix


class Values(nn.Module):
    """A critic: V after each token."""

    def __init__(self, seed):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.by_token, self.by_column = (nn.Parameter(torch.tensor(rng.normal(size=n))) for n in (V, T))

    def forward(self, rollout, where):
        return torch.where(where, self.by_token[rollout.tokens] + self.by_column[rollout.positions], 0.0)

    def trainable(self):
        return dict(self.named_parameters())


class World:
    """A random ragged batch and everything an algorithm gets; parameters as one NumPy vector, and back."""

    def __init__(self, seed, settings):
        rng = np.random.default_rng(seed)
        self.settings = settings
        self.model = Table(100 * seed)
        # Near enough for ratios of about a half to two, as in training.
        self.reference, self.old, self.other = (Table(100 * seed + k).near(self.model, 0.2) for k in (1, 2, 3))
        self.critic = Values(seed) if settings.needs_critic else None
        self.policy = SimpleNamespace(
            model=self.model, start=self.reference, split=0, trunk_layers=0, trainable=lambda: dict(self.model.named_parameters()),
            snapshot=lambda: self.old,
        )  # fmt: skip
        self.tokens = rng.integers(0, V, size=(B, T))
        self.mask = np.zeros((B, T), dtype=bool)
        for row in range(B):
            start = rng.integers(1, 4)
            self.mask[row, start : rng.integers(start + 2, T + 1)] = True
        self.mask[0] = False
        self.mask[0, [2, 3, 6, 7, 8]] = True  # two turns
        self.valid = np.ones(B, dtype=bool)
        self.valid[4] = False  # a row whose reward was None
        self.used = self.mask & self.valid[:, None]
        self.scores, self.values = rng.normal(size=B), rng.normal(size=(B, T))
        self.finished = rng.random(B) < 0.6
        self.kl_coef = 0.13
        self.sampled = np.where(self.mask, rng.normal(-2.0, 1.0, size=(B, T)), 0.0)  # log mu of the tokens

    # NumPy.

    def logp(self, model):
        """(B,T,V): the distribution before each token, of a model's current parameters; column 0 has none."""
        import oracle

        p = {n: x.detach().numpy() for n, x in model.named_parameters()}
        hidden = p["by_token"][self.tokens] + p["by_column"][np.arange(T)]
        logits = hidden @ p["matrix"].T / self.settings.temperature
        return np.concatenate((np.full((B, 1, V), np.nan), oracle.log_softmax(logits)[:, :-1]), axis=1)

    def picked(self, logp):
        return np.take_along_axis(logp, self.tokens[..., None], -1)[..., 0]

    def value(self):
        after = self.critic.by_token.detach().numpy()[self.tokens] + self.critic.by_column.detach().numpy()[np.arange(T)]
        return np.concatenate((np.zeros((B, 1)), after[:, :-1]), axis=1)

    # Torch.

    def experience(self, guide=None, old_logprobs=None):
        t, mask = torch.tensor, torch.tensor(self.mask)
        lengths = np.array([np.flatnonzero(m)[-1] + 1 for m in self.mask])
        token_mask = torch.arange(T)[None] < t(lengths)[:, None]
        zeros = torch.zeros(B, T, dtype=torch.float64)
        old = self.picked(self.logp(self.old)) if old_logprobs is None else old_logprobs
        mine, ref = (torch.where(mask, t(x), 0.0) for x in (old, self.picked(self.logp(self.reference))))
        kl = kl_estimate(mine, ref, "k1" if self.settings.kl_estimator == "full" else self.settings.kl_estimator)
        rollout = Rollout(
            t(self.tokens), torch.arange(T).expand(B, T), token_mask, mask, t(self.sampled), t(self.finished),
            [Prompt(f"p{row // 3}", "x") for row in range(B)], [row % 3 for row in range(B)], [""] * B,
        )  # fmt: skip
        return Experience(
            rollout=rollout, mask=t(self.used), scores=t(self.scores), valid=t(self.valid), parts={}, old_logprobs=mine,
            old_entropy=zeros, ref_logprobs=ref, raw_logprobs=mine, kl=kl, values=torch.where(mask, t(self.values), 0.0),
            final_values=torch.zeros(B, dtype=torch.float64), rewards=zeros, advantages=zeros, returns=zeros,
            kl_coef=self.kl_coef, guide=guide, old_model=self.old,
        )  # fmt: skip

    def parameters(self):
        return [*self.model.parameters(), *([] if self.critic is None else self.critic.parameters())]

    def finite_differences(self, loss, step=1e-6):
        """Central differences of a NumPy loss in every parameter, as one vector."""
        out = []
        for p in self.parameters():
            flat = p.data.view(-1)
            for i in range(len(flat)):
                kept = float(flat[i])
                flat[i] = kept + step
                up = loss()
                flat[i] = kept - step
                down = loss()
                flat[i] = kept
                out.append((up - down) / (2 * step))
        return np.array(out)
