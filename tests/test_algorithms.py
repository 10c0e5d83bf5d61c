"""Every algorithm's advantages, loss and gradient against a float64 oracle; then each in the real loop."""

import itertools
import json
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from conftest import byte_tokenizer
from tabular import B, T, Table, V, World
from transformers import GPT2Config, GPT2LMHeadModel

from accord.api import load_start
from accord.data.records import Completion, Logged, Prompt, Turn
from accord.data.sources import read_logged
from accord.errors import UserError
from accord.nn.attention import WRITTEN_OUT
from accord.nn.budget import TokenBudget
from accord.nn.logprobs import Contrast, EpsilonGreedy, Nucleus, exact_kl, nucleus_set, token_stats
from accord.planning.models import rollout_of
from accord.reward.sources import Reward, build_reward
from accord.rl.advantages import group_normalised, leave_one_out, n_step_targets, returns_to_go
from accord.rl.algorithms import make_algorithm
from accord.rl.algorithms.ppo_penalty import adapted
from accord.rl.algorithms.trpo import TRPO
from accord.rl.experience import score_rollout, values_before
from accord.rl.explain import explain
from accord.rl.masked import whiten
from accord.rl.natural import conjugate_gradient, fisher_vector_product
from accord.rl.objective import expectile_loss
from accord.rl.offline import Log
from accord.rl.optimize import PolicyOptimizer
from accord.rl.registry import ALGORITHMS
from accord.rl.settings import RLSettings
from accord.rl.trainer import State, train
from accord.rollout.engine import Engine
from accord.rollout.environments import Answer
from accord.rollout.episodes import play
from accord.rollout.guides import Explore, Perturb, Within
from accord.rollout.policy import Policy
from accord.rollout.rollout import from_completions
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import score
from accord.runs import Run

WORLD = dict(
    temperature=0.8, entropy_coef=0.07, value_coef=0.6, value_clip=0.3, clip_epsilon=0.2, truncation="penalize", truncation_penalty=0.7,
    gamma=0.9, gae_lambda=0.8, completions_per_prompt=3, prompts_per_step=2, epochs=1, minibatches=1, micro_batch_tokens=30,
)  # fmt: skip
t = torch.tensor


def world(algorithm, seed=0, **changes):
    given = {k: v for k, v in WORLD.items() if k not in ALGORITHMS[algorithm].unused}
    if algorithm in ("dqn", "ilql"):
        given["q_scale"] = 0.3
    if changes.get("advantage", ALGORITHMS[algorithm].advantages[0]) in ("leave_one_out", "group"):
        given["gamma"] = 1.0
    settings = RLSettings(**{**given, "algorithm": algorithm, **changes})
    w = World(seed, settings)
    return w, make_algorithm(settings, w.policy, w.critic)


# Advantages.


@pytest.mark.parametrize("seed", range(5))
def test_advantages_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    w, _ = world("ppo", seed)
    rewards, bootstrap = rng.normal(size=(2, B, T)) * w.mask
    mask = t(w.mask)
    togo = returns_to_go(t(rewards), mask, 0.9).numpy()
    steps = n_step_targets(t(rewards), t(bootstrap), mask, 0.9, 3).numpy()
    for row in range(B):
        m = w.mask[row]
        np.testing.assert_allclose(togo[row, m], oracle.returns_to_go(rewards[row, m], 0.9), rtol=1e-10)
        np.testing.assert_allclose(steps[row, m], oracle.n_step(rewards[row, m], bootstrap[row, m], 0.9, 3), rtol=1e-10)
        assert not togo[row, ~m].any() and not steps[row, ~m].any()
    totals, group = rng.normal(size=7), np.array([0, 1, 0, 2, 1, 0, 1])  # of any order; prompt 2 has one completion
    valid = np.array([1, 1, 1, 1, 0, 1, 1], dtype=bool)
    for form, expected in ((leave_one_out, oracle.leave_one_out), (group_normalised, oracle.group_normalised)):
        got = form(t(totals), t(group), t(valid)).numpy()
        for g in range(3):
            rows = (group == g) & valid
            np.testing.assert_allclose(got[rows], expected(totals[rows]), rtol=1e-9)
        assert got[4] == 0


def test_leave_one_out_by_hand():
    # 3, 1, 2: 3 - 1.5, 1 - 2.5, 2 - 2
    got = leave_one_out(t([3.0, 1.0, 2.0]), t([0, 0, 0]), t([True] * 3))
    assert got.tolist() == [1.5, -1.5, 0.0]


def test_the_moving_baseline_lags():
    """The first baseline is the first mean; later ones know only the rollouts before."""
    w, algorithm = world("reinforce", truncation="nothing", kl_coef=0.0, gamma=1.0)
    e = w.experience()
    first = float(e.scores[e.valid].mean())
    got = algorithm.advantages(e, 0.0)
    column = np.flatnonzero(w.mask[1])[-1]
    assert float(got.advantages[1, column]) == pytest.approx(float(e.scores[1]) - first)
    e.scores = e.scores + 10
    got = algorithm.advantages(e, 0.0)
    assert float(got.advantages[1, column]) == pytest.approx(float(e.scores[1]) - first)
    assert algorithm.credit.baseline == pytest.approx(0.9 * first + 0.1 * (first + 10))
    e.valid[:], e.mask[:] = False, False  # nothing was scored: nothing is learned about the average
    algorithm.advantages(e, 0.0)
    assert algorithm.credit.baseline == pytest.approx(0.9 * first + 0.1 * (first + 10))


def test_equal_scores_teach_nothing():
    """Rounding in the mean of equal numbers is not blown up by dividing through it."""
    for n in (3, 6, 8, 16):
        for seed in range(40):
            same = torch.full((n,), float(np.random.default_rng(seed).normal()))
            everyone = torch.ones(n, dtype=torch.bool)
            assert not group_normalised(same, torch.zeros(n, dtype=torch.long), everyone).any()
            assert not whiten(same[:, None].expand(n, 3), everyone[:, None].expand(n, 3)).any()


def expected_advantages(w):
    """From scores to advantages in NumPy: rewards, then the settings' form of advantage, whitened if asked for."""
    s = w.settings
    old, ref = w.picked(w.logp(w.old)), w.picked(w.logp(w.reference))
    d = old - ref
    kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "full": d}[s.kl_estimator]  # "full" stands in the loss here
    advantages, returns, totals, first = np.zeros((B, T)), np.zeros((B, T)), np.zeros(B), np.zeros(B)
    for row in range(B):
        m = w.used[row]
        if not m.any():
            continue
        rewards = -(w.kl_coef if s.kl_in == "reward" else 0.0) * kl[row, m]
        rewards[-1] += w.scores[row] - (0 if w.finished[row] else s.truncation_penalty)
        totals[row] = rewards.sum()
        if s.advantage == "gae":
            values = w.values[row, m]
            advantages[row, m] = oracle.gae(rewards, values, s.gamma, s.gae_lambda)
            returns[row, m] = advantages[row, m] + values
        else:
            returns[row, m] = oracle.returns_to_go(rewards, s.gamma)
            first[row] = returns[row, m][0]
    if s.advantage == "monte_carlo":
        advantages = np.where(w.used, returns - first[w.valid].mean(), 0.0)
    if s.advantage in ("leave_one_out", "group"):
        form = oracle.leave_one_out if s.advantage == "leave_one_out" else oracle.group_normalised
        for g in range(2):
            rows = [r for r in range(3 * g, 3 * g + 3) if w.valid[r]]
            advantages[rows] = form(totals[rows])[:, None] * w.used[rows]
    if s.whiten_advantages:
        flat = advantages[w.used]
        advantages = np.where(w.used, (advantages - flat.mean()) / (flat.std() + 1e-8), 0.0)
    if s.rollout_weights == "int8":  # truncated importance sampling: E_mu[min(pi/mu, cap) ...] for E_pi[...]
        advantages = np.where(w.used, advantages * np.minimum(np.exp(old - w.sampled), s.correction_cap), 0.0)
    return advantages, returns


def expected_loss(w, advantages, returns, surrogate, guide=None, beta=0.0):
    """-(surrogate - c1 L_VF + c2 S - KL terms), from the current tables."""
    s, used = w.settings, w.used
    logp = w.logp(w.model)
    restricted = logp
    if guide is not None:
        restricted = restrict(w, logp, guide, s.mask_top_p)
    mine, old = w.picked(restricted)[used], w.picked(w.old_restricted if guide is not None else w.logp(w.old))[used]
    objective = surrogate(mine, old, advantages[used])
    entropies = np.array([oracle.entropy(row[np.isfinite(row)]) for row in restricted[used]])
    objective += s.entropy_coef * entropies.mean()
    if w.critic is not None:
        objective -= s.value_coef * oracle.value_loss(w.value()[used], returns[used], w.values[used], s.value_clip)
    if s.kl_in == "loss":
        d = w.picked(logp)[used] - w.picked(w.logp(w.reference))[used]  # of the policy without a mask
        exact = oracle.kl(logp[used], w.logp(w.reference)[used])
        objective -= w.kl_coef * {"k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "full": exact}[s.kl_estimator].mean()
    if beta:
        objective -= beta * oracle.kl(w.logp(w.old)[used], logp[used]).mean()
    return -objective


def restrict(w, logp, guide, top_p):
    """Renormalised over the mask policy's nucleus (and the token that was chosen)."""
    theirs, out = w.logp(guide), np.full_like(logp, -np.inf)
    for row, column in zip(*np.nonzero(w.mask), strict=True):
        allowed = oracle.nucleus(theirs[row, column], top_p)
        allowed[w.tokens[row, column]] = True
        out[row, column, allowed] = oracle.log_softmax(logp[row, column, allowed])
    return out


SURROGATES = {
    "clip": lambda mine, old, a: oracle.clipped(mine, old, a, 0.2),
    "ratio": lambda mine, old, a: np.mean(np.exp(mine - old) * a),
    "gradient": lambda mine, old, a: np.mean(mine * a),
}
CASES = {
    "ppo": ("clip", {}),
    "ppo, monte carlo": ("clip", {"advantage": "monte_carlo"}),
    "ppo, leave one out, full kl in the loss": ("clip", {"advantage": "leave_one_out", "kl_in": "loss", "kl_estimator": "full"}),
    "ppo, k2 in the loss": ("clip", {"kl_in": "loss", "kl_estimator": "k2"}),
    "ppo, k3 in the reward": ("clip", {"kl_estimator": "k3"}),
    "ppo, sampled in eight bits": ("clip", {"rollout_weights": "int8", "correction_cap": 1.5}),
    "reinforce, sampled in eight bits": ("gradient", {"rollout_weights": "int8"}),
    "grpo": ("clip", {}),
    "ppo-penalty": ("ratio", {"penalty_beta": 0.9}),
    "reinforce": ("gradient", {}),
    "rloo": ("gradient", {}),
    "a2c": ("gradient", {}),
    "nlpo": ("clip", {"mask_top_p": 0.7}),
    "nlpo, k3 in the loss": ("clip", {"mask_top_p": 0.7, "kl_in": "loss", "kl_estimator": "k3"}),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_oracle(case, seed):
    name = case.split(",")[0]
    kind, changes = CASES[case]
    w, algorithm = world(name, seed, **changes)
    guide, restricted = None, None
    if name == "nlpo":
        guide = w.other
        w.old_restricted = restrict(w, w.logp(w.old), guide, w.settings.mask_top_p)
        restricted = w.picked(w.old_restricted)
    e = w.experience(None if guide is None else Within(guide, 0, w.settings.mask_top_p), restricted)
    if guide is not None:  # the KL speaks of the policy without its mask
        e.raw_logprobs = torch.where(t(w.mask), t(w.picked(w.logp(w.old))), 0.0)
        e.kl = e.raw_logprobs - e.ref_logprobs
    e = algorithm.advantages(e, w.kl_coef)
    advantages, returns = expected_advantages(w)
    np.testing.assert_allclose(e.advantages.numpy(), advantages, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(e.returns.numpy()[w.used], returns[w.used], rtol=1e-8)

    def loss():
        return expected_loss(w, advantages, returns, SURROGATES[kind], guide, changes.get("penalty_beta", 0.0))

    got, _ = algorithm.loss(w.policy, w.critic, e, e.mask.sum())
    assert float(got.detach()) == pytest.approx(loss(), rel=1e-8)
    got.backward()
    gradient = np.concatenate([np.zeros(p.numel()) if p.grad is None else p.grad.numpy().ravel() for p in w.parameters()])
    np.testing.assert_allclose(gradient, w.finite_differences(loss), rtol=1e-5, atol=1e-8)  # 1e-8: rounding of the differences
    assert np.abs(gradient).max() > 1e-3


def test_more_padding_another_order_and_smaller_batches_change_nothing():
    for name in ("ppo", "grpo", "ppo-penalty", "reinforce"):
        w, algorithm = world(name)
        e = algorithm.advantages(w.experience(), 0.1)
        whole, _ = algorithm.loss(w.policy, w.critic, e, e.mask.sum())
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        parts = [algorithm.loss(w.policy, w.critic, e.select(rows), e.mask.sum())[0] for rows in order.split(2)]
        assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-10)
        _, fresh = world(name)
        again = fresh.advantages(w.experience().select(order), 0.1)
        width = again.mask.shape[1]
        torch.testing.assert_close(again.advantages, e.advantages[order][:, :width], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce", "dqn"])
def test_the_side_of_the_padding_changes_nothing(name):
    """Rollouts are padded on the right; the formulas do not ask. The same numbers moved to the right end of the row."""
    w, algorithm = world(name)
    e = w.experience()
    ends, columns = e.rollout.lengths, torch.arange(T)
    source = (columns[None] - (T - ends)[:, None]) % T  # where each column of the left-padded row comes from

    def moved(x):
        return x.gather(1, source)

    names = ("tokens", "token_mask", "response_mask")
    left = replace(e.rollout, **{n: moved(getattr(e.rollout, n)) for n in names}, positions=moved(e.rollout.positions))
    fields = ("mask", "old_logprobs", "ref_logprobs", "raw_logprobs", "kl", "values")
    f = replace(e, rollout=left, **{n: moved(getattr(e, n)) for n in fields})
    assert not torch.equal(left.token_mask, e.rollout.token_mask)
    e, f = algorithm.advantages(e, 0.1), world(name)[1].advantages(f, 0.1)
    for n in ("rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(f, n), moved(getattr(e, n)), rtol=1e-12, atol=1e-14)
    loss = algorithm.td_loss if name == "dqn" else algorithm.loss
    right, left = (float(loss(w.policy, w.critic, x, x.mask.sum())[0].detach()) for x in (e, f))
    assert left == pytest.approx(right, rel=1e-12)


def test_an_episode_in_two_turns_is_the_same_as_in_one():
    """Tokens that an environment wrote between are stepped over, whatever stands on them."""
    rng = np.random.default_rng(0)
    rewards, values = t(rng.normal(size=(1, 5))), t(rng.normal(size=(1, 5)))
    apart = torch.tensor([[True, True, False, False, True, True, True]])
    from accord.rl.advantages import gae

    def open_up(x):
        return torch.full((1, 7), 9.0, dtype=torch.float64).masked_scatter(apart, x)

    together = torch.ones(1, 5, dtype=torch.bool)
    for form in (
        lambda r, v, m: gae(r, v, m, 0.9, 0.8).advantages,
        lambda r, v, m: returns_to_go(r, m, 0.9),
        lambda r, v, m: n_step_targets(r, v, m, 0.9, 2),
    ):
        torch.testing.assert_close(form(open_up(rewards), open_up(values), apart)[apart], form(rewards, values, together)[0])


# The pieces.


def test_exact_kl_gradient_is_autograd_s(monkeypatch):
    monkeypatch.setattr("accord.nn.logprobs.CHUNK", 3)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (8, 13, 8, 13)]
    weights, grads = torch.randn(8, generator=g, dtype=torch.float64), []
    for plain in (True, False):
        h, w, o, m = (x.clone().requires_grad_() for x in tensors)
        if plain:
            p, q = torch.log_softmax(h @ w.t() / 0.7, -1), torch.log_softmax(o @ m.t() / 0.7, -1)
            kl = (p.exp() * (p - q)).sum(-1)
        else:
            kl = exact_kl(h, w, o, m, 0.7)
        (kl * weights).sum().backward()
        grads.append([kl.detach(), *(x.grad for x in (h, w, o, m))])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_nucleus_is_the_smallest_set():
    logp = t(np.log([[0.5, 0.25, 0.15, 0.1]]))
    assert nucleus_set(logp, 0.7).tolist() == [[True, True, False, False]]
    assert nucleus_set(logp, 0.76).tolist() == [[True, True, True, False]]
    assert nucleus_set(logp, 0.3).tolist() == [[True, False, False, False]]
    assert nucleus_set(logp, 1.0).all()


def test_nucleus_among_the_likeliest_first(monkeypatch):
    """Rows whose set is larger than what is looked at first, and rows whose set is not."""
    monkeypatch.setattr("accord.nn.logprobs.LIKELIEST", 4)
    scale = torch.tensor([0.1, 1.0, 3.0, 6.0, 9.0, 12.0])[:, None]
    logp = torch.log_softmax(scale * torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), -1)
    got = nucleus_set(logp, 0.8)
    assert int(got.sum(-1).min()) < 4 < int(got.sum(-1).max())
    for row, inside in zip(logp.exp().double().numpy(), got.numpy(), strict=True):
        assert np.array_equal(inside, oracle.nucleus(np.log(row), 0.8))


def test_token_stats_in_a_nucleus(monkeypatch):
    """Values and gradient of the restricted distribution, in chunks, against plain autograd."""
    monkeypatch.setattr("accord.nn.logprobs.CHUNK", 3)
    g = torch.Generator().manual_seed(0)
    hidden, guide = (torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    matrix = torch.randn(13, 5, generator=g, dtype=torch.float64)
    tokens, grads = torch.randint(0, 13, (8,), generator=g), []
    allowed = nucleus_set(torch.log_softmax(guide @ matrix.t() / 0.7, -1), 0.6).scatter(-1, tokens[:, None], True)
    assert 0.1 < allowed.double().mean() < 0.9
    for plain in (True, False):
        h = hidden.clone().requires_grad_()
        if plain:
            logp = torch.log_softmax((h @ matrix.t() / 0.7).masked_fill(~allowed, -torch.inf), -1)
            picked = logp.gather(-1, tokens[:, None])[:, 0]
            entropy = -(logp.exp() * logp.masked_fill(~allowed, 0.0)).sum(-1)
        else:
            picked, entropy = token_stats(h, matrix, tokens, 0.7, Nucleus(guide, matrix, 0.6))
        (picked.sum() + 2 * entropy.sum()).backward()
        grads.append((picked.detach(), entropy.detach(), h.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_penalty_s_rule_by_hand():
    assert adapted(1.0, 0.005, 0.01) == 0.5  # below 0.01 / 1.5
    assert adapted(1.0, 0.016, 0.01) == 2.0  # above 0.015
    assert adapted(1.0, 0.01, 0.01) == 1.0


# TRPO.


def plain_logits(w, vector):
    """Logits / temperature of all used tokens as a function of one parameter vector, in plain torch."""
    shapes = [p.shape for p in w.model.parameters()]
    pieces = vector.split([s.numel() for s in shapes])
    by_token, by_column, matrix = (x.view(s) for x, s in zip(pieces, shapes, strict=True))
    hidden = by_token[t(w.tokens)] + by_column[torch.arange(T)]
    logits = hidden @ matrix.t() / w.settings.temperature
    return torch.log_softmax(logits[:, :-1][t(w.used)[:, 1:]], -1)


def test_fisher_vector_product_equals_the_explicit_matrix():
    """F from its definition, sum over tokens a of p(a) grad log p(a) grad log p(a)^T, and as the Hessian of the KL."""
    w, _ = world("trpo")
    e = w.experience()
    theta = torch.cat([p.detach().reshape(-1) for p in w.model.parameters()])
    logp = plain_logits(w, theta)
    jacobian = torch.autograd.functional.jacobian(lambda v: plain_logits(w, v), theta)
    fisher = torch.einsum("nv,nvi,nvj->ij", logp.exp(), jacobian, jacobian) / len(logp)
    hessian = torch.autograd.functional.hessian(lambda v: (logp.exp() * (logp - plain_logits(w, v))).sum(-1).mean(), theta)
    torch.testing.assert_close(fisher, hessian, rtol=1e-8, atol=1e-10)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        v = torch.randn(len(theta), generator=g, dtype=torch.float64)
        got = fisher_vector_product(w.policy, e, v, w.settings.temperature, 30)
        torch.testing.assert_close(got, fisher @ v, rtol=1e-8, atol=1e-10)
    w.model.matrix.requires_grad_(False)  # a frozen output matrix, as in split and LoRA
    w.policy.trainable = lambda: {n: p for n, p in w.model.named_parameters() if p.requires_grad}
    n = w.model.by_token.numel() + w.model.by_column.numel()
    v = torch.randn(n, generator=g, dtype=torch.float64)
    got = fisher_vector_product(w.policy, e, v, w.settings.temperature, 30)
    torch.testing.assert_close(got, fisher[:n, :n] @ v, rtol=1e-8, atol=1e-10)


def test_fisher_products_of_rows_for_the_fused_attention(tiny, monkeypatch):
    """Rows longer than attention is written out for: its gradient has to have one too, and the product is the same."""
    s = RLSettings(algorithm="trpo", top_layers=2, prompts_per_step=2, completions_per_prompt=1, dtype="float32")
    state = State.begin(tiny, Reward([]), s)
    rollout = rollout_of(tiny.model, 2, 90, 20)
    e = score_rollout(state.policy, state.critic, Reward([]), rollout, s)
    v = torch.randn(sum(p.numel() for p in state.policy.trainable().values()), generator=torch.Generator().manual_seed(0))
    products = []
    for limit in (96, 1000):
        monkeypatch.setitem(WRITTEN_OUT, torch.float32, limit)
        products.append(fisher_vector_product(state.policy, e, v, 1.0, 4096))
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-6)
    assert products[0].abs().max() > 1e-4


def test_conjugate_gradient_solves():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=g, dtype=torch.float64)
    a, b = a @ a.t() + torch.eye(6), torch.randn(6, generator=g, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradient(lambda v: a @ v, b, 6, 0.0), torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("delta", [1e-3, 0.01, 0.2])
def test_trpo_step_keeps_its_limit_and_improves(delta):
    w, algorithm = world("trpo", trust_region=delta, cg_damping=1e-6, cg_iterations=60)
    assert isinstance(algorithm, TRPO)
    w.old.load_state_dict(w.model.state_dict())  # the policy that sampled is the policy
    e = algorithm.advantages(w.experience(), 0.1)
    before, gradient = algorithm.objective(w.policy, e, 60, gradient=True)
    np.testing.assert_allclose(
        gradient.numpy(),
        -np.concatenate([p.ravel() for p in np.split(w.finite_differences(lambda: -surrogate_value(w, e)), [0])])[: len(gradient)],
        rtol=1e-5, atol=1e-8,
    )  # fmt: skip
    stats = algorithm.policy_step(w.policy, e, TokenBudget(60))
    kl = oracle.kl(w.logp(w.old)[w.used], w.logp(w.model)[w.used]).mean()
    assert stats["accepted"] == 1 and 0 < kl <= delta
    assert stats["kl_old_new"] == pytest.approx(kl, rel=1e-5)
    assert surrogate_value(w, e) > before
    if delta <= 0.01:  # where the quadratic model holds, the step uses the limit
        assert kl > 0.5 * delta * 0.5 ** (2 * stats["line_search"])


def surrogate_value(w, e):
    logp = w.logp(w.model)
    ratio = np.exp(w.picked(logp)[w.used] - e.old_logprobs.numpy()[w.used])
    return np.mean(ratio * e.advantages.numpy()[w.used]) + w.settings.entropy_coef * oracle.entropy(logp[w.used]).mean()


# DQN.


def test_dqn_targets_loss_and_gradient_equal_the_oracle():
    w, algorithm = world("dqn", n_step=2)
    target, critic = Table(9), type(w.critic)(9)
    algorithm.target = (target, critic)
    e = algorithm.advantages(w.experience(), w.kl_coef)
    e = algorithm.with_targets(w.policy, e)
    s = w.settings

    def logits(model):
        p = {n: x.detach().numpy() for n, x in model.named_parameters()}
        z = (p["by_token"][w.tokens] + p["by_column"][np.arange(T)]) @ p["matrix"].T / s.temperature
        return np.concatenate((np.zeros((B, 1, V)), z[:, :-1]), axis=1)

    online, theirs = logits(w.model), logits(target)
    mine_critic, w.critic = w.critic, critic
    value = w.value()
    w.critic = mine_critic
    double = value + s.q_scale * (np.take_along_axis(theirs, online.argmax(-1)[..., None], -1)[..., 0] - theirs.max(-1))
    returns = np.zeros((B, T))
    for row in range(B):
        m = w.used[row]
        if m.any():
            returns[row, m] = oracle.n_step(e.rewards.numpy()[row, m], double[row, m], s.gamma, 2)
    np.testing.assert_allclose(e.returns.numpy()[w.used], returns[w.used], rtol=1e-6)

    def loss():
        z = logits(w.model)
        q = w.value() + s.q_scale * (w.picked(z) - z.max(-1))
        return 0.5 * np.mean((q - e.returns.numpy())[w.used] ** 2)

    got, _ = algorithm.td_loss(w.policy, w.critic, e, e.mask.sum())
    assert float(got.detach()) == pytest.approx(loss(), rel=1e-6)
    got.backward()
    gradient = np.concatenate([p.grad.numpy().ravel() for p in w.parameters()])
    np.testing.assert_allclose(gradient, w.finite_differences(loss), rtol=1e-5, atol=1e-8)


class Words:
    """A token MDP: two characters or fewer, a random reward for every text. States are the texts so far."""

    name, alphabet, turn_tokens, max_turns = "words", "abc", 2, 1

    def __init__(self):
        texts = ["".join(x) for n in range(3) for x in itertools.product("abc", repeat=n)]
        self.reward = dict(zip(texts, np.random.default_rng(0).normal(size=len(texts)).tolist(), strict=True))

    def prompts(self):
        return [Prompt("p", "ab")]

    def start(self, prompt, seed):
        return self

    def answer(self, text, finished):
        return Answer(self.reward[text])

    def best(self, text):
        """Q*(s, .) by dynamic programming from the end. The end token stops."""
        q = {a: self.answer((text + a), True)[0] if len(text) == 1 else max(self.best(text + a).values()) for a in "abc"}
        return {**q, "": self.answer(text, True)[0]}


def test_dqn_finds_the_exact_values_of_a_small_mdp(tmp_path, monkeypatch):
    """Every Q(s, a) within 0.25 of Q*, which spans -2.3 to 1.3.

    The prompt has two different tokens: attention over equal tokens alone cannot tell one from two of them.
    """
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    world = Words()
    start = load_start("scratch", "float32", world)
    settings = RLSettings(
        algorithm="dqn", q_scale=1.0, n_step=1, kl_coef=0.0, truncation="nothing", adaptation="full", top_layers=3, dtype="float32",
        prompts_per_step=1, completions_per_prompt=64, epochs=2, replay_steps=20, target_every=5, max_steps=120, checkpoint_every=1000,
        learning_rate=1e-3, critic_learning_rate=1e-3, kl_warn=1e9, max_new_tokens=3,
    )  # fmt: skip
    run, reward = Run.create(tmp_path / "r", {"command": "rl"}), build_reward(None, start, environment="words")
    train(start, world.prompts(), reward, settings, run, environment=world)
    state = State.begin(start, reward, settings)
    state.restore(run.saved.newest())
    worst, vocabulary = 0.0, start.tokenizer.inner.get_vocab()
    for text in ["", *"abc"]:
        rows = start.tokenizer.inner("ab" + text, return_tensors="pt")["input_ids"]
        logits = state.policy.model(rows)[0, -1]
        rollout = from_completions([(rows[0].tolist(), [0])], [Completion(Prompt("p", "ab"), "", True)], 0)
        mine = float(values_before(state.critic, rollout)[0][0, -1].detach())
        for a, expected in world.best(text).items():
            got = mine + settings.q_scale * float((logits[vocabulary[a or "<|end|>"]] - logits.max()).detach())
            worst = max(worst, abs(got - expected))
    assert worst < 0.25


# ILQL.


def test_ilql_targets_loss_and_gradient_equal_the_oracle():
    w, algorithm = world("ilql", n_step=1, expectile=0.8, cql_coef=0.3)
    target, critic, s = Table(9).near(w.model, 0.5), type(w.critic)(9), w.settings
    algorithm.target = (target, critic)
    e = algorithm.advantages(w.experience(), w.kl_coef)

    def logits(model):
        p = {n: x.detach().numpy() for n, x in model.named_parameters()}
        z = (p["by_token"][w.tokens] + p["by_column"][np.arange(T)]) @ p["matrix"].T / s.temperature
        return np.concatenate((np.zeros((B, 1, V)), z[:, :-1]), axis=1)

    z_ref, current = logits(w.reference), w.value()
    mine_critic, w.critic = w.critic, critic
    q_target = w.value() + s.q_scale * (w.picked(logits(target)) - w.picked(z_ref))
    w.critic = mine_critic
    y = np.zeros((B, T))
    for row in range(B):
        m = w.used[row]
        if m.any():
            y[row, m] = oracle.n_step(e.rewards.numpy()[row, m], current[row, m], s.gamma, 1)
    theirs = algorithm.reference(w.policy, e)
    e = algorithm.with_targets(w.policy, w.critic, e, theirs)
    np.testing.assert_allclose(e.returns.numpy()[w.used], y[w.used], rtol=1e-6)
    np.testing.assert_allclose(e.values.numpy()[w.used], q_target[w.used], rtol=1e-6)

    def loss():
        a = s.q_scale * (logits(w.model) - z_ref)  # Q(s, .) - V(s)
        q = current + w.picked(a)  # V is not taught by Q's error
        return oracle.ilql(q[w.used], y[w.used], q_target[w.used], w.value()[w.used], a[w.used], w.tokens[w.used], 0.8, 0.3)

    got, _ = algorithm.q_loss(w.policy, w.critic, e, e.mask.sum(), theirs)
    assert float(got.detach()) == pytest.approx(loss(), rel=1e-6)
    got.backward()
    gradient = np.concatenate([p.grad.numpy().ravel() for p in w.parameters()])
    np.testing.assert_allclose(gradient, w.finite_differences(loss), rtol=1e-5, atol=1e-8)


def test_an_expectile_by_hand():
    """Of 0 and 1, the tau-expectile v has tau (1 - v) = (1 - tau) v, so it is tau."""
    values, everyone = t([0.0, 1.0]), torch.ones(2, dtype=torch.bool)
    for tau in (0.5, 0.7, 0.9):
        v = torch.tensor(tau, requires_grad=True)
        expectile_loss(values - v, tau, everyone).backward()
        assert abs(float(v.grad)) < 1e-6


def expectile(values, tau):
    """The root of sum |tau - 1(x < v)| (x - v), by bisection."""
    low, high, x = min(values), max(values), np.array(values)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.where(x < middle, 1 - tau, tau) * (x - middle)).sum() > 0 else (low, middle)
    return low


def test_ilql_finds_the_exact_values_of_a_small_mdp(tmp_path, monkeypatch):
    """Q and V of every state, against the expectile's fixed point by dynamic programming and, as tau goes to 1, against V*."""
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    world, tau = Words(), 0.95
    start = load_start("scratch", "float32", world)
    vocabulary = start.tokenizer.inner.get_vocab()
    ids = [vocabulary[a or "<|end|>"] for a in ("", *"abc")]
    prompt, logged = world.prompts()[0], []
    for first in ids:  # every episode once
        for second in [None] if first == ids[0] else ids:
            tokens = (first,) if second is None else (first, second)
            reward = world.answer(start.tokenizer.decode(tokens), True)[0]
            logged.append(Logged(Completion(prompt, start.tokenizer.decode(tokens), True), reward, (Turn(tokens, reward),)))
    settings = RLSettings(
        algorithm="ilql", q_scale=1.0, expectile=tau, cql_coef=0.0, truncation="nothing", adaptation="full", top_layers=3, dtype="float32",
        prompts_per_step=len(logged), minibatches=1, epochs=8, target_every=2, max_steps=200, checkpoint_every=1000, learning_rate=5e-4, n_step=1,
        critic_learning_rate=5e-4, kl_warn=1e9, max_grad_norm=10.0,
    )  # fmt: skip
    run = Run.create(tmp_path / "r", {"command": "rl"})
    train(start, [], Reward([]), settings, run, logged=logged)
    state = State.begin(start, Reward([]), settings, Log(logged, start, settings).digest)
    state.restore(run.saved.newest())
    counts = {a: 1 if a == "" else len(ids) for a in ("", *"abc")}  # how often each first token is logged
    errors, best = [], []
    for text in ["", *"abc"]:
        rows = start.tokenizer.inner("ab" + text, return_tensors="pt")["input_ids"]
        advantage = (state.policy.model(rows)[0, -1] - start.model(rows)[0, -1]).detach()
        rollout = from_completions([(rows[0].tolist(), [0])], [Completion(Prompt("p", "ab"), "", True)], 0)
        value = float(values_before(state.critic, rollout)[0][0, -1].detach())
        q = {a: world.answer((text + a), True)[0] for a in ("", *"abc")}
        if text == "":  # the values of the second states, by their own fixed point
            after = {a: expectile([world.answer((a + b), True)[0] for b in ("", *"abc")], tau) for a in "abc"}
            q = {"": q[""], **after}
        spread = [x for a, x in q.items() for _ in range(counts[a] if text == "" else 1)]
        errors.append(value - expectile(spread, tau))
        best.append(value - max(world.best(text).values()))
        errors += [value + float(advantage[vocabulary[a or "<|end|>"]]) - x for a, x in q.items()]
    assert np.abs(errors).max() < 0.2  # of values from -2.3 to 1.3
    assert np.abs(best).max() < 0.5  # the 0.95-expectile of five values is that far below the largest


def test_a_contrast_of_two_policies(monkeypatch):
    """Values and gradients of base z_ref + strength (z - z_ref), in chunks, against plain autograd."""
    monkeypatch.setattr("accord.nn.logprobs.CHUNK", 3)
    g = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    matrix, theirs = (torch.randn(13, 5, generator=g, dtype=torch.float64) for _ in range(2))
    tokens, grads = torch.randint(0, 13, (8,), generator=g), []
    for plain in (True, False):
        h, m = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        if plain:
            z, z_ref = h @ m.t() / 0.7, other @ theirs.t() / 0.7
            logp = torch.log_softmax(0.4 * z_ref + 2.5 * (z - z_ref), -1)
            picked, entropy = logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
        else:
            picked, entropy = token_stats(h, m, tokens, 0.7, Contrast(other, theirs, 2.5, 0.4))
        (picked.sum() + 2 * entropy.sum()).backward()
        grads.append((picked.detach(), entropy.detach(), h.grad, m.grad))
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_epsilon_greedy_by_hand():
    logits = t([[1.0, 3.0, 2.0, 0.0]])
    np.testing.assert_allclose(EpsilonGreedy(0.2).apply(logits, 1.0, None).exp(), [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)


def test_what_epsilon_greedy_samples_it_scores(tiny, prompts):
    rollout = Engine(tiny, rows=3).sample(prompts[:4], 8, Sampling(1.0, max_new_tokens=8), guide=Explore(0.5))
    again = score(tiny.model, rollout, 0, 1.0, 64, Explore(0.5))
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.engine_logprobs[mask], again.logprobs[mask], rtol=0, atol=2e-5)
    greedy = (again.logprobs[mask] > np.log(0.5)).double()
    assert abs(float(greedy.mean()) - 0.5) < 4 * 0.5 / len(greedy) ** 0.5


def test_decoding_between_a_reference_and_beyond_the_policy(tiny, prompts):
    """Strength 0 writes what the reference writes, 1 what the policy writes; the distribution at 2 is by its formula."""
    import accord

    policy = tiny.adapt("full", 2, 4, 8.0, 0)
    for p in policy.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    given = dict(per_prompt=2, max_new_tokens=6)
    texts = {k: [c.text for c in accord.sample(policy, prompts[:4], reference=tiny, strength=k, **given)] for k in (0.0, 1.0, 2.0)}
    assert texts[0.0] == [c.text for c in accord.sample(tiny, prompts[:4], **given)]
    assert texts[1.0] == [c.text for c in accord.sample(policy, prompts[:4], **given)] and texts[1.0] != texts[0.0]
    rollout = Engine(policy).sample(prompts[:4], 2, Sampling(1.0, max_new_tokens=6), guide=Perturb(tiny.model, 0, 2.0))
    z, z_ref = (m(rollout.tokens) for m in (policy.model, tiny.model))
    logp = torch.log_softmax(z_ref + 2 * (z - z_ref), -1)[:, :-1].gather(-1, rollout.tokens[:, 1:, None])[..., 0]
    mask = rollout.response_mask[:, 1:]
    torch.testing.assert_close(logp[mask], rollout.engine_logprobs[:, 1:][mask], rtol=0, atol=5e-5)
    with pytest.raises(UserError, match="give the reference too"):
        accord.sample(policy, prompts[:4], strength=2.0)


def test_a_run_s_episodes_are_logged_so_that_they_can_be_learned_from(tiny, tmp_path):
    """Tokens, mask and rewards of episodes with several turns come back from completions.jsonl as they were."""
    from test_environments import Echo

    from accord.rl.trainer import rows_of

    rollout = play(Engine(tiny, 4), Echo(), [Prompt(f"p{i}", "ab" * i) for i in range(1, 6)], 2, Sampling(0.9, seed=3))
    settings = RLSettings(**{**SMALL, "algorithm": "ilql", "prompts_per_step": 10, "completions_per_prompt": 1, "minibatches": 2})
    state = State.begin(tiny, Reward([]), settings)
    e = score_rollout(state.policy, state.critic, build_reward(letters, tiny, environment="echo"), rollout, settings)
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(e, 0)))
    log = Log(read_logged(path), tiny, settings)
    again = log.rollout(0)
    place = {text: row for row, text in enumerate(again.texts)}
    assert len(place) == 10
    for row, text in enumerate(rollout.texts):
        there, n = place[text], int(rollout.lengths[row])
        assert again.lengths[there] == n and torch.equal(again.tokens[there, :n], rollout.tokens[row, :n])
        assert torch.equal(again.response_mask[there, :n], rollout.response_mask[row, :n])
        expected = rollout.step_rewards[row, :n].clone()
        expected[n - 1] += letters([], [text])[0]  # what the other reward gave, at the end
        torch.testing.assert_close(again.step_rewards[there, :n], expected)
    with pytest.raises(UserError, match="in another model's tokens"):
        Log([Logged(Completion(Prompt("p", "a"), "", True), 1.0, (Turn((10**6,), 1.0),))] * 10, tiny, settings)


# What does not go together is refused, with the reason.


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"algorithm": "pop"}, "there is no 'pop'.*Did you mean 'ppo'"),
        ({"algorithm": "PPO"}, "there is no 'PPO'.*Did you mean 'ppo'"),
        ({"algorithm": "reinforce", "epochs": 2}, "no ratio between new and old policy"),
        ({"algorithm": "reinforce", "advantage": "gae"}, "is a2c"),
        ({"algorithm": "rloo", "advantage": "gae"}, "takes its advantages from leave_one_out"),
        ({"algorithm": "grpo", "completions_per_prompt": 1}, "completions_per_prompt must be 2 or more"),
        ({"algorithm": "ppo", "kl_in": "loss"}, "k1 in the loss does nothing"),
        ({"algorithm": "trpo", "kl_in": "loss", "kl_estimator": "k3"}, "no place for the KL in its loss"),
        ({"algorithm": "rloo", "truncation": "bootstrap"}, "needs a critic"),
        ({"algorithm": "dqn", "truncation": "bootstrap"}, "needs a critic"),
        ({"algorithm": "trpo", "epochs": 5}, "epochs means nothing to algorithm trpo"),
        ({"rollout_weights": "int8", "kl_estimator": "k1"}, "those of rounded weights are not, so use full"),
        ({"correction_cap": 3.0}, "correction_cap means nothing to rollout_weights same"),
        ({"algorithm": "dqn", "rollout_weights": "int8", "correction_cap": 3.0}, "correction_cap means nothing to algorithm dqn"),
        ({"algorithm": "ilql", "rollout_weights": "int8"}, "rollout_weights means nothing to algorithm ilql"),
        ({"algorithm": "dqn", "entropy_coef": 0.1}, "entropy_coef means nothing to algorithm dqn"),
        ({"algorithm": "grpo", "gamma": 0.9}, "gamma must be 1"),
        ({"algorithm": "ilql", "kl_coef": 0.1}, "kl_coef means nothing to algorithm ilql"),
        ({"algorithm": "ilql", "kl_estimator": "k1"}, "logged ones are not, so use full"),
        ({"algorithm": "dqn", "exploration": "epsilon", "kl_estimator": "k1"}, "epsilon-greedy ones are not, so use full"),
        ({"exploration": "epsilon"}, "exploration means nothing to algorithm ppo .it is for dqn"),
        ({"algorithm": "dqn", "epsilon": 0.3}, "set exploration to epsilon"),
        ({"expectile": 0.9}, "expectile means nothing to algorithm ppo .it is for ilql"),
        ({"algorithm": ["ppo"]}, "algorithm: Input should be a valid string"),
    ],
)
def test_combinations_that_make_no_sense(given, reason):
    from accord.config import build

    with pytest.raises(UserError, match=reason):
        build(RLSettings, given, "rl")


def test_each_algorithm_has_its_own_defaults():
    assert RLSettings(algorithm="grpo").kl_estimator == "k3" and RLSettings(algorithm="grpo").advantage == "group"
    assert RLSettings(algorithm="a2c").epochs == 1 and RLSettings().epochs == 2
    assert RLSettings(algorithm="rloo", completions_per_prompt=8).completions_per_prompt == 8
    again = RLSettings(**RLSettings(algorithm="grpo").model_dump())
    assert again == RLSettings(algorithm="grpo")


def test_trpo_counts_a_gradient_that_is_not_a_number():
    w, algorithm = world("trpo")
    e = algorithm.advantages(w.experience(), 0.1)
    e.advantages[1, :] = float("nan")
    before = [p.clone() for p in w.model.parameters()]
    optimizer = PolicyOptimizer(
        {"policy": (w.policy.trainable(), 1e-3), "critic": (w.critic.trainable(), 1e-3)}, RLSettings(max_nonfinite=2)
    )
    assert algorithm.update(w.policy, w.critic, optimizer, e, 0) == {"accepted": 0.0} and optimizer.skipped == 1
    with pytest.raises(UserError, match="not finite"):
        algorithm.update(w.policy, w.critic, optimizer, e, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["trpo", "nlpo"])
def test_what_needs_our_own_transformer_says_so_before_a_folder_is_made(tmp_path, prompts, name):
    import accord

    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=f"{name} needs a model that accord computes itself"):
        accord.train_rl(accord.load(str(tmp_path / "gpt2")), prompts, letters, algorithm=name, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# The real loop.

SMALL = dict(
    prompts_per_step=4, completions_per_prompt=2, max_new_tokens=8, top_layers=2, temperature=0.9, micro_batch_tokens=64,
    learning_rate=1e-3, critic_learning_rate=1e-3, max_steps=4, validate_every=2, checkpoint_every=2, dtype="float32",
    truncation="nothing",
)  # fmt: skip


def letters(prompts, completions):
    return [sum(c.isalpha() for c in text) / 4 for text in completions]


def test_what_a_guide_samples_it_scores(tiny, prompts):
    """Sampling within another policy's nucleus: the engine's log-probabilities are the scorer's, and less is possible."""
    other = tiny.adapt("full", 2, 4, 8.0, 0)
    for p in other.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    guide = Within(other.snapshot(), 0, 0.5)
    rollout = Engine(tiny, rows=3).sample(prompts[:4], 2, Sampling(0.9, max_new_tokens=8), guide=guide)
    again = score(tiny.model, rollout, 0, 0.9, 64, guide)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.engine_logprobs[mask], again.logprobs[mask], rtol=0, atol=2e-5)
    free = score(tiny.model, rollout, 0, 0.9, 64)
    assert (again.logprobs[mask] > free.logprobs[mask]).all() and (again.entropy[mask] < free.entropy[mask]).all()


def test_nlpo_s_kl_without_its_mask(tiny, prompts):
    """The KL to the reference is of the policy without its mask: 0 at the start, though the ratio's log-probabilities are not."""
    settings = RLSettings(**{**SMALL, "algorithm": "nlpo", "mask_top_p": 0.5})
    state = State.begin(tiny, build_reward(letters, tiny), settings)
    frozen = [a is b for a, b in zip(state.algorithm.guide().model.model.layers, tiny.model.model.layers, strict=True)]
    assert frozen == [True, True, False, False]  # what does not train is shared, whole
    guide = state.algorithm.guide()
    rollout = Engine(state.policy).sample(prompts[:4], 2, settings.sampling(0), keep_trunk=True, guide=guide)
    e = score_rollout(state.policy, state.critic, build_reward(letters, tiny), rollout, settings, guide)
    assert float(e.kl.abs().max()) < 1e-4 and float((e.old_logprobs - e.ref_logprobs)[e.mask].min()) > 0.05


@pytest.mark.parametrize("case", ["ppo", "grpo", "ppo-penalty", "reinforce", "nlpo"])
def test_explained_terms_add_up(tiny, prompts, tmp_path, case):
    """Tokens to completions, completions to the step, the step to the loss; and the columns are what they say."""
    settings = RLSettings(**{**SMALL, "algorithm": case, "entropy_coef": 0.05, "kl_coef": 0.1, "epochs": 1, "minibatches": 1})
    run = Run.create(tmp_path / "r", {"command": "rl"})
    train(tiny, prompts, build_reward(letters, tiny), settings, run)
    rows = [explain(tiny, prompts, build_reward(letters, tiny), settings, run.saved.newest(), row=row) for row in range(8)]
    assert len(run.read("metrics.jsonl")) == 5  # nothing was cut from the logs
    for name, whole in rows[0].step_terms.items():
        assert sum(sum(x.terms[name]) for x in rows) == pytest.approx(whole, rel=1e-3, abs=1e-6), name
    assert -sum(rows[0].step_terms.values()) == pytest.approx(rows[0].loss, rel=1e-6)
    x = rows[3]
    c = {name: np.array(values) for name, values in x.columns.items()}
    np.testing.assert_allclose(c["ratio"], np.exp(c["log pi"] - c["log pi_old"]), rtol=1e-5)
    expected = {
        "ppo": np.minimum(c["ratio"] * c["advantage"], np.clip(c["ratio"], 0.8, 1.2) * c["advantage"]),
        "ppo-penalty": c["ratio"] * c["advantage"],
        "reinforce": c["log pi"] * c["advantage"],
    }
    expected["grpo"] = expected["nlpo"] = expected["ppo"]
    np.testing.assert_allclose(np.array(x.terms["surrogate"]) * x.count, expected[case], rtol=1e-3, atol=1e-5)
    if case != "grpo" and case != "nlpo":
        np.testing.assert_allclose(c["KL part"], -x.kl_coef * (c["log pi_old"] - c["log pi_ref"]), rtol=1e-3, atol=1e-6)
    assert c["score part"][-1] == pytest.approx(x.score, rel=1e-4) and not np.abs(c["score part"][:-1]).max() > 1e-5
    assert np.abs(c["ratio"] - 1).max() > 1e-4  # the policy has moved


def run_of(policy, prompts, folder, settings, reward=letters):
    run = Run.create(folder, {"command": "rl"})
    return train(policy, prompts, build_reward(reward, policy), settings, run, logged=log_of(policy, prompts, settings))


def log_of(policy, prompts, settings):
    """Completions with scores for an algorithm that learns from such; for others none."""
    if not ALGORITHMS[settings.algorithm].offline:
        return []
    written = Engine(policy).sample(prompts, 256, settings.sampling(0)).completions()
    return [Logged(c, letters([], [c.text])[0]) for c in written]


STATE = {"nlpo": dict(mask_every=2), "dqn": dict(target_every=2, replay_steps=2), "ilql": dict(target_every=2)}
RATES = {
    "dqn": dict(learning_rate=1e-2, critic_learning_rate=1e-2, epochs=4, kl_coef=0.0, max_steps=40),
    "ilql": dict(
        learning_rate=3e-3,
        critic_learning_rate=3e-3,
        epochs=2,
        minibatches=2,
        kl_coef=0.0,
        max_steps=20,
        prompts_per_step=512,
        completions_per_prompt=1,
        expectile=0.8,
        q_scale=0.02,
        micro_batch_tokens=4096,
    ),
    "trpo": dict(trust_region=0.1, cg_iterations=5, kl_coef=0.0),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_a_preference_it_can_see(tiny, prompts, tmp_path, name):
    changes = dict(max_steps=25, prompts_per_step=8, completions_per_prompt=4, learning_rate=3e-3, kl_coef=0.001)
    settings = RLSettings(**{**SMALL, **changes, "algorithm": name, **RATES.get(name, {})})
    outcome = run_of(tiny, prompts, tmp_path / "r", settings)
    sampling = settings.sampling(-1)
    scores = [np.array(letters([], Engine(p).sample(prompts, 128, sampling).texts)) for p in (tiny, outcome.policy)]
    difference = scores[1] - scores[0]
    assert difference.mean() > 4 * difference.std() / len(difference) ** 0.5


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resume_is_exact(tiny_folder, prompts, tmp_path, name):
    """Five steps, or three and two in another process's memory: the same numbers, whatever state the algorithm keeps."""
    settings, results = RLSettings(**{**SMALL, "algorithm": name, **STATE.get(name, {})}), []
    for stops in ([5], [3, 5]):
        folder = tmp_path / f"r{len(stops)}"
        Run.create(folder, {"command": "rl"}).close()
        for limit in stops:
            start = Policy.load(str(tiny_folder), "float32")
            run, _ = Run.open(folder)
            outcome = train(
                start,
                prompts,
                build_reward(letters, start),
                settings.model_copy(update={"max_steps": limit}),
                run,
                logged=log_of(start, prompts, settings),
            )
            run.close()
        results.append((outcome.policy.trainable(), (folder / "metrics.jsonl").read_bytes(), (folder / "completions.jsonl").read_bytes()))
    (a, metrics_a, text_a), (b, metrics_b, text_b) = results
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert text_a == text_b and metrics_a == metrics_b
