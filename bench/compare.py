"""Side by side with what people use, on this machine: bench/RESULTS.md.

    make bench                                   # all cases, three rounds
    python bench/compare.py --only decode        # those whose name has this word
    python bench/compare.py --rounds 1 --quick   # to see that everything runs

A case is a piece of work and the programs that do it, each in a process of its own. A round runs all of a case's
programs one after the other; ratios are taken within a round, so that what else the machine does falls on both sides.
Results are kept in build/bench/results.json, and a case that is measured again replaces its numbers.
The peers live in their own environment, build/bench/peers, which is made here.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import alone  # noqa: E402

HOME, TABLE = ROOT / "build/bench", ROOT / "bench/RESULTS.md"
RESULTS, PYTHON = HOME / "results.json", HOME / "peers/bin/python"
PEERS = ["torch==2.13.0", "transformers==5.17.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2"]
OLD = HOME / "trl-1.12.0"  # the last release with PPO, beside the current one
BATCHES = (1, 16, 64)
ALONE = {"growth": "How accord grows", "floor": "How far above the machine's floor accord is"}

PPO = dict(prompts_per_step=32, completions_per_prompt=1, epochs=4, minibatches=2)
GROUP = dict(prompts_per_step=8, completions_per_prompt=4, epochs=1, minibatches=1)
FULL = dict(adaptation="full", top_layers=30)


def cases(quick):
    """name -> (what it is, {program: (its script, its task)}). The first program is ours, the others are what it is measured against."""
    steps = 1 if quick else 2
    out = {}
    for way in ("same", "int8"):
        ours = ("ours.py", {"what": "decode", "rows": BATCHES, "weights": way})
        peers = {f"generate, {w}": ("peers/generate.py", {"way": w, "rows": BATCHES}) for w in ("plain", "static", "compiled")}
        out[f"decode-{way}"] = (
            f"A decoding step, {'bf16 weights' if way == 'same' else 'int8 weights (its tokens are weighted by the ratio to bf16)'}",
            {"accord": ours, **(peers if way == "same" else {"generate, plain": peers["generate, plain"]})},
        )

    def ours(settings, reward_layers=0):
        return "ours.py", {"what": "iteration", "settings": settings, "reward_layers": reward_layers, "steps": 3 * steps}

    trl = ("peers/ppo.py", {"steps": steps, "epochs": 4, "minibatches": 2})
    every = "TRL 1.12.0, every weight of policy and value model"
    out["ppo-full"] = (
        "A PPO iteration, full fine-tuning",
        {"accord, every layer of policy and critic": ours({**PPO, **FULL}, 30), every: trl},
    )
    out["ppo-default"] = (
        "A PPO iteration, accord's defaults",
        {"accord, six layers of policy, critic and reward model on one trunk": ours(PPO, 6), every: trl},
    )
    lora = ("peers/ppo.py", {**trl[1], "lora": True})
    out["ppo-lora"] = (
        "A PPO iteration with LoRA",
        {
            "accord, adapters on the policy, six layers of the critic": ours({**PPO, "adaptation": "lora"}, 6),
            "TRL 1.12.0, adapters on the policy, every weight of the value model": lora,
        },
    )
    for name in ("rloo", "grpo"):
        group = {**GROUP, "algorithm": name}
        peer = {"TRL 1.16.0, every weight": ("peers/group.py", {"algorithm": name, "steps": 2 * steps})}
        out[f"{name}-full"] = (f"{name.upper()}: an iteration, full fine-tuning", {"accord, every weight": ours({**group, **FULL}), **peer})
        out[f"{name}-default"] = (f"{name.upper()}: an iteration, accord's defaults", {"accord, six layers": ours(group), **peer})
    for name, layers, who in (("full", 30, "every layer"), ("default", 6, "six layers on a kept trunk")):
        out[f"reward-{name}"] = (
            f"Reward model, {'full fine-tuning' if name == 'full' else 'accord defaults'}: five steps of 16 pairs",
            {
                f"accord, {who}": ("ours.py", {"what": "reward", "pairs": 96, "batch": 16, "layers": layers}),
                "TRL 1.16.0, every weight": ("peers/reward.py", {"pairs": 96, "batch": 16}),
            },
        )
    return out


def peers():
    """Their own environment, made once."""
    if not PYTHON.exists():
        print("Installing the peers into build/bench/peers (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(HOME / "peers")], check=True)
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", *PEERS], check=True)
    if not OLD.exists():
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(OLD), "trl==1.12.0"], check=True)


def measure(script, task, model):
    """Run one program; its numbers, or why there are none."""
    ours = script == "ours.py"
    environment = {**os.environ, "PYTHONPATH": str(OLD) if script.endswith("ppo.py") else "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip
    if ours:
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable if ours else str(PYTHON), str(ROOT / "bench" / script), json.dumps({**task, "model": model})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        (HOME / "failed.log").write_text(done.stdout + done.stderr)
        sys.exit(f"{script} {task} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def commit():
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "an unknown commit"


def summary(values):
    """Median and the range it comes from."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def table(results):
    from demo import processor

    lines = [
        "# accord beside what people use",
        "",
        "Ratios are the peer's time over accord's in the same round: median [least, most]; above 1, accord is faster.",
        "",
    ]
    for name, case in results.items():
        lines += [f"## {case['title']}", ""]
        if "lines" in case:
            lines += [*case["lines"], "", f"<sub>{case['when']}.</sub>", ""]
            continue
        rounds, names = case["rounds"], list(case["rounds"][0])
        if name.startswith("decode"):
            lines += [
                "| rows | " + " | ".join(f"{n}: ms a step" for n in names) + " | " + " | ".join(f"ratio to {n}" for n in names[1:]) + " |"
            ]
            lines += ["|---" * (2 * len(names)) + "|"]
            for rows in rounds[0][names[0]]["seconds"]:
                times = {n: [1000 * r[n]["seconds"][rows] for r in rounds] for n in names}
                ratios = [[theirs / mine for mine, theirs in zip(times[names[0]], times[n], strict=True)] for n in names[1:]]
                cells = [f"{statistics.median(times[n]):.1f}" for n in names] + [summary(r) for r in ratios]
                lines += [f"| {rows} | " + " | ".join(cells) + " |"]
            lines += [
                "",
                "Peak memory: " + ", ".join(f"{n} {statistics.median(r[n]['memory'] for r in rounds):.1f} GB" for n in names) + ".",
            ]
        else:
            lines += ["| program | seconds | ratio | peak memory, GB | memory to accord's |", "|---|---|---|---|---|"]
            mine = [r[names[0]] for r in rounds]
            for n in names:
                theirs = [r[n] for r in rounds]
                ratio, memory = ([t[k] / m[k] for t, m in zip(theirs, mine, strict=True)] for k in ("seconds", "memory"))
                lines += [
                    f"| {n} | {summary([t['seconds'] for t in theirs])} | {'' if n == names[0] else summary(ratio)} | "
                    f"{statistics.median(t['memory'] for t in theirs):.2f} | {'' if n == names[0] else f'{statistics.median(memory):.2f}'} |"
                ]
            if "parts" in mine[0]:
                parts = {k: statistics.median(m["parts"][k] for m in mine) for k in mine[0]["parts"]}
                lines += ["", "accord's seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()) + "."]
        lines += ["", f"<sub>{len(rounds)} rounds, {case['when']}.</sub>", ""]
    lines += [
        f"Work: SmolLM2-135M in bf16 (accord keeps trained weights in fp32, TRL in bf16 here), prompts of 41 tokens, completions of 48, 32 of them an iteration; "
        f"no token ends a completion. PPO: 4 epochs of 2 minibatches. {processor()}, {os.cpu_count()} cores; torch {version('torch')}, "
        "peers with transformers 5.17.0. Made by `make bench` (bench/compare.py); what each program runs is in bench/ours.py and bench/peers/.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name has one of these words")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer iterations a program; nothing is written")
    arguments = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    peers()
    from accord.nn.bundled import bundled_folder

    model = str(bundled_folder())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    order = [*cases(False), *ALONE]
    for name, (title, programs) in cases(arguments.quick).items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        rounds = []
        for number in range(arguments.rounds):
            rounds.append({})
            for program, (script, task) in programs.items():
                rounds[-1][program] = measure(script, task, model)
                print(f"{name} {number + 1}/{arguments.rounds}: {program} {rounds[-1][program]}", flush=True)
        results[name] = {"title": title, "rounds": rounds, "when": f"{datetime.date.today().isoformat()}, accord at {commit()}"}
        if not arguments.quick:
            RESULTS.write_text(json.dumps(results))
            TABLE.write_text(table({n: results[n] for n in order if n in results}))
    for name, title in ALONE.items():
        if (arguments.only and not any(word in name for word in arguments.only)) or arguments.quick:
            continue
        if name == "growth":
            lines = alone.growth(lambda task: measure("ours.py", task, model))
        elif not {"decode-same", "ppo-default"} <= results.keys():
            sys.exit("The floor needs the cases decode-same and ppo-default; measure them first.")
        else:
            decoding, ppo = (results[case]["rounds"] for case in ("decode-same", "ppo-default"))
            mine = next(iter(ppo[0]))
            steps = {rows: statistics.median(r["accord"]["seconds"][rows] for r in decoding) for rows in decoding[0]["accord"]["seconds"]}
            parts = {part: statistics.median(r[mine]["parts"][part] for r in ppo) for part in ppo[0][mine]["parts"]}
            lines = alone.floor(lambda task: measure("ours.py", task, model), steps, parts)
        results[name] = {"title": title, "lines": lines, "when": f"{datetime.date.today().isoformat()}, accord at {commit()}"}
        RESULTS.write_text(json.dumps(results))
        TABLE.write_text(table({n: results[n] for n in order if n in results}))
    print(table({n: results[n] for n in order if n in results}))


if __name__ == "__main__":
    main()
