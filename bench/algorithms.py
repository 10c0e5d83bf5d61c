"""All algorithms on three tasks, with equal sample budgets and three seeds: docs/algorithms-compared.md and its chart.

    .venv/bin/python bench/algorithms.py                  # what is missing, two runs side by side, then table and chart
    .venv/bin/python bench/algorithms.py --only arithmetic ppo   # PPO's runs on sums; table of what is there

Tasks: sums of digits and tic-tac-toe, learned from nothing by a small transformer; and the demo's reward model with
SmolLM2-135M (needs runs/demo, from ``make demo``). Every run is a folder in runs/bench-algorithms/ and has one thread to itself.
ILQL, which learns offline, gets the completions of PPO's run with the same seed: the same number, and none of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
RUNS, TABLE, CHART = ROOT / "runs/bench-algorithms", ROOT / "docs/algorithms-compared.md", ROOT / "docs/algorithms-compared.svg"
ALGORITHMS = ("ppo", "ppo-penalty", "grpo", "rloo", "reinforce", "a2c", "trpo", "nlpo", "dqn", "ilql")
SEEDS = (0, 1, 2)

SCRATCH = dict(kl_coef=0.0, kl_warn=1e9, truncation="nothing", dtype="float32", rows=512, warmup_steps=2, checkpoint_every=1000,
               learning_rate=1e-3, critic_learning_rate=1e-3, entropy_coef=0.01, value_clip=None)  # fmt: skip
TASKS = {
    "arithmetic": dict(title="sums of two digits", per_step=128, settings={**SCRATCH, "max_steps": 60}),
    "tictactoe": dict(title="tic-tac-toe against a random opponent", per_step=256, settings={**SCRATCH, "max_steps": 60, "entropy_coef": 0.05, "learning_rate": 5e-4}),
    "reward": dict(title="the demo's reward model, SmolLM2-135M", per_step=64, settings=dict(
        top_layers=4, max_new_tokens=48, temperature=0.8, truncation="nothing", kl_coef=0.05, learning_rate=1e-4, checkpoint_every=1000,
        micro_batch_tokens=2048, max_steps=12, kl_warn=1e9,
    )),
}  # fmt: skip
OWN = {
    ("scratch", "ppo"): dict(minibatches=4, epochs=3),
    ("scratch", "ppo-penalty"): dict(minibatches=4, epochs=3),
    ("scratch", "nlpo"): dict(minibatches=4, epochs=3, mask_top_p=0.99),
    ("scratch", "grpo"): dict(minibatches=4, epochs=3, kl_in="reward"),
    ("scratch", "reinforce"): dict(learning_rate=2e-3, whiten_advantages=True),
    ("scratch", "rloo"): dict(learning_rate=2e-3),
    ("scratch", "a2c"): dict(learning_rate=2e-3, critic_learning_rate=2e-3),
    ("scratch", "trpo"): dict(trust_region=0.02, cg_iterations=6),
    ("scratch", "dqn"): dict(q_scale=0.02, n_step=2, replay_steps=16, target_every=2, epochs=4),
    ("scratch", "ilql"): dict(q_scale=0.1, expectile=0.9, epochs=2, n_step=1, target_every=2),
    ("reward", "reinforce"): dict(learning_rate=3e-4, whiten_advantages=True),
    ("reward", "rloo"): dict(learning_rate=3e-4),
    ("reward", "a2c"): dict(learning_rate=3e-4),
    ("reward", "grpo"): dict(epochs=2),
    ("reward", "trpo"): dict(trust_region=0.02, cg_iterations=5),
    ("reward", "dqn"): dict(n_step=48, q_scale=0.1),
    ("reward", "ilql"): dict(n_step=48, q_scale=0.1),
}


BEST = dict(learning_rate=3e-4, critic_learning_rate=1e-3, minibatches=4, epochs=4, entropy_coef=0.1, gae_lambda=0.8,
            prompts_per_step=512, max_steps=500)  # fmt: skip
"""Tic-tac-toe to strength: PPO against ``tictactoe-mixed``."""


def settings_of(task, name, seed):
    """Every algorithm samples ``per_step`` completions a step: in groups of four where it compares them, else one a prompt."""
    from accord.rl.registry import ALGORITHMS as SPECS

    spec, kind = SPECS[name], "reward" if task == "reward" else "scratch"
    given = {**TASKS[task.removesuffix("-mixed")]["settings"], **OWN.get((kind, name), {}), "algorithm": name, "seed": seed}
    each = 4 if spec.advantages[0] in ("leave_one_out", "group") else 1
    given |= {"completions_per_prompt": each, "prompts_per_step": TASKS[task.removesuffix("-mixed")]["per_step"] // each}
    given |= BEST if task == "tictactoe-mixed" else {}
    return {k: v for k, v in given.items() if k not in spec.unused}


def run(task, name, seed):
    """One run, in this process: train, then measure against the start; writes result.json into the run's folder."""
    import torch

    torch.set_num_threads(1)
    from accord.api import load_start, train_rl
    from accord.disk import read_lines
    from accord.rollout.environments import make_environment

    folder, settings = RUNS / f"{task}-{name}-{seed}", settings_of(task, name, seed)
    given = {}
    if task == "reward":
        start = load_start("smollm2-135m-instruct", "auto", None)
        prompts, held = demo_prompts()
        given = dict(prompts=prompts, reward=str(ROOT / "runs/demo/reward"), validation=[])
    else:
        world = make_environment(task)
        start = load_start("scratch", "float32", world)
        given = dict(environment=world, validation=[])
    if name == "ilql":
        given["completions"] = RUNS / f"{task}-ppo-{seed}" / "completions.jsonl"
        budget = TASKS[task]["per_step"] * TASKS[task]["settings"]["max_steps"]
        assert len(read_lines(given["completions"])) == budget, "PPO's run must be there, whole"
        given.pop("prompts", None)
        given.pop("validation")
        if task == "reward":
            given.pop("reward")
    outcome = train_rl(start, out=folder, **given, **settings)
    metrics = [m for m in read_lines(folder / "metrics.jsonl") if "score" in m]
    timings = read_lines(folder / "timings.jsonl")
    seconds = np.cumsum([sum(t[part] for part in ("rollout", "score", "update")) for t in timings])
    measured = measure_texts(outcome.policy, start, held) if task == "reward" else measure_play(outcome.policy, start, task)
    curve = [[m["step"], m["score"], m["kl"], s] for m, s in zip(metrics, seconds.tolist(), strict=True)]
    (folder / "result.json").write_text(json.dumps({"task": task, "algorithm": name, "seed": seed, "curve": curve, **measured}))


def demo_prompts():
    """The demo's training prompts, and some of its held-out ones."""
    from accord.data.records import split_of
    from accord.data.sources import read_prompts

    prompts = read_prompts(ROOT / "accord/recipes/prompts.jsonl")
    return [p for p in prompts if split_of(p.id) == "train"], [p for p in prompts if split_of(p.id) == "heldout"][:64]


def measure_play(policy, start, task):
    """Rewards of 1000 episodes of each, sampled at temperature 1; in tic-tac-toe also what greedy play loses."""
    from accord.api import play_episodes

    totals = [play_episodes(p, task, 1000).step_rewards.sum(-1) for p in (policy, start)]
    out = {"after": totals[0].tolist(), "before": totals[1].tolist()}
    if task.startswith("tictactoe"):
        for against, opponent in (("random", "tictactoe"), ("perfect", "tictactoe-perfect")):
            out[f"lost_{against}"] = float((play_episodes(policy, opponent, 5000, 0.0).step_rewards.sum(-1) < 0).float().mean())
        out |= from_positions(policy)
    return out


def from_positions(policy):
    """Greedy play against minimax from every won or drawn position, the policy to move, that its own play can reach.

    Whatever the opponent does is followed. A position counts as lost if one of four games from it is lost; minimax draws
    among its best moves by luck.
    """
    from accord.data.records import Prompt
    from accord.rollout.engine import Engine
    from accord.rollout.environments import make_environment
    from accord.rollout.environments.tictactoe import free, other, put, value, winner
    from accord.rollout.episodes import play
    from accord.rollout.sampling import Sampling

    engine, world, out = Engine(policy, 512), make_environment("tictactoe-perfect"), {}

    def lost(texts):
        prompts = [Prompt(text, text) for text in texts]
        rewards = play(engine, world, prompts, 4, Sampling(0.0)).step_rewards.sum(-1).view(-1, 4)
        return float((rewards < 0).any(-1).float().mean())

    kept = []
    own = {mark: [("", "." * 9, "X")] for mark in "XO"}  # what the policy's own play reaches, as the text of the game
    for me in "XO":
        while own[me]:
            mine = [(t, b) for t, b, mover in own[me] if mover == me]
            kept += [f"{t}{me}" for t, b in mine if value(b, me) >= 0]
            answers = (
                engine.go_on(
                    [policy.tokenizer.encode_prompt(f"{t}{me}") for t, _ in mine], [t for t, _ in mine], Sampling(0.0, max_new_tokens=1)
                )
                if mine
                else []
            )
            chosen = [policy.tokenizer.decode(tokens) for tokens, _, _ in answers]
            following = [
                (f"{t}{me}{c}", put(b, int(c), me), other(me)) for (t, b), c in zip(mine, chosen, strict=True) if c in map(str, free(b))
            ]
            following += [(f"{t}{mover}{c}", put(b, c, mover), me) for t, b, mover in own[me] if mover != me for c in free(b)]
            own[me] = [(t, b, m) for t, b, m in following if winner(b) is None and free(b)]
    out["lost_reached"], out["reached"] = lost(sorted(set(kept))), len(set(kept))
    return out


def measure_texts(policy, start, held):
    """Scores of a completion of each held-out prompt, with the same luck."""
    from accord.reward.sources import build_reward
    from accord.rollout.engine import Engine
    from accord.rollout.sampling import Sampling

    reward, sampling = build_reward(str(ROOT / "runs/demo/reward"), start), Sampling(0.8, max_new_tokens=48, seed=10**6)
    return {
        name: reward(Engine(p).sample(held, 1, sampling, keep_trunk=True)).total.tolist()
        for name, p in (("after", policy), ("before", start))
    }


def estimate(results):
    """Gain over the start and half its 95% interval: Student's t over seeds; of one seed, over its episodes or prompts."""
    from scipy.stats import t

    gains = [np.mean(r["after"]) - np.mean(r["before"]) for r in results]
    if len(gains) > 1:
        return float(np.mean(gains)), float(t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / len(gains) ** 0.5)
    noise = sum(np.var(results[0][k]) / len(results[0][k]) for k in ("after", "before"))
    return float(gains[0]), float(1.96 * noise**0.5)


def seeds_of(found, task):
    """How many seeds the table rests on."""
    counts = [len(found.get((task, name), [])) for name in ALGORITHMS]
    return f"{counts[0]} seeds" if len(set(counts)) == 1 else f"seeds by algorithm: {', '.join(map(str, counts))}"


def load():
    found = {}
    for path in sorted(RUNS.glob("*/result.json")):
        r = json.loads(path.read_text())
        found.setdefault((r["task"], r["algorithm"]), []).append(r)
    return found


def table(found):
    from seeds import processor

    lines = ["# Algorithms compared", "", "![reward against wall-clock and against KL](algorithms-compared.svg)", ""]
    for task, about in TASKS.items():
        s = about["settings"]
        budget = f"{s['max_steps']} steps of {about['per_step']} completions"
        measured = f"; {seeds_of(found, task)}" if any((task, name) in found for name in ALGORITHMS) else ""
        lines += [f"## {about['title'][0].upper()}{about['title'][1:]}", "", f"{budget}{measured}.", ""]
        if not any((task, name) in found for name in ALGORITHMS):
            lines += ["Not measured here yet: thirty runs of some six minutes each.", ""]
            continue
        extra = task == "tictactoe"
        head = ["algorithm", "reward: start → end", "gain [95%]", "KL (nats a completion)", "seconds"]
        head += ["greedy play loses to random", "to perfect"] if extra else []
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in ALGORITHMS:
            results = found.get((task, name))
            if not results:
                continue
            gain, half = estimate(results)
            before, after = (np.mean([np.mean(r[k]) for r in results]) for k in ("before", "after"))
            last = np.mean([r["curve"][-1][2:] for r in results], axis=0)
            cells = [
                f"`{name}`",
                f"{before:.2f} → {after:.2f}",
                f"{gain:+.2f} [{gain - half:+.2f}, {gain + half:+.2f}]",
                f"{last[0]:.1f}",
                f"{last[1]:.0f}",
            ]
            if extra:
                cells += [f"{np.mean([r[k] for r in results]):.1%}" for k in ("lost_random", "lost_perfect")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        best = found.get(("tictactoe-mixed", "ppo")) if extra else None
        if best:
            b = best[0]
            lines += [
                f"To strength: `ppo` for {BEST['max_steps']} steps of {BEST['prompts_per_step']} games against `tictactoe-mixed` ({b['curve'][-1][3] / 60:.0f} minutes).",
                f"Playing greedily it loses {b['lost_random']:.1%} of 5000 games to the random opponent and {b['lost_perfect']:.1%} to minimax. From the",
                f"{b['reached']} won or drawn positions that its own play can reach, whatever the other side does, minimax beats it in {b['lost_reached']:.1%}.",
                "",
            ]
    lines += [
        "Reward and gain are of the policy after training, sampled at the training temperature: 1000 episodes, or 64 held-out prompts.",
        "Intervals are Student's t over seeds; the scratch model starts from the same weights in all of them. Seconds are those of rollout,",
        "scoring and update on one thread. KL is estimated as the run does it (k1; GRPO k3; ILQL exactly, on the log). `ilql` learns from the",
        "completions of `ppo`'s runs. Settings are in `bench/algorithms.py`; they were chosen once for each algorithm, not searched.",
        "",
        f"{processor()}, {os.cpu_count()} cores, one thread a run; torch {version('torch')}. Made by `make bench-algorithms`.",
    ]
    return "\n".join(lines) + "\n"


COLORS = ("#1b6ca8", "#7fb3d5", "#2e8b57", "#8fce9f", "#c0392b", "#e59866", "#7d3c98", "#c39bd3", "#4d5656", "#b7950b")


def chart(found):
    """A row of two for each task: reward against seconds and against KL, mean over seeds, smoothed over five steps."""
    from accord.data.charts import nice_ticks

    wide, high, left, top = 430, 230, 52, 46
    shown = {task: about for task, about in TASKS.items() if any((task, name) in found for name in ALGORITHMS)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * wide} {len(shown) * high + top}" font-family="sans-serif" font-size="11">',
        f'<rect width="{2 * wide}" height="{len(shown) * high + top}" fill="white"/>',
    ]
    for i, name in enumerate(ALGORITHMS[:-1]):  # ILQL samples nothing, so it has no such curve
        x = 20 + i * 84
        parts.append(f'<rect x="{x}" y="12" width="12" height="4" fill="{COLORS[i]}"/><text x="{x + 16}" y="18">{name}</text>')
    for row, (task, about) in enumerate(shown.items()):
        curves = {
            n: smooth(np.mean([r["curve"] for r in found[task, n]], axis=0)) for n in ALGORITHMS if (task, n) in found and n != "ilql"
        }
        if not curves:
            continue
        ys = np.concatenate([c[:, 1] for c in curves.values()])
        ticks = nice_ticks(float(ys.min()), float(ys.max()))
        for column, (which, label) in enumerate(((3, "seconds"), (2, "KL to the start, nats a completion"))):
            x0, y0, w, h = column * wide + left, top + row * high + 22, wide - left - 16, high - 66
            right = max(float(np.quantile(c[:, which], 0.99)) for c in curves.values())
            at = lambda x, y, x0=x0, y0=y0, w=w, h=h, right=right, ticks=ticks: (
                x0 + min(x / right, 1) * w, y0 + (ticks[-1] - y) / (ticks[-1] - ticks[0]) * h,
            )  # fmt: skip
            if column == 0:
                parts.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{about["title"]}: reward</text>')
            for tick in ticks:
                y = at(0, tick)[1]
                parts.append(f'<line x1="{x0}" x2="{x0 + w}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
                parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
            for tick in nice_ticks(0, right):
                if tick <= right:
                    parts.append(f'<text x="{at(tick, 0)[0]:.1f}" y="{y0 + h + 14}" text-anchor="middle">{tick:g}</text>')
            parts.append(f'<text x="{x0 + w}" y="{y0 + h + 28}" text-anchor="end" fill="#555">{label}</text>')
            for name, c in curves.items():
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p[which], p[1]) for p in c))
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{COLORS[ALGORITHMS.index(name)]}" stroke-width="1.6"><title>{name}</title></polyline>'
                )
    return "".join([*parts, "</svg>\n"])


def smooth(curve, over=5):
    kernel = np.ones(over) / over
    return np.stack([np.convolve(np.pad(c, (over // 2, over // 2), mode="edge"), kernel, "valid") for c in curve.T], axis=1)


def finished(task, name, seed):
    """Whether this run is there, with the settings that stand in this file now."""
    import yaml

    folder = RUNS / f"{task}-{name}-{seed}"
    if not (folder / "result.json").exists():
        return False
    used = yaml.safe_load((folder / "config.yaml").read_text())["rl"]
    return all(used[k] == v for k, v in settings_of(task, name, seed).items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="a task, an algorithm, a seed: runs that are all of these")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return run(arguments.one[0], arguments.one[1], int(arguments.one[2]))
    RUNS.mkdir(parents=True, exist_ok=True)
    todo = [("tictactoe-mixed", "ppo", 0), *((t, n, s) for t in TASKS for s in SEEDS for n in ALGORITHMS)]
    todo = [(t, n, s) for t, n, s in todo if all(w in (t, n, str(s)) for w in arguments.only)]
    todo = [key for key in todo if not finished(*key)]
    if any(t == "reward" for t, _, _ in todo) and not (ROOT / "runs/demo/reward").is_dir():
        sys.exit("runs/demo/reward is missing: run make demo first.")

    def start(key):
        folder = RUNS / "-".join(map(str, key))
        subprocess.run(["rm", "-rf", str(folder)], check=True)  # cut by something
        with open(RUNS / f"{folder.name}.log", "w") as log:
            command = [sys.executable, __file__, "--one", *map(str, key)]
            code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log).returncode
        print(f"{folder.name}: {'done' if code == 0 else f'FAILED, see {log.name}'}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        running = {}

        def ready(key):  # ILQL reads the completions of PPO's run
            if key[1] == "ilql" and (before := running.get((key[0], "ppo", key[2]))):
                before.result()
            start(key)

        for key in todo:
            running[key] = pool.submit(ready, key)
        for future in running.values():
            future.result()
    found = load()
    TABLE.write_text(table(found))
    CHART.write_text(chart(found))
    print(table(found))


if __name__ == "__main__":
    main()
