"""Time to a held-out reward at no higher KL: accord's PPO as the demo runs it, and TRL's, with the demo's reward model.

TRL is given six times accord's time. Its learning rate is the better of its default and three times that on the first seed.
"""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
GAIN, TIMES, SEEDS = 0.7, 6.0, (0, 1, 2)
RATES = (3e-6, 1e-5)


def prompts():
    """Texts of the demo's training prompts, and of 64 held-out ones."""
    from algorithms import demo_prompts

    return [[p.content for p in some] for some in demo_prompts()]


def first_there(curve):
    """(seconds, KL) of the first measurement that is GAIN above the start, or None."""
    return next(((seconds, kl) for seconds, score, kl in curve if score >= curve[0][1] + GAIN), None)


def tasks(model):
    from accord.text.tokenizer import Tokenizer

    reward = ROOT / "runs/demo/reward"
    if not reward.is_dir():
        raise SystemExit("runs/demo/reward is missing: run make demo first.")
    about = json.loads((reward / "accord.json").read_text())
    train, held = prompts()
    tokenizer = Tokenizer.load(Path(model))
    common = {"reward": str(reward), "temperature": 0.8, "response": 48, "kl_coef": 0.05}
    ids = {"train": [tokenizer.encode_prompt(t) for t in train], "held": [tokenizer.encode_prompt(t) for t in held]}
    ours = {**common, "what": "reach", "steps": 24, "gain": GAIN}
    scales = {"mean": about["mean"], "scale": about["scale"], "bias": about["head_bias"]}
    return ours, {**common, **ids, **scales, "rows": 32, "minibatches": 2}


def lines(measure, model):
    """A Markdown section. ``measure(script, task, model)`` runs one program."""
    ours, theirs = tasks(model)
    found, rate = [], None
    for seed in SEEDS:
        mine = measure("ours.py", {**ours, "seed": seed}, model)["curve"]
        there = first_there(mine)
        limit = TIMES * (there or mine[-1])[0]
        tried = {}
        for learning_rate in RATES if rate is None else (rate,):
            tried[learning_rate] = measure("peers/reach.py", {**theirs, "seed": seed, "limit": limit, "learning_rate": learning_rate}, model)["curve"]  # fmt: skip
        rate = rate or max(tried, key=lambda r: max(score for _, score, _ in tried[r]))
        found.append((seed, mine, there, tried[rate]))
        print(f"reach, seed {seed}: accord {mine}; TRL at {rate:g} {tried[rate]}", flush=True)
    out = [
        f"Gain of {GAIN} in the demo's reward model (in its standard deviations) on 64 held-out prompts; measuring is not in the time.",
        "", "| seed | accord: seconds, KL | TRL 1.12.0: seconds, KL | times faster |", "|---|---|---|---|",
    ]  # fmt: skip
    ratios = []
    for seed, mine, there, curve in found:
        peer, best = first_there(curve), max(curve, key=lambda point: point[1])
        told = f"{there[0]:.0f} s, {there[1]:.1f} nats" if there else f"not within {mine[-1][0]:.0f} s"
        if peer:
            other = f"{peer[0]:.0f} s, {peer[1]:.1f} nats"
        else:
            other = f"not within {curve[-1][0]:.0f} s (best {best[1] - curve[0][1]:+.2f} at {best[0]:.0f} s, {best[2]:.1f} nats)"
        ratio = (peer or curve[-1])[0] / there[0] if there else float("nan")
        ratios.append(ratio)
        out.append(f"| {seed} | {told} | {other} | {'' if peer else 'more than '}{ratio:.1f} |")
    return [*out, "", f"Median {statistics.median(ratios):.1f}. TRL: 32 completions an iteration, 4 epochs of 2 minibatches, learning rate {rate:g} (of {', '.join(f'{r:g}' for r in RATES)}), weights in float32 under bf16 autocast. accord: the demo's settings."]  # fmt: skip
