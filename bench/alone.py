"""accord alone: how its time and memory grow, how far it is above what the machine could do, and that its fast paths learn the same."""

import statistics

import numpy as np

T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # Student's t, two sides, by degrees of freedom
SHAPES = ((8, 384, 6), (16, 576, 9), (30, 576, 9))  # layers, width, query heads


def growth_tasks():
    """name -> (unit, [(amount, task)]): one thing grows at a time, up to eight times, under accord's defaults for PPO."""

    def task(prompts=32, each=1, prompt=41, response=48, shape=None):
        settings = dict(prompts_per_step=prompts, completions_per_prompt=each, epochs=2, minibatches=2)
        asked = {"what": "iteration", "settings": settings, "prompt": prompt, "response": response, "steps": 2}
        return asked if shape is None else {**asked, "shape": shape}

    out = {
        "prompts": ("prompts", [(n, task(prompts=n)) for n in (32, 64, 128, 256)]),
        "completions a prompt": ("completions", [(n, task(prompts=8, each=n)) for n in (4, 8, 16, 32)]),
        "tokens a completion": ("tokens", [(n, task(response=n)) for n in (24, 48, 96, 192)]),
    }
    sizes = []
    for layers, width, heads in SHAPES:
        shape = dict(
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
        )
        sizes.append((weights(shape), task(shape=shape)))
    out["weights in the layers"] = ("millions", sizes)
    return out


def weights(shape):
    """Of all layers, in millions."""
    D, inner, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * 64
    return shape["num_hidden_layers"] * (2 * D * shape["num_attention_heads"] * 64 + 2 * D * kv + 3 * D * inner) / 1e6


def growth(measure):
    """A Markdown section. ``measure(task)`` runs one program."""
    lines = ["| what grows | amounts | seconds | exponent of time | peak memory, GB |", "|---|---|---|---|---|"]
    for name, (unit, points) in growth_tasks().items():
        got = [(amount, measure(task)) for amount, task in points]
        x, y = (np.log([value for value in values]) for values in zip(*((a, g["seconds"]) for a, g in got), strict=True))
        exponent = np.polyfit(x, y, 1)[0]
        join = lambda values, form: ", ".join(format(value, form) for value in values)
        seconds, memory = ([g[key] for _, g in got] for key in ("seconds", "memory"))
        amounts = f"{join([a for a, _ in got], '.3g')} {unit}"
        lines += [f"| {name} | {amounts} | {join(seconds, '.1f')} | {exponent:.2f} | {join(memory, '.2f')} |"]
        print(lines[-1], flush=True)
    lines += [
        "",
        "One PPO iteration (2 epochs of 2 minibatches, six layers on a frozen trunk); the exponent is the slope of log time over log amount.",
    ]
    return lines


def medians(rounds, program, key):
    """Of a program's named numbers, over the rounds."""
    return {k: statistics.median(r[program][key][k] for r in rounds) for k in rounds[0][program][key]}


def floor(measure, decoding, ppo, full):
    """A Markdown section: bytes and operations of each phase over the machine's rates. ``decoding``: rows -> seconds of a step;
    ``ppo``, ``full``: seconds of each part of an iteration (32 completions, 4 epochs), six layers and all of them."""
    rate = measure({"what": "rates"})
    layer, layers, D, V, kv = 3.54e6, 30, 576, 49152, 2 * 3 * 64
    body, head, top = layers * layer, V * D, 6 * layer
    lines = [
        f"This machine reads {rate['bandwidth'] / 1e9:.1f} GB a second and multiplies {rate['operations'] / 1e12:.2f} TFLOP a second in bf16.",
        "", "| phase | bytes | operations | floor | measured | times the floor |", "|---|---|---|---|---|---|",
    ]  # fmt: skip

    def row(name, read, operations, measured):
        least = max(read / rate["bandwidth"], operations / rate["operations"])
        cells = [name, f"{read / 1e9:.2f} GB", f"{operations / 1e9:.0f} GFLOP", f"{1000 * least:.0f} ms", f"{1000 * measured:.0f} ms"]
        lines.append("| " + " | ".join([*cells, f"{measured / least:.1f}"]) + " |")

    for rows, seconds in decoding.items():
        n = int(rows)
        row(f"a decoding step of {n} rows", 2 * (body + head) + 2 * n * 65 * layers * kv, 2 * n * (body + head), seconds)
    rows, width, new = 32, 89, 48
    step = max((2 * (body + head) + 2 * rows * 65 * layers * kv) / rate["bandwidth"], 2 * rows * (body + head) / rate["operations"])
    prefill = 2 * rows * 41 * body
    tokens, chosen = rows * (width - 1), rows * new  # the last token of a row is read by the reward model only
    for name, parts, part, matrix in (("six layers", ppo, top, 0), ("every layer", full, body, 1)):
        row(f"PPO, {name}: rollout", rate["bandwidth"] * step * new, prefill + rate["operations"] * step * new, parts["rollout"])
        row(f"PPO, {name}: scoring", 0, 2 * tokens * 4 * part + 2 * 2 * chosen * head, parts["score"])
        moved = 28 * 4 * 2 * (2 * part + matrix * head)  # what AdamW reads and writes of a weight, for 4 epochs of 2 minibatches
        row(f"PPO, {name}: update", moved, 4 * (6 * tokens * 2 * part + (4 + 4 * matrix) * chosen * head), parts["update"])
    return [*lines, "", "Operations are those of the matrix products; attention, norms and the vocabulary's softmax are not in the floor."]


def share(measure):
    """A Markdown section: the parts of an iteration that are matrix products, attention and neither."""
    full = dict(adaptation="full", top_layers=30)
    settings = dict(prompts_per_step=32, completions_per_prompt=1, epochs=4, minibatches=2)
    lines = ["| an iteration of PPO | seconds | matrix products | attention | the rest |", "|---|---|---|---|---|"]
    for name, own in (("six layers on a kept trunk", {}), ("every layer", full)):
        got = measure({"what": "share", "settings": {**settings, **own}, "reward_layers": own.get("top_layers", 6)})
        matrix, attention = got["matrix"] / got["seconds"], got["attention"] / got["seconds"]
        lines += [f"| {name} | {got['seconds']:.1f} | {matrix:.0%} | {attention:.0%} | {1 - matrix - attention:.0%} |"]
    return [*lines, "", "By torch's profiler and a clock around accord's own kernels; attention includes laying heads out in rows and collecting them."]  # fmt: skip


def curves(measure, task, seeds=range(6), steps=10):
    """A Markdown section: the demo's PPO with accord's kernels and with torch alone, score and KL every second step.

    ``task``: what the case ``reach`` gives accord.
    """
    found = {}
    for seed in seeds:
        for kernels in (True, False):
            got = measure({**task, "steps": steps, "gain": float("inf"), "seed": seed, "kernels": kernels})["curve"]
            found.setdefault(kernels, []).append(np.array(got))
            print(f"curves, seed {seed}, kernels {kernels}: {got}", flush=True)
    on, off = (np.array(found[kernels]) for kernels in (True, False))  # (seeds, measurements, (seconds, score, KL))
    lines = ["| steps | score: kernels | torch alone | KL: kernels | torch alone |", "|---" * 5 + "|"]
    for k in range(on.shape[1]):
        cells = [f"{side[:, k, column].mean():.3f} ± {side[:, k, column].std(ddof=1):.3f}" for column in (1, 2) for side in (on, off)]
        lines += [f"| {2 * k} | " + " | ".join(cells) + " |"]
    told = []
    for name, column in (("score", 1), ("KL", 2)):
        apart = (on - off)[:, 1:, column].mean(axis=1)  # of each seed, over the steps
        half = T_95[len(seeds) - 1] * apart.std(ddof=1) / len(seeds) ** 0.5
        told += [f"{name} {apart.mean():+.3f} [{apart.mean() - half:+.3f}, {apart.mean() + half:+.3f}]"]
    pace = statistics.median(off[:, -1, 0] / on[:, -1, 0])
    return [
        *lines, "",
        f"Mean ± standard deviation of seeds {', '.join(map(str, seeds))}: held-out score of the demo's reward model on 64 prompts, and KL in nats a completion of the step's own rollout. "
        f"Kernels minus torch alone, over all steps after the start: {', '.join(told)} (pairs of one seed, 95% by Student's t). With the kernels these steps took {pace:.1f} times less time.",
    ]  # fmt: skip
