"""The reward model on real preferences (Anthropic HH, helpful and harmless), against what is easy.

    python bench/preferences.py                        # the probe: twenty minutes; writes docs/reward-on-real-preferences.md
    python bench/preferences.py --finetune 5           # and the layers trained in each fold: hours on two cores

Five folds by prompt. Beside accord's reward model: the longer answer wins; a Bradley-Terry model of TF-IDF features of the answers;
a logistic regression of scikit-learn on the bundled model's last layer, its strength by its own cross-validation. It needs
../shared/data/hh and ../shared/data/human-votes, which are not part of accord.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared/data"
SETS = {"helpful": DATA / "hh/helpful-base.test.jsonl.gz", "harmless": DATA / "hh/harmless-base.part.jsonl.gz"}
VOTES = DATA / "human-votes/ukpconvarg1.part.jsonl.gz"
PAGE = ROOT / "docs/reward-on-real-preferences.md"
FOLDS, DRAWS, MODEL = 5, 5000, "smollm2-135m-instruct"
PEER = "logistic regression on the last layer (scikit-learn)"


def messages(transcript):
    """A transcript as a chat; its last turn is the answer."""
    out = []
    for part in transcript.split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        out.append({"role": "user", "content": human.strip()})
        out += [{"role": "assistant", "content": a.strip()} for a in answers]
    return out


def hh(path):
    """(groups, prompts): a group a pair, the preferred answer first or second by chance."""
    from accord.data.records import Completion, Pair, PairGroup, Prompt

    luck, groups, prompts = random.Random(0), [], []
    with gzip.open(path, "rt") as handle:
        for i, line in enumerate(handle):
            row = json.loads(line)
            chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
            assert chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
            sides = [chosen, rejected] if luck.random() < 0.5 else [rejected, chosen]
            # In a few the conversations differ before the last turn, too: each answer keeps its own.
            answers = [
                Completion(Prompt(f"{path.name}-{i}", side[:-1]), side[-1]["content"] or " ", True, k) for k, side in enumerate(sides)
            ]
            better = sides.index(chosen)
            groups.append(PairGroup(answers[0].prompt, tuple(answers), (Pair(better, 1 - better, 1.0),), ()))
            prompts.append(json.dumps(chosen[:-1]))
    return groups, prompts


def folds_of(prompts, seed=0):
    """Equal prompts in the same fold."""
    names = {p: k for k, p in enumerate(dict.fromkeys(prompts))}
    fold = np.random.default_rng(seed).permutation(len(names)) % FOLDS
    return np.array([fold[names[p]] for p in prompts])


def gaps_of(groups, scores):
    """Score of the preferred answer minus the other's. ``scores``: two a group."""
    pairs = [g.pairs[0] for g in groups]
    return np.array([scores[2 * i + p.preferred] - scores[2 * i + p.other] for i, p in enumerate(pairs)])


def tfidf(groups, fold):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = [c.text for g in groups for c in g.completions]
    gaps = np.zeros(len(groups))
    for k in range(FOLDS):
        rows = np.flatnonzero(np.repeat(fold != k, 2))
        features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([texts[r] for r in rows]).transform(texts)
        better, worse = ([2 * i + g.pairs[0][side] for i, g in enumerate(groups)] for side in (0, 1))
        x = features[better] - features[worse]
        gaps[fold == k] = (x @ logistic(LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000), x, fold != k))[fold == k]
    return gaps


def logistic(model, x, inside):
    """Weights for which x @ weights is likely positive: half of the rows are turned round, as two classes are needed."""
    sign = np.where(np.arange(x.shape[0]) % 2, 1.0, -1.0)
    turned = x.multiply(sign[:, None]).tocsr() if hasattr(x, "multiply") else x * sign[:, None]
    return model.fit(turned[inside], sign[inside]).coef_[0]


def peer_probe(groups, states, fold):
    from sklearn.linear_model import LogisticRegressionCV

    gaps, states = np.zeros(len(groups)), states.astype(float)
    for k in range(FOLDS):
        deviation = states[np.repeat(fold != k, 2)].std(0)
        x = gaps_of(groups, states / deviation)
        model = LogisticRegressionCV(Cs=np.logspace(-5, 0, 11), cv=5, fit_intercept=False, scoring="neg_log_loss", solver="newton-cholesky")
        gaps[fold == k] = (x @ logistic(model, x, fold != k))[fold == k]
    return gaps


def mean(values, luck):
    drawn = np.array([values[luck.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)])
    return values.mean(), *np.percentile(drawn, [2.5, 97.5])


right = lambda gaps: np.where(gaps == 0, 0.5, gaps > 0)


def told(gaps, luck):
    """Accuracy with its interval, log loss, calibration error."""
    from accord.reward.training import calibration

    return *mean(right(gaps), luck), float(np.logaddexp(0, -gaps).mean()), calibration(gaps, np.ones(len(gaps)))[1]


def states_of(reward, groups, label):
    """(N,H) what the head reads of every answer, before any layer is trained."""
    import torch

    from accord.progress import bar

    out = []
    with bar(label, len(groups)) as progress:
        for start in range(0, len(groups), 32):
            some = groups[start : start + 32]
            out.append(reward.states(reward.encode([c for g in some for c in g.completions])))
            progress.advance(len(some))
    return torch.cat(out)


def probe_gaps(groups, states, inside, outside, added=None):
    """What ``accord reward --epochs 0`` gives (tests/test_reward.py, test_no_epochs_are_the_probe_alone), from states that are there."""
    from accord.reward.probe import fit_probe

    rows = [2 * i + k for i in inside for k in (0, 1)]
    probe = fit_probe(states[rows], [groups[i] for i in inside], list(range(0, len(rows), 2)), None if added is None else added[rows])
    return gaps_of(groups, (states @ probe.weight).tolist())[outside]


def trained_gaps(reward, settings, groups, encoded, inside, outside):
    from accord.nn.budget import TokenBudget
    from accord.reward.training import Fit

    Fit(reward, [groups[i] for i in inside], settings).run(encoded.subset(inside), encoded.subset(outside))
    scores = encoded.subset(outside).each(reward.raw_scores, TokenBudget(8192)).tolist()
    return gaps_of([groups[i] for i in outside], scores)


def measure(name, path, finetune, settings):
    from accord.nn.budget import TokenBudget
    from accord.reward.model import RewardModel
    from accord.reward.training import Encoded
    from accord.rollout.policy import Policy

    groups, prompts = hh(path)
    fold, policy = folds_of(prompts), Policy.load(MODEL)
    new = lambda: RewardModel.on(policy, settings.top_layers)
    states = states_of(new(), groups, f"States, {name}")
    lengths = [len(c.text) for g in groups for c in g.completions]
    found = {
        "the longer one wins": np.sign(gaps_of(groups, lengths)).astype(float),
        "TF-IDF, Bradley-Terry": tfidf(groups, fold),
        PEER: peer_probe(groups, states.numpy(), fold),
        "accord reward --epochs 0": np.zeros(len(groups)),
    }
    if finetune:
        encoded = Encoded.of(new(), groups, f"Trunk, {name}", TokenBudget(8192), "")
        found["accord reward"] = np.full(len(groups), np.nan)
    for k in range(FOLDS):
        inside, outside = (np.flatnonzero(some).tolist() for some in (fold != k, fold == k))
        found["accord reward --epochs 0"][outside] = probe_gaps(groups, states, inside, outside)
        if k < finetune:
            found["accord reward"][outside] = trained_gaps(new(), settings, groups, encoded, inside, outside)
    return found


def table(name, found, luck):
    peer = found[PEER]
    lines = [
        f"## {name.capitalize()}: {len(peer):,} pairs", "",
        "| | accuracy, 95% interval | minus the logistic regression | log loss | calibration error | folds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for label, gaps in found.items():
        have = ~np.isnan(gaps)
        value, low, high, loss, error = told(gaps[have], luck)
        by, least, most = mean(right(gaps[have]) - right(peer[have]), luck)
        besides = f"{100 * by:+.1f} [{100 * least:+.1f}, {100 * most:+.1f}] points" if gaps is not peer else ""
        fits = label != "the longer one wins"
        lines.append(
            f"| {label} | {value:.3f} [{low:.3f}, {high:.3f}] | {besides} | {f'{loss:.3f}' if fits else ''} | {f'{error:.3f}' if fits else ''} | "
            f"{FOLDS if have.all() else '1 of 5' if have.mean() < 0.3 else 'some'} |"
        )
    return [*lines, ""]


def length_control(settings, train=1600, test=1000):
    """Trained on pairs of which the longer one wins most, told on as many of either kind; with the length control and without."""
    import torch

    from accord.data.records import Completion, Pair, PairGroup, Prompt
    from accord.reward.comparison import length_slope
    from accord.reward.model import RewardModel
    from accord.rollout.policy import Policy

    with gzip.open(VOTES, "rt") as handle:
        rows = [r for r in map(json.loads, handle) if r["gold"] in ("a1", "a2") and len(r["a1"]) != len(r["a2"])]
    debate = lambda r: r["topic"].split("_")[0]  # behind it is which side its arguments take
    random.Random(0).shuffle(rows)
    held = set(sorted({debate(r) for r in rows})[::3])
    train_rows, test_rows = [r for r in rows if debate(r) not in held], [r for r in rows if debate(r) in held]
    longer = lambda r: (len(r["a1"]) > len(r["a2"])) == (r["gold"] == "a1")
    half = min(test // 2, sum(map(longer, test_rows)), sum(not longer(r) for r in test_rows))
    balanced = [r for r in test_rows if longer(r)][:half] + [r for r in test_rows if not longer(r)][:half]
    kept = train_rows[:train]

    def group(r):
        prompt = Prompt(r["id"], f"{debate(r).replace('-', ' ').capitalize()}?")
        better = 0 if r["gold"] == "a1" else 1
        return PairGroup(
            prompt, tuple(Completion(prompt, r[a], True, k) for k, a in enumerate(("a1", "a2"))), (Pair(better, 1 - better, 1.0),), ()
        )

    groups = [group(r) for r in [*kept, *balanced]]
    reward = RewardModel.on(Policy.load(MODEL), settings.top_layers)
    states = states_of(reward, groups, "States, arguments")
    inside, outside = list(range(len(kept))), list(range(len(kept), len(groups)))
    tokens = [[len(reward.tokenizer.encode_completion(c.text, True)) for c in g.completions] for g in groups]
    slope = length_slope([groups[i] for i in inside], tokens[: len(kept)])
    explained = slope * torch.tensor(tokens).flatten().log()
    characters = gaps_of(groups, [len(c.text) for g in groups for c in g.completions])[outside]
    found = {}
    for control in (False, True):
        gaps = probe_gaps(groups, states, inside, outside, explained if control else None)
        found[control] = (right(gaps), np.mean((gaps > 0) == (characters > 0)))
    dice, share = np.random.default_rng(0), np.mean([longer(r) for r in kept])
    sides = (2 * share - 1) * np.repeat([1.0, -1.0], half)  # as they come minus balanced is the mean of this, times what is right
    as_they_come = lambda correct: share * correct[:half].mean() + (1 - share) * correct[half:].mean()
    points = lambda values: "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * x for x in mean(values, dice)))
    lines = [
        "## Length", "",
        f"UKPConvArg1: {len(kept):,} pairs of arguments to train on, in {share:.0%} of which the longer one is preferred; told on {len(balanced):,} of other "
        f"debates, in half of which it is. `accord reward --epochs 0`, with `--length-control` and without:", "",
        f"| | the longer one has the higher score | where it is right | where the shorter one is | {share:.0%} longer | half longer, 95% interval | lost |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for control, (correct, follows) in found.items():
        value, low, high = mean(correct, dice)
        lines.append(
            f"| {'with' if control else 'without'} length control | {follows:.1%} | {correct[:half].mean():.3f} | {correct[half:].mean():.3f} | {as_they_come(correct):.3f} | {value:.3f} [{low:.3f}, {high:.3f}] | {points(-sides * correct)} |"
        )
    (plain, _), (controlled, _) = found[False], found[True]
    return [
        *lines, "",
        f"From where {share:.0%} are longer to where half are, the model with the control keeps {points(sides * (plain - controlled))} more of its accuracy than the one without (paired bootstrap); there its accuracy is {points(controlled - plain)} beside the other's.", "",
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", type=int, default=0, choices=range(FOLDS + 1), help="folds in which the layers are trained, too [0]")
    arguments = parser.parse_args()
    if not all(path.exists() for path in (*SETS.values(), VOTES)):
        sys.exit(f"{DATA} is not there; this benchmark needs it.")
    from accord.reward.settings import RewardSettings

    settings, luck = RewardSettings(), np.random.default_rng(0)
    lines = [
        "# The reward model on real preferences", "",
        f"Anthropic HH (MIT), five folds by prompt, the bundled 135M model; accord {version('accord')}, torch {version('torch')}, Python {platform.python_version()}. Made by "
        f"`python bench/preferences.py{f' --finetune {arguments.finetune}' if arguments.finetune else ''}`.", "",
    ]  # fmt: skip
    for name, path in SETS.items():
        lines += table(name, measure(name, path, arguments.finetune, settings), luck)
    lines += length_control(settings)
    PAGE.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
