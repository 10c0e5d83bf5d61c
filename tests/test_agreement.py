"""Agreement statistics against published examples, scipy, scikit-learn and counting by hand."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from accord.cli import main
from accord.data.records import Ranking
from accord.data.sources import read_weights
from accord.disk import write_lines
from accord.errors import UserError
from accord.feedback.agreement import agreement, cohen_kappa, comparisons, dawid_skene, kendall_w, krippendorff_alpha, labeler_weights

# Krippendorff 2011, section E: four observers, twelve units, some marks missing.
OBSERVERS = ["1 2 3 3 2 1 4 1 2 * * *", "1 2 3 3 2 2 4 1 2 5 * 3", "* 3 3 3 2 3 4 2 2 5 1 *", "1 2 3 3 2 4 4 1 2 5 1 *"]


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(level, expected):
    columns = zip(*(row.split() for row in OBSERVERS), strict=True)
    units = [[int(v) for v in column if v != "*"] for column in columns]
    assert krippendorff_alpha(units, level) == pytest.approx(expected, abs=5e-4)


def test_alpha_where_there_is_nothing_to_tell():
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]])) and math.isnan(krippendorff_alpha([[1], [2]]))
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1.0


@pytest.mark.parametrize("ties", [False, True])
def test_kendalls_w_is_friedmans_statistic(ties):
    """W = chi2 / (m (n - 1)), ties corrected in both (scipy)."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        m, n = rng.integers(3, 7), rng.integers(3, 8)
        ranks = rng.integers(1, 4, size=(m, n)) if ties else np.array([rng.permutation(n) for _ in range(m)])
        expected = scipy.stats.friedmanchisquare(*ranks.T).statistic / (m * (n - 1))
        assert kendall_w(ranks.tolist()) == pytest.approx(expected)
    assert kendall_w([[1, 2, 3]] * 4) == pytest.approx(1.0) and math.isnan(kendall_w([[1, 1], [1, 1]]))
    assert kendall_w([[1, 2, math.inf], [1, 2, 9]]) == pytest.approx(1.0)  # F stands last


def test_kappa_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
        assert cohen_kappa(a.tolist(), b.tolist()) == pytest.approx(sklearn.metrics.cohen_kappa_score(a, b))
    assert math.isnan(cohen_kappa([False] * 3, [False] * 3))


def rank(prompt, labeler, *ranks):
    return Ranking(prompt, labeler, tuple(None if r == "F" else r for r in ranks))


def test_comparisons():
    got = comparisons([rank("p", "a", 2, 1, "F", 1, "F")])
    values = {(c.first, c.second): c.value for c in got}
    assert values == {(0, 1): 1, (0, 2): -1, (0, 3): 1, (0, 4): -1, (1, 2): -1, (1, 3): 0, (1, 4): -1, (2, 3): 1, (2, 4): 0, (3, 4): -1}


def test_by_hand():
    """p: a 1 2 3, b 1 3 2, c 1 1 2. Of three comparisons ab share two, ac and bc: (0,1) -,-,0; (0,2) -,-,-; (1,2) -,+,-."""
    rankings = [
        rank("p", "a", 1, 2, 3),
        rank("p", "b", 1, 3, 2),
        rank("p", "c", 1, 1, 2),
        rank("q", "a", 1, 2),
        rank("q", "b", 1, 2),
        rank("r", "a", 1, "F"),
    ]
    got = agreement(rankings, draws=50)
    assert (got.prompts, got.rankings) == (3, 6)
    # Same: (0,1) 1 of 3, (0,2) 3 of 3, (1,2) 1 of 3, q 1 of 1; strictly compared: (0,1) 1 of 1, (0,2) 3 of 3, (1,2) 1 of 3, q 1 of 1.
    assert got.with_ties.value == pytest.approx(6 / 10) and got.without_ties.value == pytest.approx(6 / 8)
    assert got.kendall_w.value == pytest.approx((kendall_w([[1, 2, 3], [1, 3, 2], [1, 1, 2]]) + 1) / 2)
    assert got.disputed == [("p", pytest.approx(5 / 9), pytest.approx(kendall_w([[1, 2, 3], [1, 3, 2], [1, 1, 2]]))), ("q", 1.0, 1.0)]
    assert got.kappa_fail is None  # nobody marks what another sees as F
    a = got.labelers["a"]
    assert (a.rankings, a.fails, a.ties) == (3, pytest.approx(1 / 7), 0.0)
    assert a.with_others.value == pytest.approx((2 + 2 + 1) / (3 + 2 + 1)) and a.with_gold is None
    assert got.labelers["c"].ties == pytest.approx(1 / 3)


def noisy(rng, quality, prompts, k=4, fail=0.15, overlap=3):
    """Labelers who know the true order and move each completion by noise of their own."""
    out = []
    for p in range(prompts):
        truth = rng.permutation(k).astype(float)
        failed = rng.random(k) < fail
        for who in rng.choice(list(quality), size=overlap, replace=False):
            seen = truth + rng.normal(0, quality[who], k)
            ranks = np.round(seen).astype(int) - int(np.round(seen).min()) + 1
            marks = failed ^ (rng.random(k) < 0.05)
            out.append(Ranking(f"p{p}", str(who), tuple(None if f else int(r) for f, r in zip(marks, ranks, strict=True))))
    return out


def test_statistics_are_what_counting_gives():
    """The pooled, vectorised statistics, and that the interval is of resampled prompts."""
    rankings = noisy(np.random.default_rng(0), {"a": 0.3, "b": 0.7, "c": 1.0, "d": 2.0}, 60)
    got = agreement(rankings, draws=300)
    by_prompt = {}
    for r in rankings:
        by_prompt.setdefault(r.prompt_id, []).append(r)
    same, strict, units, shared = [], [], [], {}
    for given in by_prompt.values():
        tables = [{(c.first, c.second): c.value for c in comparisons([r])} for r in given]
        for one, two in combinations(tables, 2):
            same += [one[k] == two[k] for k in one]
            strict += [one[k] == two[k] for k in one if one[k] and two[k]]
        units += [[t[k] for t in tables] for k in tables[0]]
        for one, two in combinations(sorted(given, key=lambda r: r.labeler), 2):
            pair = shared.setdefault((one.labeler, two.labeler), ([], []))
            pair[0].extend(r is None for r in one.ranks)
            pair[1].extend(r is None for r in two.ranks)
    assert got.with_ties.value == pytest.approx(np.mean(same)) and got.without_ties.value == pytest.approx(np.mean(strict))
    assert got.alpha.value == pytest.approx(
        krippendorff_alpha([[s * v for v in unit] for unit in units for s in (1, -1)], "ordinal"), abs=1e-3
    )
    kappas = [sklearn.metrics.cohen_kappa_score(*pair) for pair in shared.values()]
    assert got.kappa_fail.value == pytest.approx(np.average(kappas, weights=[len(a) for a, _ in shared.values()]))
    for estimate in (got.with_ties, got.without_ties, got.alpha, got.kappa_fail, got.kendall_w):
        assert estimate.low < estimate.value < estimate.high
    # A tenth of the prompts know about sqrt(10) times less.
    few = [r for r in rankings if r.prompt_id in [f"p{i}" for i in range(6)]]
    width = lambda e: e.high - e.low
    assert width(agreement(few, draws=300).alpha) > 1.8 * width(got.alpha)


def test_the_order_of_completions_means_nothing():
    """The same judgements with the completions in another order, the best always first among them: every number the same."""
    rankings = noisy(np.random.default_rng(0), {"a": 0.3, "b": 0.7, "c": 1.0, "d": 2.0}, 60)

    def reordered(order_of):
        return [Ranking(r.prompt_id, r.labeler, tuple(r.ranks[k] for k in order_of(r))) for r in rankings]

    first = {}
    for r in rankings:
        first.setdefault(r.prompt_id, sorted(range(4), key=lambda k, r=r: (r.ranks[k] is None, r.ranks[k] or 0)))
    sorted_, shuffled = (
        reordered(lambda r: first[r.prompt_id]),
        reordered(lambda r: np.random.default_rng(int(r.prompt_id[1:])).permutation(4)),
    )
    one, two = (agreement(some, draws=20) for some in (sorted_, shuffled))
    for name in ("with_ties", "without_ties", "alpha", "kendall_w", "kappa_fail"):
        assert getattr(one, name).value == pytest.approx(getattr(two, name).value, abs=1e-9), name
    assert {who: r.quality for who, r in one.labelers.items()} == pytest.approx(
        {who: r.quality for who, r in two.labelers.items()}, abs=1e-4
    )
    weights = labeler_weights(sorted_)
    assert weights == pytest.approx(labeler_weights(shuffled), abs=1e-3) and weights["a"] > weights["b"] > weights["d"]
    always = [rank(f"p{i}", who, 1, 2) for i in range(9) for who in "ab"]
    assert agreement(always, draws=20).alpha.value == 1.0


def test_gold_is_no_labeler():
    rankings = [rank("p", "a", 1, 2, 3), rank("p", "b", 1, 3, 2), rank("p", "truth", 1, 2, 3), rank("q", "truth", 1, 2)]
    got = agreement(rankings, gold="truth", draws=20)
    assert set(got.labelers) == {"a", "b"} and got.prompts == 1
    assert got.labelers["a"].with_gold.value == 1.0 and got.labelers["b"].with_gold.value == pytest.approx(2 / 3)
    assert got.with_ties.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rankings", "gold", "message"),
    [
        ([], None, "no rankings"),
        ([rank("p", "a", 1, 2), rank("p", "a", 2, 1)], None, "'a' ranked the prompt 'p' twice"),
        ([rank("p", "a", 1, 2), rank("p", "b", 2, 1, 3)], None, "'a' ranked 2 completions and 'b' 3"),
        ([rank("p", "a", 1, 2)], "g", "No ranking is by 'g'"),
    ],
)
def test_what_cannot_be_compared(rankings, gold, message):
    with pytest.raises(UserError, match=message):
        agreement(rankings, gold)


def test_one_labeler_agrees_with_nobody():
    got = agreement([rank("p", "a", 1, 2)])
    assert (
        got.with_ties is got.without_ties is got.alpha is got.kendall_w is got.kappa_fail is None and got.labelers["a"].with_others is None
    )


def test_dawid_and_skene_by_their_own_equations():
    """One pass of equations 2.3 to 2.5 with loops, on votes of three labelers; no smoothing."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 40)
    votes = [
        (u, w, int(t if rng.random() < q else rng.integers(0, 3)))
        for u, t in enumerate(truth)
        for w, q in zip("abc", (0.9, 0.7, 0.4), strict=True)
    ]
    got = dawid_skene(votes, iterations=1, smoothing=0.0)
    posterior = np.array([[np.mean([m == c for x, _, m in votes if x == u]) for c in range(3)] for u in range(40)])
    prior = posterior.mean(0)
    confusion = {
        w: np.array([[sum(posterior[u, t] for u, x, m in votes if x == w and m == c) for c in range(3)] for t in range(3)]) for w in "abc"
    }
    confusion = {w: table / table.sum(1, keepdims=True) for w, table in confusion.items()}
    for u in range(40):
        expected = np.array([prior[t] * np.prod([confusion[w][t, m] for x, w, m in votes if x == u]) for t in range(3)])
        np.testing.assert_allclose(got.answers[u], expected / expected.sum(), atol=1e-9)
    for w in "abc":
        np.testing.assert_allclose(got.confusion[w], confusion[w], atol=1e-6)


def test_quality_is_found_and_weighs():
    """Three careful labelers against four who guess: the guessers are overruled, and weights order as quality does."""
    rng = np.random.default_rng(1)
    quality = {"a": 0.95, "b": 0.85, "c": 0.8, "w": 0.55, "x": 0.5, "y": 0.5, "z": 0.5}
    truth = rng.integers(0, 2, 600)
    votes = [(u, w, int(t if rng.random() < q else 1 - t)) for u, t in enumerate(truth) for w, q in quality.items()]
    found = dawid_skene(votes)
    for who, q in quality.items():
        assert found.quality[who] == pytest.approx(q, abs=0.05)
    answers = np.array([np.argmax(found.answers[u]) for u in range(600)])
    majority = np.array([np.mean([m for x, _, m in votes[7 * u : 7 * u + 7]]) > 0.5 for u in range(600)])
    assert (answers == truth).mean() > (majority == truth).mean() + 0.05
    weights = labeler_weights([rank(str(u), w, *((1, 2) if m else (2, 1))) for u, w, m in votes])
    assert weights["a"] > weights["b"] > weights["w"] and max(weights[who] for who in "xyz") < 0.3
    assert np.mean(list(weights.values())) == pytest.approx(1.0)
    with pytest.raises(UserError, match="no votes"):
        dawid_skene([])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rankings = noisy(np.random.default_rng(0), {"a": 0.3, "b": 0.7, "c[x]": 3.0}, 40)
    write_lines(tmp_path / "r.jsonl", (r.to_json() for r in rankings))
    assert main(["agreement", "--rankings", "r.jsonl", "--weights", "w.json", "--json", "all.json"]) == 0
    printed = capsys.readouterr().out
    found = agreement(rankings)
    assert f"{len(rankings)} rankings of 40 prompts by 3 labelers" in printed and str(found.alpha) in printed and "c[x]" in printed
    assert "Most disputed" in printed and found.disputed[0][0] in printed
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["alpha"]["value"] == found.alpha.value and written["labelers"]["a"]["quality"] == found.labelers["a"].quality
    weights = json.loads((tmp_path / "w.json").read_text())
    assert weights == labeler_weights(rankings) and weights["a"] > weights["c[x]"]
    assert main(["agreement", "--rankings", "r.jsonl", "--gold", "d"]) == 2 and "No ranking is by 'd'" in capsys.readouterr().err
    assert main(["agreement", "--rankings", "r.jsonl", "--gold", "a"]) == 0 and "like gold" in capsys.readouterr().out
    pairs = ["reward", "--pairs", "p.jsonl", "--labeler-weights", "w.json", "--out", "r"]
    assert main(pairs) == 2 and "pairs have no labelers" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"w.json: the weight of 'a' is -1; it must be a number from 0"):
        (tmp_path / "w.json").write_text('{"a": -1}')
        read_weights("w.json")
