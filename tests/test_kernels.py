"""The decoder's fast pieces against the plain ones, and against arithmetic that is neither."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from accord.errors import UserError
from accord.nn import fused, native
from accord.nn.logprobs import slope_of, stats_of
from accord.rollout.decoding import choose
from accord.rollout.matrices import Dense, Int8, Packed, Panels, matrix
from accord.rollout.pieces import Native, Place, Plain, pieces_for
from accord.rollout.sampling import Sampling

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
# One rounding of bf16 is 2^-9; sums in another order may fall on the other side of it.
CLOSE = {torch.float32: dict(atol=2e-5, rtol=1e-5), torch.bfloat16: dict(atol=2**-7, rtol=2**-7)}


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def close(a, b):
    torch.testing.assert_close(a.float(), b.float(), **CLOSE[a.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 8), (5, 33), (40, 576)])
def test_norm(dtype, rows, width):
    x, y = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    w = random(width, dtype=dtype, seed=2)
    for change in (y, None):
        mine, theirs = x.clone(), x.clone()
        close(Native().add_norm(mine, change, w, 1e-5), Plain().add_norm(theirs, change, w, 1e-5))
        assert torch.equal(mine, theirs)  # the sum is rounded once, so it is the same
    x64 = x.double().numpy()
    oracle = w.double().numpy() * x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5)
    close(Native().add_norm(x.clone(), None, w, 1e-5), torch.from_numpy(oracle).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu(dtype):
    both = random(7, 66, dtype=dtype, scale=4.0)
    both[0, 0], both[0, 1], both[0, 2] = 100.0, -100.0, 0.0
    close(Native().silu_mul(both), Plain().silu_mul(both))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, groups", [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("rotary, window", [(True, None), (False, None), (True, 5)])
@pytest.mark.parametrize("d", [16, 64, 80, 128])  # 64 and 128 have forms of their own
def test_attention_writes_and_reads_the_cache(dtype, heads, groups, rotary, window, d):
    rows, slots = 5, 24
    joined = random(rows, (heads + 2 * groups) * d, dtype=dtype)
    keys, values = (random(rows, groups, slots, d, dtype=dtype, seed=i) for i in (1, 2))
    positions = torch.tensor([0, 3, 11, 22, 7])
    angles = random(rows, d, seed=3)
    place = Place(positions, angles.cos().to(dtype), angles.sin().to(dtype), 23)
    results = []
    for pieces in (Native(), Plain()):
        cache = keys.clone(), values.clone()
        results.append((pieces.attend(joined, *cache, place, heads, rotary, window), *cache))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)
    untouched = torch.ones(rows, slots, dtype=torch.bool)
    untouched[torch.arange(rows), positions] = False
    for written, before in zip(results[0][1:], (keys, values), strict=True):
        assert torch.equal(written.transpose(1, 2)[untouched], before.transpose(1, 2)[untouched])


def test_attention_equals_the_formula():
    """softmax(q K^T / sqrt(d)) V in float64, one row at a time."""
    rows, heads, groups, d, slots = 3, 4, 2, 8, 6
    joined = random(rows, (heads + 2 * groups) * d)
    keys, values = (random(rows, groups, slots, d, seed=i) for i in (1, 2))
    positions = torch.tensor([5, 0, 2])
    nothing = torch.zeros(rows, d)
    out = Native().attend(joined, keys, values, Place(positions, nothing + 1, nothing, 6), heads, True, None)
    for row in range(rows):
        for head in range(heads):
            q = joined[row, head * d : (head + 1) * d].double().numpy()
            k, v = (c[row, head // (heads // groups), : positions[row] + 1].double().numpy() for c in (keys, values))
            p = np.exp(k @ q / np.sqrt(d))
            np.testing.assert_allclose(out[row, head * d : (head + 1) * d], (p / p.sum()) @ v, rtol=1e-5, atol=1e-6)


OPERATIONS = {
    "norm": (lambda x, y: fused.rms_norm(x, y[0, 0, 0], 1e-5), (2, 5, 3, 34), torch.float32),
    "silu": (lambda x, y: fused.silu_mul(x, y), (2, 5, 3, 34), None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("across", [False, True])
def test_operations_and_their_gradients(name, dtype, across):
    """By the kernels, against differentiating torch's own steps in float64; contiguous, and turned on their side."""
    operation, shape, weight_dtype = OPERATIONS[name]
    results = []
    for kind, plain in ((dtype, False), (torch.float64, True)):
        given = [random(*shape, seed=1).to(dtype).to(kind), random(*shape, seed=2).to(kind if plain else weight_dtype or kind)]
        if across:
            given = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in given]
        x, y = (g.requires_grad_() for g in given)
        with fused.twice_differentiable() if plain else contextlib.nullcontext():
            out = operation(x, y)
        (out * random(*shape, seed=3).to(dtype).to(kind)).sum().backward()
        results.append([t.double() for t in (out.detach(), x.grad, y.grad) if t is not None])
    for mine, exact in zip(*results, strict=True):
        # dw sums thirty terms, each rounded to bf16 in what is multiplied.
        torch.testing.assert_close(
            mine, exact, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5 if dtype == torch.float32 else 0.05
        )


def test_a_kernel_is_not_differentiated_twice():
    x = random(3, 8).requires_grad_()
    push = torch.zeros(3, 8, requires_grad=True)  # J^T u, differentiated by u: how TRPO gets J v
    (pulled,) = torch.autograd.grad(fused.rms_norm(x, torch.ones(8), 1e-5), x, push, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(pulled.sum(), push)
    with fused.twice_differentiable():
        (pulled,) = torch.autograd.grad(fused.rms_norm(x, torch.ones(8), 1e-5), x, push, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled.sum(), push)
    assert tangent.abs().max() > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("width", [3, 700, 5000])
def test_draw(dtype, temperature, width):
    logits = random(64, width, dtype=dtype, scale=3.0)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logprobs = Native().draw(logits, uniform, temperature)
    z = logits.double().numpy() / (temperature or 1.0)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, logp[np.arange(64), tokens], rtol=1e-5, atol=1e-5)
    if temperature == 0:
        assert (logits.gather(-1, tokens[:, None])[:, 0] == logits.amax(-1)).all()
        return
    cumulative = np.exp(logp).cumsum(-1)
    for row, (token, u) in enumerate(zip(tokens.tolist(), uniform.tolist(), strict=True)):
        below = cumulative[row, token - 1] if token else 0.0
        assert below - 1e-5 <= u <= cumulative[row, token] + 1e-5


def test_draw_at_the_ends():
    """What has no mass is never drawn, whatever the rounding; a row that is certain stays certain."""
    logits = torch.full((3, 1000), -1e9)
    logits[0, 17] = logits[1, 999] = logits[2, 0] = 0.0
    almost_one = torch.tensor([np.nextafter(1.0, 0.0)] * 3, dtype=torch.float64)
    mixed = torch.cat((random(3, 400, scale=2.0), torch.full((3, 1600), -1e9)), -1)
    for seed in range(50):  # sums in another order: in some of these the last likely token's share is used up by rounding
        tokens, logprobs = Native().draw(mixed + seed * 1e-3 * random(3, 2000, seed=seed), almost_one, 1.0)
        assert int(tokens.max()) < 400
        assert float(logprobs.min()) > -40
    for uniform in (almost_one, torch.zeros(3, dtype=torch.float64)):
        tokens, logprobs = Native().draw(logits, uniform, 1.0)
        assert tokens.tolist() == [17, 999, 0]
        assert logprobs.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_stats_and_slope(dtype):
    """Against float64, over several blocks, with logits that have no mass and one row that is certain."""
    logits = random(6, 3000, dtype=dtype, scale=3.0)
    logits[1, :2990], logits[2, 5] = -1e9, 300.0
    tokens, a, b = torch.tensor([0, 2995, 5, 7, 2999, 1500]), random(6, seed=1), random(6, seed=2)
    z = (logits.double() / 0.7).requires_grad_()
    logp = torch.log_softmax(z, -1)
    picked, entropy = logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (a * picked + b * entropy).sum().backward()
    mine = stats_of(logits, tokens, 0.7)
    torch.testing.assert_close(mine.logprobs.double(), picked.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    slope = slope_of(logits, tokens, 0.7, a, b)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.double(), z.grad / 0.7, rtol=CLOSE[dtype]["rtol"], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_matrices(dtype, bias):
    x, w = random(19, 64, dtype=dtype), random(48, 64, dtype=dtype, seed=1)
    b = random(48, dtype=dtype, seed=2) if bias else None
    exact = Dense(w, b)(x)
    assert isinstance(matrix(w, b), Packed | Panels)
    close(matrix(w, b)(x) / 8, exact / 8)
    eight = matrix(w, b, "int8")
    assert isinstance(eight, Int8)
    # Each factor is rounded by at most half of its largest / 127; K = 64 such errors add up like noise.
    error = (eight(x).double() - (x.double() @ w.double().t() + (0 if b is None else b.double()))).abs()
    assert float(error.mean()) < 0.1
    assert float(error.max()) < 0.5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs, inputs", [(16, 2), (48, 64), (130, 34), (200, 20)])
def test_panels(outputs, inputs, bias):
    """Every number of rows that has a form of its own, and what is left over of panels; against float64."""
    w, b = random(outputs, inputs, dtype=torch.bfloat16, seed=1), random(outputs, dtype=torch.bfloat16, seed=2) if bias else None
    product = Panels(w, b)
    for rows in (*range(1, 20), 36, 64):
        x = random(rows, inputs, dtype=torch.bfloat16, seed=rows)
        exact = x.double() @ w.double().t() + (0 if b is None else b.double())
        torch.testing.assert_close(product(x).double(), exact, rtol=2**-8, atol=1e-5)  # rounded once, at the end


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """A tensor of the same size takes no new pages from the system; in a process of its own, which the rest does not touch."""
    code = (
        "import resource, sys, torch\n"
        "from accord.nn.memory import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "found = [faults() for _ in range(24)]\n"  # an aligned block fits into a hole of its size only once there are a few
        "print(max(found[-4:]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    new_pages = []
    for way in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, env=environment, check=True)
        new_pages.append(int(done.stdout))
    assert new_pages[0] * 10 < new_pages[1]


@pytest.mark.parametrize("pieces", [Native(), Plain()])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(pieces, temperature, broken):
    logits = random(3, 700)
    logits[1, 600] = broken
    luck = torch.full((3,), 0.5, dtype=torch.float64)
    with pytest.raises(UserError, match="not finite"):
        choose(logits, luck, Sampling(temperature), pieces)


def test_int8_passes_on_what_is_not_finite():
    x, eight = random(3, 64), Int8(random(48, 64, seed=1), None)
    for broken in (float("nan"), float("inf")):
        x[1, 5] = broken
        out = eight(x)
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_a_kernel_refuses_what_it_would_read_wrongly():
    x, w = random(4, 8), torch.ones(8)
    for bad in (w.double(), torch.ones(16)[::2]):
        with pytest.raises(TypeError, match="add_norm reads"):
            native.call("add_norm", x, x, None, bad, torch.empty_like(x), None, 4, 8, 1e-5)


def test_int8_by_hand():
    """Rows [127, 0] and [1, 2] times the weight [2, -1]: scales 2/127 for the weight, 1 and 2/127 for the rows."""
    eight = Int8(torch.tensor([[2.0, -1.0]]), None)
    assert eight.weight.t().tolist() == [[127, -64]]  # -63.5 to even
    out = eight(torch.tensor([[127.0, 0.0], [1.0, 2.0]]))
    s = 2 / 127
    torch.testing.assert_close(out, torch.tensor([[127 * 127 * s], [(64 * 127 - 127 * 64) * s * s]]), rtol=1e-6, atol=1e-6)


def test_int8_without_kernels_is_the_same(monkeypatch):
    x, eight = random(9, 64), Int8(random(48, 64, seed=1), random(48, seed=2))
    native_result = eight(x)
    monkeypatch.setattr("accord.rollout.matrices.serves", lambda x: False)
    torch.testing.assert_close(eight(x), native_result, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_torch_does_it_and_says_so(monkeypatch, capsys):
    native.library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    try:
        assert isinstance(pieces_for(torch.device("cpu"), torch.bfloat16), Plain)
        assert "no C++ compiler" in capsys.readouterr().out
    finally:
        native.library.cache_clear()


def test_a_cache_that_cannot_be_used_is_named(monkeypatch, capsys):
    native.library.cache_clear()
    monkeypatch.setenv("ACCORD_CACHE", "/proc/accord")
    try:
        assert native.library() is None
        assert "could not be made" in capsys.readouterr().out.replace("\n", " ")
    finally:
        native.library.cache_clear()


def test_a_damaged_library_is_made_anew(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "good"))
    try:
        assert native.library() is not None
        (made,) = (tmp_path / "good").rglob("*.so")
        damaged = tmp_path / "bad" / "kernels" / made.name
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(made.read_bytes()[:1000])
        damaged.with_suffix(".sha256").write_text(made.with_suffix(".sha256").read_text())
        monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "bad"))
        native.library.cache_clear()
        assert native.library() is not None
        assert len(damaged.read_bytes()) == len(made.read_bytes())
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_named(monkeypatch, capsys, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path))
    try:
        assert native.library() is None
        assert "could not be made with /bin/false" in capsys.readouterr().out.replace("\n", " ")
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.library.cache_clear()
