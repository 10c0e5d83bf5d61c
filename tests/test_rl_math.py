"""The RL maths against float64 oracles, hand arithmetic and invariances, on ragged batches."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.nn.logprobs import exact_kl, token_stats
from accord.rl.advantages import gae
from accord.rl.kl import AdaptiveKL, FixedKL, kl_estimate
from accord.rl.masked import masked_mean, whiten
from accord.rl.objective import clipped_surrogate, entropy_bonus, explained_variance, value_loss
from accord.rl.rewards import token_rewards

B, T = 6, 11


def ragged(seed):
    """A batch with prompts of different lengths, one row in two turns, and garbage under the mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((B, T), dtype=bool)
    for row in range(B):
        start = rng.integers(1, 5)
        mask[row, start : rng.integers(start + 1, T + 1)] = True
    mask[0] = False
    mask[0, [2, 3, 6, 7, 8]] = True  # two turns: an environment wrote columns 4 and 5
    tensors = {name: rng.normal(size=(B, T)) for name in ("logp", "old", "ref", "adv", "values", "returns", "rewards", "entropy")}
    return mask, tensors


def t(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_double_sum(seed, gamma, lam):
    mask, x = ragged(seed)
    got = gae(t(x["rewards"]), t(x["values"]), torch.tensor(mask), gamma, lam)
    for row in range(B):
        m = mask[row]
        expected = oracle.gae(x["rewards"][row, m], x["values"][row, m], gamma, lam)
        np.testing.assert_allclose(got.advantages[row].numpy()[m], expected, rtol=1e-10)
        np.testing.assert_allclose(got.returns[row].numpy()[m], expected + x["values"][row, m], rtol=1e-10)
        assert not got.advantages[row].numpy()[~m].any() and not got.returns[row].numpy()[~m].any()


def test_gae_by_hand():
    # rewards 0, 1; values 0.5, 0.2; gamma 0.5, lambda 0.5.
    # delta_1 = 1 + 0 - 0.2 = 0.8; delta_0 = 0 + 0.5 * 0.2 - 0.5 = -0.4; A_1 = 0.8; A_0 = -0.4 + 0.25 * 0.8 = -0.2
    got = gae(t([[0.0, 1.0]]), t([[0.5, 0.2]]), torch.ones(1, 2, dtype=torch.bool), 0.5, 0.5)
    assert got.advantages.tolist()[0] == pytest.approx([-0.2, 0.8])
    assert got.returns.tolist()[0] == pytest.approx([0.3, 1.0])


@pytest.mark.parametrize("seed", range(5))
def test_clipped_surrogate_and_gradient(seed):
    mask, x = ragged(seed)
    m = torch.tensor(mask)
    logp = t(x["logp"]).requires_grad_()
    got = clipped_surrogate(logp, t(x["old"]), t(x["adv"]), m, 0.2)
    expected = oracle.clipped(x["logp"][mask], x["old"][mask], x["adv"][mask], 0.2)
    assert float(got.objective) == pytest.approx(expected, rel=1e-10)
    got.objective.backward()
    for row, column in [(1, int(np.flatnonzero(mask[1])[0])), (0, 6)]:
        step = 1e-6
        up, down = x["logp"].copy(), x["logp"].copy()
        up[row, column] += step
        down[row, column] -= step
        slope = (
            oracle.clipped(up[mask], x["old"][mask], x["adv"][mask], 0.2) - oracle.clipped(down[mask], x["old"][mask], x["adv"][mask], 0.2)
        ) / (2 * step)
        assert float(logp.grad[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-9)
    assert not logp.grad[~m].any()


def test_clip_fraction_by_hand():
    # ratios 2, 2, 0.5, 0.5 with advantages +, -, +, -: the clip cuts the first (too far up, still rewarded) and the last.
    logp, old = torch.log(t([[2.0, 2.0, 0.5, 0.5]])), torch.zeros(1, 4, dtype=torch.float64)
    adv = t([[1.0, -1.0, 1.0, -1.0]])
    got = clipped_surrogate(logp, old, adv, torch.ones(1, 4, dtype=torch.bool), 0.2)
    assert float(got.clip_fraction) == 0.5
    assert float(got.objective) == pytest.approx((1.2 - 2.0 + 0.5 - 0.8) / 4)
    assert float(got.ratio_error) == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip):
    mask, x = ragged(3)
    values = t(x["values"]).requires_grad_()
    got = value_loss(values, t(x["returns"]), torch.tensor(mask), t(x["old"]), clip)
    assert float(got.loss) == pytest.approx(oracle.value_loss(x["values"][mask], x["returns"][mask], x["old"][mask], clip), rel=1e-10)
    got.loss.backward()
    if clip is None:
        np.testing.assert_allclose(values.grad.numpy()[mask], (x["values"] - x["returns"])[mask] / mask.sum(), rtol=1e-10)
    assert not values.grad.numpy()[~mask].any()


@pytest.mark.parametrize("part", ["surrogate", "value", "entropy"])
def test_accumulated_gradient_equals_the_whole(part):
    """Batch 6 and 2 + 4 give the same gradient when both are told the step's token count."""
    mask, x = ragged(1)
    m = torch.tensor(mask)

    def loss(z, rows, count):
        if part == "surrogate":
            return clipped_surrogate(z[rows], t(x["old"])[rows], t(x["adv"])[rows], m[rows], 0.2, count).objective
        if part == "value":
            return value_loss(z[rows], t(x["returns"])[rows], m[rows], t(x["old"])[rows], 0.2, count).loss
        return entropy_bonus(z[rows] ** 2, m[rows], count)

    whole, pieces = (t(x["logp"]).requires_grad_() for _ in range(2))
    loss(whole, slice(0, B), m.sum()).backward()
    for rows in (slice(0, 2), slice(2, B)):
        loss(pieces, rows, m.sum()).backward()
    np.testing.assert_allclose(pieces.grad.numpy(), whole.grad.numpy(), rtol=1e-12)


def test_what_lies_under_the_mask_does_not_count():
    mask, x = ragged(2)
    m = torch.tensor(mask)
    dirty = t(np.where(mask, x["logp"], np.nan))
    clean = clipped_surrogate(t(x["logp"]), t(x["old"]), t(x["adv"]), m, 0.2)
    assert torch.equal(clipped_surrogate(dirty, t(x["old"]), t(x["adv"]), m, 0.2).objective, clean.objective)
    assert float(masked_mean(dirty, m)) == pytest.approx(x["logp"][mask].mean())


def test_whitening_is_population_and_masked():
    mask, x = ragged(4)
    got = whiten(t(x["adv"]), torch.tensor(mask)).numpy()
    chosen = x["adv"][mask]
    np.testing.assert_allclose(got[mask], (chosen - chosen.mean()) / chosen.std(), rtol=1e-6)
    assert not got[~mask].any()
    assert not whiten(torch.full((2, 3), 5.0), torch.ones(2, 3, dtype=torch.bool)).any()


def test_whitening_agrees_with_trl_up_to_its_stated_difference():
    """TRL divides by sqrt(var + 1e-8) with Bessel's correction; ours is the population form."""
    mask, x = ragged(4)
    chosen = x["adv"][mask]
    n = mask.sum()
    theirs = (chosen - chosen.mean()) / np.sqrt(chosen.var() * n / (n - 1) + 1e-8)
    ours = whiten(t(x["adv"]), torch.tensor(mask)).numpy()[mask]
    np.testing.assert_allclose(ours, theirs * np.sqrt(n / (n - 1)), rtol=1e-6)


def test_kl_estimators_by_hand_and_in_expectation():
    d = math.log(2)
    logp, ref = t([0.0]), t([-d])
    assert float(kl_estimate(logp, ref, "k1")) == pytest.approx(d)
    assert float(kl_estimate(logp, ref, "k2")) == pytest.approx(d**2 / 2)
    assert float(kl_estimate(logp, ref, "k3")) == pytest.approx(0.5 - 1 + d)
    # Summed over the whole vocabulary with the policy's own weights, k1 and k3 are the exact KL.
    rng = np.random.default_rng(0)
    p, q = (oracle.log_softmax(rng.normal(size=50)) for _ in range(2))
    exact = (np.exp(p) * (p - q)).sum()
    for name in ("k1", "k3"):
        assert float((t(np.exp(p)) * kl_estimate(t(p), t(q), name)).sum()) == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logp, ref, "k4")


def test_adaptive_kl_by_hand():
    # KL 12 against target 10: error 0.2; 64 completions over a horizon of 640: coef * (1 + 0.2 * 0.1)
    controller = AdaptiveKL(0.1, 10.0, 640.0)
    controller.update(12.0, 64)
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller.update(0.0, 64)  # error clipped at -0.2
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98)
    fixed = FixedKL(0.3)
    fixed.update(100.0, 64)
    assert fixed.coef == 0.3


MASK = torch.tensor([[False, True, True, False], [False, False, True, True]])
LAST = torch.tensor([2, 3])


@pytest.mark.parametrize(("truncation", "second"), [("penalize", 5.0 - 2.0), ("bootstrap", 5.0 + 0.5 * 10.0), ("nothing", 5.0)])
def test_token_rewards_by_hand(truncation, second):
    """Row 0 finished, row 1 was cut; score on the last response token, minus 0.1 KL on each."""
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, 3.0, 4.0]])
    got = token_rewards(
        torch.tensor([7.0, 5.0]), kl, MASK, LAST, 0.1, torch.tensor([True, False]), truncation, 2.0, 0.5, torch.tensor([99.0, 10.0])
    )
    expected = [[0, -0.1, 7 - 0.2, 0], [0, 0, -0.3, second - 0.4]]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_explained_variance():
    returns = t([[1.0, 2.0, 3.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert float(explained_variance(returns.clone(), returns, mask)) == 1.0
    assert float(explained_variance(torch.full_like(returns, 2.0), returns, mask)) == pytest.approx(0.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), temperature=st.sampled_from([0.5, 1.0, 1.7]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernels, and by torch
def test_token_stats_equal_the_oracle(seed, n, temperature, dtype):
    rng = np.random.default_rng(seed)
    hidden, matrix = rng.normal(size=(n, 5)), rng.normal(size=(13, 5))
    tokens = rng.integers(0, 13, size=n)
    logp = oracle.log_softmax(hidden @ matrix.T / temperature)
    got = token_stats(torch.tensor(hidden, dtype=dtype), torch.tensor(matrix, dtype=dtype), torch.tensor(tokens), temperature)
    np.testing.assert_allclose(got.logprobs, logp[np.arange(n), tokens], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix_trains", [True, False])
@pytest.mark.parametrize("entropic", [True, False])
def test_token_stats_gradient_is_autograd_s(monkeypatch, dtype, matrix_trains, entropic):
    """The hand-written backward pass, over several chunks, against differentiating the plain formula."""
    monkeypatch.setattr("accord.nn.logprobs.CHUNK", 3)
    g = torch.Generator().manual_seed(0)
    hidden, matrix = torch.randn(8, 5, generator=g, dtype=dtype), torch.randn(13, 5, generator=g, dtype=dtype)
    tokens, weights = torch.randint(0, 13, (8,), generator=g), torch.randn(2, 8, generator=g, dtype=dtype)
    grads = []
    for plain in (True, False):
        h, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_(matrix_trains)
        if plain:
            logp = torch.log_softmax(h @ w.t() / 0.7, -1)
            picked, entropy = logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
        else:
            picked, entropy = token_stats(h, w, tokens, 0.7, entropic=entropic)
        ((picked * weights[0]).sum() + ((entropy * weights[1]).sum() if entropic else 0)).backward()
        grads.append((h.grad, w.grad) if matrix_trains else (h.grad,))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_exact_kl_equals_the_oracle():
    rng = np.random.default_rng(1)
    h, o, w = rng.normal(size=(4, 5)), rng.normal(size=(4, 5)), rng.normal(size=(13, 5))
    p, q = oracle.log_softmax(h @ w.T / 0.8), oracle.log_softmax(o @ w.T / 0.8)
    f = lambda a: torch.tensor(a, dtype=torch.float32)
    np.testing.assert_allclose(exact_kl(f(h), f(w), f(o), f(w), 0.8), (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)
