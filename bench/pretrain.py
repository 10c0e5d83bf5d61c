"""Pretraining against transformers' Llama: the same first weights, rows, order, optimizer and rates; docs/pretraining-against-transformers.md.

    python bench/pretrain.py ../shared/data/text/tinyshakespeare.txt.gz ../shared/data/text/wikitext2.valid.txt.gz
    python bench/pretrain.py TEXT.txt --tokens 200000 --rounds 1

The peer is a loop as its documentation has it: LlamaForCausalLM with its fused attention, torch's fused AdamW, bf16 autocast where the
processor multiplies bf16 (fp32 weights, as ours), rows padded to the longest of a micro-batch. Each program is a process of its own; a round runs all,
one after the other, and ratios are taken within it. The held-out loss is measured by the same code for both, in fp32.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/pretraining-against-transformers.md"
WARM = 3  # steps before the clock runs
AS_IT_IS = {"GLIBC_TUNABLES": "", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
"""A peer takes its first weights from accord's model, which sets how memory is kept (accord/nn/memory.py); its process keeps it as torch does."""


def work(task):
    """One program's training; prints seconds, tokens and the held-out loss."""
    import numpy as np
    import torch

    from accord.nn.budget import TokenBudget
    from accord.nn.weights import merged_state
    from accord.optimizer import Optimizer
    from accord.pretraining.language import Language, in_micro_batches, new_policy
    from accord.pretraining.settings import PretrainSettings
    from accord.supervised.training import State, rate_at
    from accord.text.tokenizer import Tokenizer
    from accord.tuning import corpus

    settings = PretrainSettings(**task["settings"])
    tokenizer = Tokenizer.load(Path(task["tokenizer"]))
    train, held = corpus([task["text"]], tokenizer, None).split()
    policy, language = new_policy(tokenizer, settings), Language(train, held, settings)
    seconds = tokens = 0.0
    if task["program"] == "accord":
        state = State(policy, settings)
        for step in range(language.steps):
            clock = time.perf_counter()
            state.optimizer.set_rate(rate_at(step, language.steps, settings))
            told = state.step(language, step)
            if step >= WARM:
                seconds, tokens = seconds + time.perf_counter() - clock, tokens + told["tokens"]
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **{k: v for k, v in policy.raw.items() if k not in ("architectures", "model_type")}, attn_implementation="sdpa"
        )
        model = LlamaForCausalLM(config)
        model.load_state_dict(merged_state(policy.model), strict=False)
        model.tie_weights()
        model.model.embed_tokens.padding_idx = None
        run = torch.compile(model, dynamic=True) if task["program"] == "transformers (compiled)" else model
        low = policy.model.compute_dtype == torch.bfloat16
        optimizer = Optimizer({"policy": (dict(model.named_parameters()), settings.rate)}, settings.max_grad_norm, 3, TokenBudget(settings.micro_batch_tokens), "", settings.weight_decay, settings.betas)  # fmt: skip
        parts = language.train
        for step in range(language.steps):
            clock = time.perf_counter()
            numbers = language.parts_of(step)
            count = int(parts.sizes[numbers].sum())

            def accumulate(budget, numbers=numbers, count=count):
                for some in in_micro_batches(parts, numbers, budget):
                    widest = int(parts.sizes[some].max())
                    ids = np.zeros((len(some), widest), dtype=np.int64)
                    labels = np.full((len(some), widest), -100)
                    for row, i in enumerate(some):
                        piece = parts.ids[parts.begins[i] : parts.begins[i] + parts.sizes[i] + 1]
                        ids[row, : parts.sizes[i]], labels[row, : parts.sizes[i]] = piece[:-1], piece[1:]
                    with torch.autocast("cpu", torch.bfloat16, enabled=low):
                        logits = run(torch.from_numpy(ids)).logits
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), torch.from_numpy(labels).flatten(), ignore_index=-100, reduction="sum") / count  # fmt: skip
                    loss.backward()
                return {}

            optimizer.set_rate(rate_at(step, language.steps, settings))
            optimizer.take(accumulate)
            if step >= WARM:
                seconds, tokens = seconds + time.perf_counter() - clock, tokens + count
        policy.model.load_state_dict(dict(model.state_dict()), strict=False)
    policy.model.compute_dtype = torch.float32
    print(json.dumps({"seconds": seconds, "tokens": tokens, **language.measure(policy, TokenBudget(8192))}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=600_000, help="to train on [600000]")
    parser.add_argument("--size", default="5m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", default="accord,transformers,transformers (compiled)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        return work(json.loads(arguments.task))
    from accord.data.sources import read_texts
    from accord.text.vocabulary import learn_tokenizer

    names, lines = arguments.programs.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for text in arguments.texts:
            own = home / text.name.removesuffix(".gz")
            own.write_bytes(gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes())
            learn_tokenizer(read_texts([own]), "bpe", 2048).save_pretrained(home / "tokenizer")
            found = {name: [] for name in names}
            for seed in range(arguments.rounds):
                for name in names:
                    settings = {"size": arguments.size, "tokens": arguments.tokens, "context": 256, "seed": seed, "warmup": 0.05}
                    task = {"program": name, "text": str(own), "tokenizer": str(home / "tokenizer"), "settings": settings}
                    environment = {**os.environ, **(AS_IT_IS if name != "accord" else {}), "ACCORD_CACHE": str(home / "cache")}
                    done = subprocess.run([sys.executable, __file__, "--task", json.dumps(task)], capture_output=True, text=True, env=environment)  # fmt: skip
                    if done.returncode:
                        raise SystemExit(done.stderr[-3000:])
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
                    print(own.name, name, found[name][-1], flush=True)
            pace = {name: [f["tokens"] / f["seconds"] for f in found[name]] for name in names}
            for name in names:
                ratios = [mine / other for mine, other in zip(pace["accord"], pace[name], strict=True)]
                losses = [f["bits_per_byte"] for f in found[name]]
                lines.append(
                    f"| {own.name} | {name} | {statistics.median(pace[name]):,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {', '.join(f'{x:.4f}' for x in losses)} |"
                )  # fmt: skip
    from accord.nn.loading import default_dtype

    PAGE.write_text("\n".join([
        "# Pretraining against transformers", "",
        f"`python bench/pretrain.py TINYSHAKESPEARE WIKITEXT2-VALIDATION --tokens {arguments.tokens} --rounds {arguments.rounds} --programs '{arguments.programs}'`: size {arguments.size}, {arguments.tokens:,} tokens of each text (a vocabulary of 2048, context 256, 8192 tokens a step, AdamW), "
        f"{arguments.rounds} seeds, each program in a process of its own, one after the other. The same first weights, rows, order and rates; computation in {str(default_dtype()).removeprefix('torch.')} over fp32 weights for all. "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}.", "",
        "| text | program | tokens a second, median | accord is faster by | held-out bits a byte, a seed each |", "|---|---|---|---|---|", *lines, "",
        "The peer is `LlamaForCausalLM` with its fused attention and torch's fused AdamW in a plain loop" + (", and the same under `torch.compile`" if any("compiled" in name for name in names) else "") + ". nanochat was not run: it is made for GPUs.", "",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
