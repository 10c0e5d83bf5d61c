"""Labelers' statistics on real votes (UKPConvArg1: which of two arguments convinces more; 3,728 workers, about five votes a pair).

    python bench/votes.py          # writes docs/agreement-on-real-votes.md; two minutes

It needs ../shared/data/human-votes, which is not part of accord.
"""

import gzip
import json
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared/data/human-votes/ukpconvarg1.part.jsonl.gz"
PAGE = ROOT / "docs/agreement-on-real-votes.md"
RANKS = {"a1": (1, 2), "a2": (2, 1), "equal": (1, 1)}
FOLDS, VOTES, DRAWS = 5, (2, 3, 5), 2000


def read():
    with gzip.open(DATA, "rt") as handle:
        return [json.loads(line) for line in handle]


def plainly(rows):
    """Agreement counted vote by vote, and alpha from its definition: mean disagreement of pairs within units over that of all pairs."""
    same = strict = both = total = 0
    within, values = 0.0, Counter()
    squared = lambda a, b, cuts: (sum(cuts[min(a, b) : max(a, b) + 1]) - (cuts[a] + cuts[b]) / 2) ** 2
    sides = [[("a1", "equal", "a2").index(v) for _, v in row["votes"]] for row in rows if len(row["votes"]) > 1]
    units = [[abs(flip - v) for v in side] for side in sides for flip in (0, 2)]  # which argument is the first means nothing
    for unit in units:
        values.update(unit)
        for a, b in combinations(unit, 2):
            total, same = total + 1, same + (a == b)
            if a != 1 and b != 1:
                both, strict = both + 1, strict + (a == b)
    cuts = [values[k] for k in range(3)]
    for unit in units:
        within += sum(2 * squared(a, b, cuts) for a, b in combinations(unit, 2)) / (len(unit) - 1)
    n = sum(cuts)
    chance = sum(cuts[a] * cuts[b] * squared(a, b, cuts) for a in range(3) for b in range(3)) / (n - 1)
    return same / total, strict / both, 1 - within / chance


def aggregate(votes, weight):
    """The label with the largest sum of weights, as shares of a tie."""
    sums = defaultdict(float)
    for who, label in votes:
        sums[label] += weight(who)
    best = max(sums.values())
    return [label for label, value in sums.items() if value >= best - 1e-12]


def heldout(rows, rankings_of, count, seed=0):
    """Per pair with gold: is the majority right, is the weighted vote, with ``count`` of its votes; quality from the other folds."""
    from accord.feedback.agreement import labeler_weights

    rng = np.random.default_rng([seed, count])
    kept = [{**row, "votes": [row["votes"][i] for i in rng.permutation(len(row["votes"]))[:count]]} for row in rows]
    fold = rng.integers(0, FOLDS, len(kept))
    plain, weighed = [], []
    for k in range(FOLDS):
        weights = labeler_weights([r for row, f in zip(kept, fold, strict=True) if f != k for r in rankings_of(row)])
        typical = float(np.median(list(weights.values())))
        for row, f in zip(kept, fold, strict=True):
            if f == k and row["gold"]:
                for out, weight in ((plain, lambda who: 1.0), (weighed, lambda who, w=weights, t=typical: max(w.get(who, t), 1e-3))):
                    best = aggregate(row["votes"], weight)
                    out.append((row["gold"] in best) / len(best))
    return np.array(plain), np.array(weighed)


def main():
    if not DATA.exists():
        sys.exit(f"{DATA} is not there; this benchmark needs it.")
    from accord.data.records import Ranking
    from accord.feedback.agreement import agreement
    from accord.feedback.summary import MEANING

    rows = read()
    rankings_of = lambda row: [Ranking(row["id"], who, RANKS[label]) for who, label in row["votes"]]
    twice = sum(len({who for who, _ in row["votes"]}) < len(row["votes"]) for row in rows)
    for row in rows:
        row["votes"] = list(dict(row["votes"]).items())
    found = agreement([r for row in rows for r in rankings_of(row)], draws=300)
    ours = [found.with_ties.value, found.without_ties.value, found.alpha.value]
    theirs = plainly(rows)
    assert np.allclose(ours, theirs, atol=1e-9), (ours, theirs)
    lines = [
        "# Agreement statistics on real votes",
        "",
        "UKPConvArg1 (Habernal & Gurevych 2016, CC BY 4.0): which of two arguments is more convincing, or neither. "
        f"{len(rows):,} pairs, {found.rankings:,} votes of {len(found.labelers):,} workers. Made by `python bench/votes.py`.",
        "",
        "| statistic | value, 95% interval over pairs | counted plainly | what it is |",
        "|---|---|---|---|",
    ]
    for name, plain in zip(("with_ties", "without_ties", "alpha"), theirs, strict=True):
        lines.append(f"| {name} | {getattr(found, name)} | {plain:.6f} | {MEANING[name]} |")
    lines += [
        "",
        "The third column is computed again from the definitions, vote by vote (`plainly` in bench/votes.py); both agree to 1e-9, or no page is written."
        + (f" In {twice} pairs a worker voted twice; the last vote counts." if twice else ""),
        "",
        "## Are better labelers worth more?",
        "",
        "Labelers' weights (`accord agreement --weights`: Dawid & Skene 1979, log-odds) are learned on four fifths of the pairs and used on the rest, "
        "against the plain majority of the same votes. Right is what the data set's authors give as gold (they used every vote, so the numbers are "
        "high for both). A worker whom the four fifths do not know counts as the median one.",
        "",
        "| votes a pair | majority right | weighted right | gain, 95% paired bootstrap |",
        "|---|---|---|---|",
    ]
    luck = np.random.default_rng(0)
    verdicts = []
    for count in VOTES:
        plain, weighed = heldout(rows, rankings_of, count)
        gain = weighed - plain
        drawn = [gain[luck.integers(0, len(gain), len(gain))].mean() for _ in range(DRAWS)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        verdicts.append("helps" if low > 0 else "harms" if high < 0 else "is not shown to help or harm")
        lines.append(
            f"| {count} | {plain.mean():.4f} | {weighed.mean():.4f} | {100 * gain.mean():+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}] |"
        )
        print(lines[-1], flush=True)
    lengths = [
        (len(row["a1"]), len(row["a2"]), row["gold"]) for row in rows if row["gold"] in ("a1", "a2") and len(row["a1"]) != len(row["a2"])
    ]
    longer = np.mean([(a > b) == (g == "a1") for a, b, g in lengths])
    counts = Counter(r.labeler for row in rows for r in rankings_of(row))
    told = "Weighting " + ", ".join(f"{verdict} with {count} votes" for count, verdict in zip(VOTES, verdicts, strict=True)) + "."
    lines += [
        "",
        f"{told} Half of the workers gave {int(np.median(list(counts.values())))} votes or fewer, so little is known of most of them.",
        "",
        "## Longer wins",
        "",
        f"Of the {len(lengths):,} pairs with a preferred argument of another length, the longer one is preferred in {longer:.1%}. "
        "`accord reward` reports the same of its pairs (`length_slope`) and of its scores (`follows_length`); `--length-control` fits what length explains "
        "first and leaves it out of the score.",
        "",
    ]
    PAGE.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
