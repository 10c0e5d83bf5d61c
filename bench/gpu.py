"""On one GPU: decoding against the bandwidth floor and against generate, and a PPO iteration; a table for bench/GPU.md.

    .venv/bin/python bench/gpu.py > bench/GPU.md       # SmolLM2-135M's shape with random weights: nothing is downloaded
    .venv/bin/python bench/gpu.py --device cpu --rows 4 --new 8    # to see that it runs

transformers is in accord's own environment; both sides run in this process, alternating, after one run each to warm up.
"""

import argparse
import statistics
import time

import torch
from ours import recorder
from transformers import LlamaConfig, LlamaForCausalLM

from accord.data.records import Prompt
from accord.nn.weights import parse_config
from accord.planning.models import random_model
from accord.reward.model import RewardModel
from accord.reward.sources import build_reward
from accord.rl.settings import RLSettings
from accord.rl.trainer import train
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling

SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048)  # fmt: skip
PROMPT = 41


class Numbers:
    """Prompts that are numbers: a tokenizer of a model that has no words."""

    eos_ids, pad_id, fingerprint = (-1,), 0, "numbers"

    def encode_prompt(self, text):
        return [(int(text) * 7919 + k * 104729) % 49000 for k in range(PROMPT)]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def clock(device, function):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def a_step(device, run, new):
    return (clock(device, lambda: run(new)) - clock(device, lambda: run(new // 4))) / (new - new // 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--new", type=int, default=128, help="tokens a completion")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device, new = arguments.device, arguments.new
    raw = {"model_type": "llama", **SHAPE}
    model = random_model(parse_config(raw), SHAPE["num_hidden_layers"], torch.bfloat16).to(device)
    policy = Policy(model, Numbers(), raw, "random", model, trunk_layers=model.depth)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device, torch.bfloat16).eval()
    big = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    read = min(clock(device, big.sum) for _ in range(7))
    bandwidth = big.nbytes / read
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"# On a GPU\n\n{name}, torch {torch.__version__}; reads {bandwidth / 1e9:.0f} GB a second.\n")
    print("| rows | accord: ms a step | floor: ms | share of the floor | generate: ms a step | times faster |\n|---|---|---|---|---|---|")
    weights = 2 * sum(p.numel() for p in model.parameters())
    for rows in arguments.rows:
        prompts = [Prompt(f"p{i}", str(i)) for i in range(rows)]
        engine = Engine(policy, rows)
        ids = torch.tensor([Numbers().encode_prompt(p.content) for p in prompts], device=device)

        def mine(n, engine=engine, prompts=prompts):
            engine.sample(prompts, 1, Sampling(1.0, max_new_tokens=n))

        @torch.no_grad()
        def peer(n, ids=ids):
            theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)  # fmt: skip

        mine(new), peer(8)
        rounds = [(a_step(device, mine, new), a_step(device, peer, max(new // 4, 8))) for _ in range(arguments.rounds)]
        ours, other = (statistics.median(r[k] for r in rounds) for k in (0, 1))
        cache = 2 * rows * (PROMPT + new * 5 // 8) * SHAPE["num_hidden_layers"] * 2 * 3 * 64
        least = (weights + cache) / bandwidth
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"| {rows} | {1000 * ours:.2f} | {1000 * least:.2f} | {least / ours:.0%} | {1000 * other:.1f} | {ratio:.1f} |", flush=True)
    iteration(policy, device, max(arguments.rows), new)


def iteration(policy, device, rows, new):
    ends = []
    run = recorder(lambda step, stats, rows: ends.append(stats))
    settings = RLSettings(prompts_per_step=rows, completions_per_prompt=1, max_new_tokens=new, truncation="nothing", temperature=1.0,
                          rows=rows, max_steps=4, epochs=4, minibatches=2, checkpoint_every=1000, kl_warn=1e9, micro_batch_tokens=32768)  # fmt: skip
    train(policy, [Prompt(f"p{i}", str(i)) for i in range(rows)], build_reward(RewardModel.on(policy, 6), policy), settings, run)
    steps = [s for s in ends if "score" in s][1:]
    parts = {p: statistics.median(s[f"seconds/{p}"] for s in steps) for p in ("rollout", "score", "update")}
    told = ", ".join(f"{p} {v:.2f} s" for p, v in parts.items())
    peak = f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if device == "cuda" else ""
    print(f"\nPPO, {rows} completions of {new} tokens an iteration, six layers, 4 epochs of 2 minibatches: {told}{peak}.")


if __name__ == "__main__":
    main()
