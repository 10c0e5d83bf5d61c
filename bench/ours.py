"""accord's side: one measurement a process (bench/compare.py starts it)."""

import contextlib
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import work

from accord.data.records import Completion, Example, Pair, PairGroup, Prompt
from accord.nn import attention, fused, logprobs, native
from accord.nn.weights import parse_config, read_config
from accord.planning.models import random_model
from accord.reward.model import RewardModel
from accord.reward.settings import RewardSettings
from accord.reward.sources import build_reward
from accord.reward.training import train_reward_model
from accord.rl.settings import RLSettings
from accord.rl.trainer import train
from accord.rollout import matrices, pieces
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.supervised.examples import Encoded
from accord.supervised.imitation import Imitation
from accord.supervised.settings import SFTSettings
from accord.supervised.training import tune
from accord.text.tokenizer import Tokenizer
from accord.tuning import adapted


def load(task):
    """The model; its prompts are encoded as they are, and no token ends a completion: every side does the same work.

    A task may ask for prompts of another length, and for random weights of another shape (``shape``: fields of ModelConfig).
    """
    folder = Path(task["model"])
    if "shape" in task:
        raw = read_config(folder)
        model = random_model(replace(parse_config(raw), **task["shape"]), task["shape"]["num_hidden_layers"], torch.bfloat16)
        policy = Policy(model, Tokenizer.load(folder), raw, "random", model, trunk_layers=model.depth)
    else:
        policy = Policy.load(task["model"], "bfloat16")
    wanted = task.get("prompt", work.PROMPT)
    policy.tokenizer.encode_prompt = lambda text: (work.encode(policy.tokenizer.inner, text) * -(-wanted // work.PROMPT))[:wanted]
    policy.tokenizer.eos_ids = (-1,)
    return policy


def prompts(count):
    return [Prompt(f"p{i}", text) for i, text in enumerate(work.texts(count))]


def decode(task):
    policy = load(task)
    out = {}
    for rows in task["rows"]:
        engine, given = Engine(policy, rows, task.get("weights", "same")), prompts(rows)
        out[str(rows)] = work.a_step(lambda new, e=engine, g=given: e.sample(g, 1, Sampling(1.0, max_new_tokens=new)))
    work.report(seconds=out)


def recorder(log):
    """Of a run that is written nowhere: ``log`` gets its numbers."""
    return SimpleNamespace(log=log, save=lambda *_: None, warn=lambda *_: None, latest=lambda: None)


def iterate(task, at_end=lambda step: None):
    """Training iterations, one to warm up first: their stats, and when each ended."""
    policy, settings = load(task), RLSettings(max_new_tokens=task.get("response", work.RESPONSE), truncation="nothing", temperature=1.0, max_steps=1 + task["steps"],
                                              checkpoint_every=1000, warmup_steps=0, kl_warn=1e9, **task["settings"])  # fmt: skip
    if task.get("reward_layers"):
        reward = build_reward(RewardModel.on(policy, task["reward_layers"]), policy)
    else:
        reward = build_reward(lambda prompts, completions: [len(c) / 100 for c in completions], policy)
    steps, ends = [], []

    def log(step, stats, rows):
        steps.append(stats)
        ends.append(time.perf_counter())
        at_end(len(steps))

    train(policy, prompts(settings.prompts_per_step), reward, settings, recorder(log))
    return [s for s in steps if "score" in s][1:], ends, settings


def iteration(task):
    """Seconds of an iteration: its rollout, scoring and every update."""
    steps, ends, settings = iterate(task)
    assert all(s["length"] == settings.max_new_tokens for s in steps)
    seconds = statistics.median(b - a for a, b in zip(ends[-len(steps) - 1 :], ends[-len(steps) :], strict=False))
    parts = {name: statistics.median(s[f"seconds/{name}"] for s in steps) for name in ("rollout", "score", "update")}
    work.report(seconds=seconds, parts=parts)


OWN_PRODUCTS, OWN_ATTENTION = {"multiply"}, {"attend", "causal_softmax", "causal_softmax_backward", "lay_heads", "collect_heads"}


def share(task):
    """Seconds of the second iteration, and what of it are matrix products and attention."""
    clock = {"matrix": 0.0, "attention": 0.0}
    ours = native.call

    def timed(name, *arguments):
        start = time.perf_counter()
        ours(name, *arguments)
        for kind, names in (("matrix", OWN_PRODUCTS), ("attention", OWN_ATTENTION)):
            clock[kind] += (time.perf_counter() - start) * (name in names)

    for module in (attention, fused, logprobs, matrices, pieces):
        module.call = timed
    found = {}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def at_end(step):
        if step == 2:  # after the self-test and the first iteration
            clock.update(matrix=0.0, attention=0.0)
            profiler.start()
            found["start"] = time.perf_counter()
        if step == 3:
            found["seconds"] = time.perf_counter() - found["start"]
            profiler.stop()
            for event in profiler.key_averages():
                # batched products are attention's, all others the layers' and the vocabulary's
                kind = {"aten::bmm": "attention", "aten::mm": "matrix", "aten::addmm": "matrix", "mkldnn::_linear_pointwise": "matrix"}.get(
                    event.key
                )
                if kind:
                    clock[kind] += event.self_cpu_time_total / 1e6

    iterate(task | {"steps": 1}, at_end)
    work.report(seconds=found["seconds"], **clock)


def reach(task):
    """PPO as the demo sets it, until the held-out score is ``gain`` above the start: [seconds, score, KL] every second step."""
    import yaml

    given = yaml.safe_load((Path(__file__).parent.parent / "accord/recipes/demo.yaml").read_text())["rl"]
    settings = RLSettings(**{**given, "kl_target": None, "kl_coef": task["kl_coef"], "max_steps": task["steps"], "seed": task["seed"],
                             "validate_every": 2, "validation_prompts": 64, "checkpoint_every": 1000, "kl_warn": 1e9})  # fmt: skip
    from reach import prompts as texts

    policy = Policy.load(task["model"], "bfloat16")
    train_on, held = ([Prompt(f"{kind}{i}", text) for i, text in enumerate(some)] for kind, some in zip("th", texts(), strict=True))
    source = build_reward(task["reward"], policy)
    curve, spent = [], 0.0

    class Enough(Exception):
        pass

    def log(step, stats, rows):
        nonlocal spent
        if "score" not in stats:
            start = Engine(policy, settings.rows).sample(held, 1, settings.sampling(10**6))
            curve.append([0.0, float(source(start).total.mean()), 0.0])
            return
        spent += sum(stats[f"seconds/{part}"] for part in ("rollout", "score", "update"))
        if "validation_score" in stats:
            curve.append([spent, stats["validation_score"], stats["kl"]])
            if stats["validation_score"] >= curve[0][1] + task["gain"]:
                raise Enough

    with contextlib.suppress(Enough):
        train(policy, train_on, source, settings, recorder(log), validation=held)
    work.report(curve=curve)


def reward(task):
    """The steps of one epoch: what a second one adds."""
    policy = load(task)

    def group(i, prompt, *answers):
        both = [
            Completion(Prompt(f"p{i}", prompt), a, True, k, tuple(work.encode(policy.tokenizer.inner, a))) for k, a in enumerate(answers)
        ]
        return PairGroup(both[0].prompt, tuple(both), (Pair(0, 1, 1.0),))

    def run(count, epochs):
        groups = [group(i, *p) for i, p in enumerate(work.pairs(count))]
        settings = RewardSettings(top_layers=task["layers"], epochs=epochs, prompts_per_step=task["batch"])
        train_reward_model(policy, groups, groups[:1], settings)

    run(task["batch"], 1)  # one step to warm up
    one, two = (work.clock(lambda n=n: run(task["pairs"], n)) for n in (1, 2))
    work.report(seconds=two - one)


def sft(task):
    """The steps of one epoch: what a second one adds."""
    policy = load(task)
    policy.tokenizer.inner.chat_template, policy.tokenizer.eos_ids = None, (policy.tokenizer.inner.eos_token_id,)

    def run(count, epochs):
        examples = [Example(f"e{i}", prompt, answer) for i, (prompt, answer, _) in enumerate(work.pairs(count))]
        settings = SFTSettings(adaptation=task["adaptation"], epochs=epochs, examples_per_step=task["batch"])
        tune(adapted(policy, settings), Imitation(Encoded(policy, examples, None), None, settings), settings, recorder(lambda *_: None))

    run(task["batch"], 1)  # one step to warm up
    one, two = (work.clock(lambda n=n: run(task["examples"], n)) for n in (1, 2))
    work.report(seconds=two - one)


def rates(task):
    """What the machine gives: bytes a second read from memory, bf16 operations a second in a matrix product."""
    del task
    big = torch.ones(2**28, dtype=torch.float32)
    a, b = torch.ones(2048, 2048, dtype=torch.bfloat16), torch.ones(2048, 2048, dtype=torch.bfloat16)
    read = min(work.clock(big.sum) for _ in range(7))
    multiply = min(work.clock(lambda: a @ b) for _ in range(7))
    work.report(bandwidth=big.nbytes / read, operations=2 * 2048**3 / multiply)


if __name__ == "__main__":
    task = work.task()
    {"decode": decode, "iteration": iteration, "share": share, "reach": reach, "reward": reward, "sft": sft, "rates": rates}[task["what"]](
        task
    )
