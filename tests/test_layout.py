"""Tokens computed once: the layout against a dictionary of beginnings, attention against float64 a row at a time."""

import math

import numpy as np
import pytest
import torch
from conftest import save_model

from accord.nn import native
from accord.nn.attention import (
    attend_rows,
    collect,
    fused_attend_rows,
    lay_out,
    plain_attend_rows,
    plain_collect,
    plain_lay_out,
)
from accord.nn.fused import twice_differentiable
from accord.nn.layout import Layout, Places
from accord.nn.loading import load_model
from accord.rollout.matrices import Panels

ROWS = [[5, 6, 7, 8], [5, 6, 9], [1], [5, 6, 7, 8], [5, 6, 7], [2, 6, 7, 8, 9, 3], [5]]
DTYPES = [torch.float32, torch.bfloat16]


def layout_of(rows, pad=0):
    width = max(map(len, rows))
    return Layout.of(torch.tensor([r + [pad] * (width - len(r)) for r in rows]), torch.tensor([len(r) for r in rows]))


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("pad", [0, 6])  # also padding that looks like a token
@pytest.mark.parametrize("rows", [ROWS, ROWS[2:3], [[1, 2], [3, 4]], [[4, 4, 4]] * 3, [[1, 2, 3, 4], [1, 5, 3, 4], [6, 5, 3]]])
def test_every_beginning_is_there_once(rows, pad):
    layout = layout_of(rows, pad)
    numbers = {}
    for b, row in enumerate(rows):
        for t in range(layout.everywhere.token.shape[1]):
            number = int(layout.everywhere.token[b, t])
            if t >= len(row):
                assert number == -1
                continue
            assert numbers.setdefault(tuple(row[: t + 1]), number) == number
            assert layout.tokens[number] == row[t] and layout.positions[number] == t
    assert sorted(numbers.values()) == list(range(len(layout)))
    width = layout.everywhere.token.shape[1]
    for n in range(len(layout)):
        start, end = layout.everywhere.offsets[n : n + 2]
        there = (layout.everywhere.token.flatten() == n).nonzero()[:, 0]
        assert layout.everywhere.places[start:end].tolist() == there.tolist()
        assert layout.home.places[n] in there
        assert layout.home.token.flatten()[layout.home.places[n]] == n
    assert (layout.home.token >= 0).sum() == len(layout)
    x = random(len(layout), 3)
    back = layout.rows(x)
    assert torch.equal(layout.lines(back), x)
    assert not back[torch.arange(width) >= torch.tensor([len(r) for r in rows])[:, None]].any()


def angles(tokens, d, dtype):
    half = random(tokens, d // 2, seed=9)
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("whose", ["everywhere", "home", "some"])
def test_passages_and_their_gradients(dtype, turned, whose):
    """By the kernels, against differentiating torch's own steps in float64."""
    layout = layout_of(ROWS)
    wanted = torch.tensor([1, 4, 5])
    places = layout.home_of(wanted) if whose == "some" else getattr(layout, whose)
    tokens, heads, d = len(places.offsets) - 1, 3, 34
    cos, sin = angles(tokens, d, dtype) if turned else (None, None)
    given = random(tokens, heads + 2, d, dtype=dtype, seed=1)
    found = []
    for kind in (dtype, torch.float64):
        x = given.to(kind).clone().requires_grad_()
        wide = (None, None) if cos is None else (cos.to(kind), sin.to(kind))
        form = lay_out if kind == dtype else plain_lay_out
        out = form(x[:, 1:-1], places, *wide)  # a part of what was projected together: rows with a stride
        (out * random(*out.shape, seed=3).to(dtype).to(kind)).sum().backward()
        found.append((out.detach().double(), x.grad.double()))
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, **(dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)))


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_collecting_and_its_gradient(dtype):
    layout = layout_of(ROWS)
    found = []
    for form in (collect, plain_collect):
        rows = random(len(ROWS), 3, 6, 10, dtype=dtype).requires_grad_()
        out = form(rows, layout.home)
        (out * random(*out.shape, dtype=dtype, seed=1)).sum().backward()
        found.append((out.detach(), rows.grad))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)  # copies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, groups", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("window", [None, 4, 50])
def test_attention_and_its_gradients(dtype, heads, groups, window):
    """Each form, against differentiating the formula in float64."""
    B, T, d = 3, 11, 8
    given = [random(B, n, T, d, dtype=dtype, seed=n + i) for i, n in enumerate((heads, groups, groups))]
    slope = random(B, heads, T, d, seed=7)
    found = []
    for form in (attend_rows, plain_attend_rows, fused_attend_rows, formula):
        kind = torch.float64 if form is formula else dtype
        leaves = [x.to(kind).clone().requires_grad_() for x in given]
        out = form(*leaves, window)
        (out * slope.to(kind)).sum().backward()
        found.append([t.double() for t in (out.detach(), *(x.grad for x in leaves))])
    for mine in found[:-1]:
        for ours, exact in zip(mine, found[-1], strict=True):
            torch.testing.assert_close(
                ours, exact, **(dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.06))
            )


def formula(query, key, value, window):
    out = []
    for b in range(len(query)):
        for h in range(query.shape[1]):
            g = h // (query.shape[1] // key.shape[1])
            for t in range(query.shape[2]):
                seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
                p = torch.softmax(key[b, g, seen] @ query[b, h, t] / math.sqrt(query.shape[3]), 0)
                out.append(p @ value[b, g, seen])
    return torch.stack(out).view(query.shape)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_shared_beginning_changes_nothing(tmp_path, kind):
    """States and gradients are those of every row alone; a last layer that is read at some tokens gives the same there."""
    model = load_model(str(save_model(tmp_path, kind)), torch.float32).model.requires_grad_(True)
    rows = [[5, 6, 7, 8, 1, 2], [5, 6, 7, 9], [5, 6, 7, 8, 1, 3, 4, 4, 2], [1, 2]]
    layout = layout_of(rows)
    assert len(layout) < sum(map(len, rows))
    at = model.geometry(layout)
    wanted = layout.everywhere.token[torch.arange(4), torch.tensor([5, 3, 8, 1])].sort()
    cut = model.depth // 2
    states = model.upper(model.lower(at, cut), at, cut)
    some = model.upper(model.lower(at, cut), at, cut, wanted.values)
    torch.testing.assert_close(some, states[wanted.values], rtol=1e-5, atol=1e-5)
    some.pow(2).sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for b, row in enumerate(rows):
        alone = layout_of([row])
        here = model.geometry(alone)
        x = model.upper(model.lower(here, 0), here, 0)
        torch.testing.assert_close(layout.rows(states)[b, : len(row)], x, rtol=1e-4, atol=1e-5)
        x[-1].pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives(dtype):
    """Within twice_differentiable, against differences of first derivatives; the kernels are not asked there."""
    layout = layout_of([[1, 2, 3], [1, 4]])
    turned = [a.double() for a in angles(len(layout), 4, torch.float32)]

    def through(x):
        rows = lay_out(x, layout.everywhere, *(a.to(x.dtype) for a in turned))
        return collect(attend_rows(rows, rows, rows), layout.home)

    with twice_differentiable():
        if dtype == torch.float64:
            assert torch.autograd.gradgradcheck(through, random(len(layout), 1, 4, dtype=dtype).requires_grad_())
        else:
            (first,) = torch.autograd.grad(through(x := random(len(layout), 1, 4).requires_grad_()).pow(2).sum(), x, create_graph=True)
            assert torch.autograd.grad(first.pow(2).sum(), x)[0].abs().max() > 0.01


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
def test_two_threads_compute_what_one_does():
    """Bit for bit, and large enough that the kernels use both."""
    rows = [[k, *range(10, 40 + b)] for k in range(3) for b in range(5)]
    layout = layout_of(rows)
    x = random(len(layout), 9, 64, dtype=torch.bfloat16)
    weight, few = random(300, 64, dtype=torch.bfloat16, seed=1), random(40, 64, dtype=torch.bfloat16, seed=2)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            given = x.clone().requires_grad_()
            heads = lay_out(given, layout.everywhere, *angles(len(layout), 64, torch.bfloat16))
            out = collect(attend_rows(heads, heads[:, :3], heads[:, 3:6], 20), layout.home)
            out.backward(random(*out.shape, dtype=torch.bfloat16, seed=3))
            found.append((out.detach(), given.grad, Panels(weight, None)(few)))
        finally:
            torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_no_tokens_and_no_rows():
    nothing = Places.once(torch.empty(0, dtype=torch.long), torch.Size((2, 3)))
    for form in (lay_out, plain_lay_out):
        assert torch.equal(form(torch.empty(0, 2, 8), nothing), torch.zeros(2, 2, 3, 8))
    assert len(Layout.of(torch.empty(0, 4, dtype=torch.long), torch.empty(0, dtype=torch.long))) == 0
    assert Panels(random(16, 4, dtype=torch.bfloat16), None)(torch.empty(0, 4, dtype=torch.bfloat16)).shape == (0, 16)
    assert np.array_equal(Places.once(torch.tensor([2, 0]), torch.Size((2, 2))).token, [[1, -1], [0, -1]])
