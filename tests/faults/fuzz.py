"""Every file that accord reads, damaged in many ways: a sentence that names it, or the values; never a traceback, never a hang.

    .venv/bin/python tests/faults/fuzz.py --each 800        # 10,000 and more inputs in all

Inputs are valid files with bytes flipped, cut, repeated, swapped and replaced by what parsers stumble over, and JSON whose
values are exchanged for others at random places. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

SECONDS = 20
ODD = [
    b"", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\n", b"\r\n", b"\xe2\x80\xa8", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\ud800", b"null", b"NaN",
    b"-Infinity", b"1e999", b"-0", b"99999999999999999999999", b"0.1", b"true", b"[[[[[[[[[[[[[[[[[", b"&a", b"*a", b"!!python/object:os.system", b"<<: *a", b": ", b"\t", b"- ", b"'",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 3, 10**6, 10**30, 0.5, -2.5, 1e308, float("nan"), float("inf"), "", "x", "F", "\x00", "\ud800", "a" * 5000, [], {}, [[]], [None], ["x", 1], {"role": "user"},
    [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": ""}], {"a": {"b": [1]}}, "../../etc/passwd", "float16", "LlamaForCausalLM", "1e5",
]  # fmt: skip


def damaged(data: bytes, luck: random.Random) -> bytes:
    """One of several kinds of damage, sometimes two."""
    for _ in range(1 + (luck.random() < 0.3)):
        kind, at = luck.randrange(7), luck.randrange(len(data) + 1) if data else 0
        end = min(at + luck.choice((1, 1, 2, 8, 64)), len(data))
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << luck.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + luck.choice(ODD) + data[at:]
        elif kind == 3:
            data = data[:at] + data[end:]
        elif kind == 4:
            data = data[:end] + data[at:end] * luck.choice((1, 3)) + data[end:]
        elif kind == 5:
            data = data[:at] + luck.choice(ODD) + data[end:]
        else:
            lines = data.splitlines(keepends=True)
            luck.shuffle(lines)
            data = b"".join(lines)
    return data


def exchanged(value: object, luck: random.Random) -> object:
    """A JSON value with something in it replaced, removed, added or nested."""
    if isinstance(value, dict) and value and luck.random() < 0.85:
        key, out = luck.choice(list(value)), dict(value)
        what = luck.random()
        if what < 0.1:
            del out[key]
        elif what < 0.15:
            out[luck.choice(("x", "", key.upper(), key + " "))] = luck.choice(VALUES)
        else:
            out[key] = exchanged(value[key], luck)
        return out
    if isinstance(value, list) and value and luck.random() < 0.7:
        at, out = luck.randrange(len(value)), list(value)
        if luck.random() < 0.15:
            del out[at]
        else:
            out[at] = exchanged(value[at], luck)
        return out
    return luck.choice(VALUES)


def mutated(data: bytes, suffix: str, luck: random.Random) -> bytes:
    """Half of the JSON inputs stay JSON, so that what comes after the parser is reached."""
    if suffix in (".jsonl", ".json") and luck.random() < 0.6:
        if suffix == ".json":
            return json.dumps(exchanged(json.loads(data), luck)).encode()
        rows = [json.loads(line) for line in data.splitlines()]
        at = luck.randrange(len(rows))
        rows[at] = exchanged(rows[at], luck)
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if suffix == ".yaml" and luck.random() < 0.6:
        import yaml

        return yaml.safe_dump(exchanged(yaml.safe_load(data), luck)).encode("utf-8", "surrogatepass")
    if suffix == ".safetensors" and luck.random() < 0.6:  # where the header is, not in the numbers
        size = 8 + int.from_bytes(data[:8], "little")
        return damaged(data[:size], luck) + data[size:]
    return damaged(data, luck)


class Slow(Exception):
    pass


class Target:
    """A file to damage and the call that reads it."""

    def __init__(self, name: str, file: Path, read: Callable[[], object], share: float = 1.0) -> None:
        self.name, self.file, self.read, self.share = name, file, read, share
        self.good = file.read_bytes()
        read()  # as it is, it can be read

    def try_(self, luck: random.Random) -> tuple[str, bytes, str]:
        """What came of one input: read, refused, or the traceback."""
        from accord.errors import UserError

        data = mutated(self.good, self.file.suffix, luck)
        self.file.write_bytes(data)

        def late(*_: object) -> None:
            raise Slow

        signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.read()
            return "read", data, ""
        except UserError as error:
            if not str(error).strip() or "\n" in str(error).strip():
                return "no sentence", data, repr(str(error))
            return "refused", data, str(error)
        except Slow:
            return "hang", data, f"longer than {SECONDS} s"
        except BaseException:
            return "traceback", data, traceback.format_exc()
        finally:
            signal.alarm(0)
            self.file.write_bytes(self.good)


def targets(home: Path) -> list[Target]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    import yaml
    from conftest import save_model

    from accord.config import Recipe, RLSettings, build, load_yaml, recipe_text
    from accord.data import sources
    from accord.data.pairs import group_pairs
    from accord.evaluation.report import write_report
    from accord.feedback.agreement import agreement, labeler_weights
    from accord.reward.model import RewardModel
    from accord.rollout.policy import Policy
    from accord.runs import Run

    def file(name: str, text: str) -> Path:
        (home / name).write_text(text)
        return home / name

    def lines(name: str, rows: list[dict]) -> Path:
        return file(name, "".join(json.dumps(row) + "\n" for row in rows))

    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
    prompts = [{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": chat, "theme": "x"}, {"messages": chat}]
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": chat, "chosen": [{"role": "assistant", "content": "y"}], "rejected": "n"},
    ]
    done = [
        {"id": "a", "prompt": "Hello", "completion": f"c{i}", "finished": True, "index": i, "tokens": [1, 2], "score": 0.5 * i}
        for i in range(3)
    ]
    turns = [{"id": "a", "prompt": "x", "completion": "12", "score": 1.0, "turns": [{"tokens": [1], "reward": 1.0, "reply": [2]}]}]
    ranks = [{"prompt_id": "a", "labeler": "l", "ranks": [1, 2, "F"], "criterion": "c"}]
    ranks += [{**ranks[0], "labeler": "m", "ratings": [7, None, 1], "flags": [[], ["toxic"], []], "note": "so", "decision": True}]
    answers = [{"text": "x", "finished": True}, {"text": "y"}, {"text": "z"}]
    tied = {"preferred": 1, "other": 2, "weight": 2.0, "distance": 1.0}
    groups = [{"id": "a", "prompt": "Hello", "completions": answers, "pairs": [{"preferred": 0, "other": 1}], "ties": [tied]}]
    completions = sources.read_completions(lines("c3.jsonl", done))

    def used(rankings: list) -> None:
        agreement(rankings, draws=20)
        labeler_weights(rankings)
        group_pairs(completions, rankings)

    pq.write_table(pa.Table.from_pylist([{"id": "a", "prompt": "Hello"}]), home / "p.parquet")
    rl = yaml.safe_dump({"top_layers": 2, "kl_coef": 0.1, "algorithm": "ppo", "kl_target": 6.0, "dtype": "float32"})
    examples = [
        {"id": "a", "prompt": "q", "completion": "x"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]},
    ]
    out = [
        Target("prompts (jsonl)", path := lines("p.jsonl", prompts), lambda p=path: sources.read_prompts(p)),
        Target("prompts (json)", path := file("p.json", json.dumps(prompts)), lambda p=path: sources.read_prompts(p)),
        Target("prompts (txt)", path := file("p.txt", "Hello\nWhat is up?\n"), lambda p=path: sources.read_prompts(p)),
        Target("prompts (parquet)", path := home / "p.parquet", lambda p=path: sources.read_prompts(p)),
        Target("pairs", path := lines("pairs.jsonl", pairs), lambda p=path: sources.read_pairs(p)),
        Target("completions", path := lines("c.jsonl", done), lambda p=path: sources.read_completions(p)),
        Target("scored completions", path := lines("s.jsonl", [*done, *turns]), lambda p=path: sources.read_logged(p)),
        Target("rankings", path := lines("r.jsonl", ranks), lambda p=path: sources.read_rankings(p)),
        Target("rankings, compared", path := lines("r3.jsonl", [{**ranks[0], "labeler": name} for name in "lmn"]), lambda p=path: used(sources.read_rankings(p))),
        Target("examples", path := lines("e.jsonl", examples), lambda p=path: sources.read_examples(p)),
        Target("groups", path := lines("g.jsonl", groups), lambda p=path: sources.read_pairs(p)),
        Target("labelers' weights", path := file("w.json", '{"l": 1.0, "m": 0.5}'), lambda p=path: sources.read_weights(p)),
        Target("recipe", path := file("recipe.yaml", recipe_text("demo")), lambda p=path: build(Recipe, load_yaml(recipe_text(str(p)), str(p)), str(p))),
        Target("settings", path := file("rl.yaml", rl), lambda p=path: build(RLSettings, load_yaml(recipe_text(str(p)), str(p)), str(p))),
    ]  # fmt: skip
    model = home / "model"
    save_model(model)
    ids = [1, 2, 3]

    def open_model() -> None:
        policy = Policy.load(str(model), "float32")
        policy.tokenizer.encode_prompt("Hello")
        policy.tokenizer.decode(ids)

    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        out.append(Target(f"a model's {name}", model / name, open_model, 0.5))
    reward = home / "reward"
    policy = Policy.load(str(model), "float32")
    RewardModel.on(policy, 2).save(reward)
    for name in ("accord.json", "config.json", "model.safetensors"):
        out.append(Target(f"a reward model's {name}", reward / name, lambda: RewardModel.load(reward, policy).score(["hi"], ["yes"]), 0.5))
    config = {"command": "rl", "model": "m", "rl": RLSettings().model_dump()}
    run = Run.create(home / "run", config)
    for step in range(2):
        stats = {
            "score": 0.1,
            "kl": 0.2,
            "kl_coef": 0.1,
            "entropy": 1.0,
            "length": 5.0,
            "finished": 1.0,
            "reward/r": 0.1,
            "seconds/rollout": 1.0,
        }
        row = {"step": step, "id": "a", "theme": "", "prompt": "hi", "completion": "x", "finished": True, "index": 0, "tokens": 3, "score": 1.0, "parts": {"r": 1.0}, "kl": 0.2}  # fmt: skip
        run.log(step, stats, [row])
        run.save(step + 1, {"x": torch.zeros(3)}, {"kl": {"coef": 0.1}}, 0.5)
    run.close()

    def open_run() -> None:
        copy = home / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(home / "run", copy)
        opened, given = Run.open(copy)
        try:
            build(RLSettings, given.get("rl") or {}, "config.yaml")
            opened.latest()
            write_report(copy)
        finally:
            opened.close()

    for name in ("config.yaml", "history.jsonl", "metrics.jsonl", "completions.jsonl"):
        out.append(Target(f"a run's {name}", home / "run" / name, open_run, 0.5))
    for name in ("manifest.json", "state.safetensors", "SHA256SUMS"):
        out.append(Target(f"a checkpoint's {name}", home / "run/checkpoints/step-2" / name, open_run, 0.5))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=800, help="inputs a file; half of it where a model or a run is opened [800]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose name has this in it")
    parser.add_argument("--write", action="store_true", help="write the table in docs/reliability.md")
    parser.add_argument("--save", type=Path, help="write each input that failed there")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="accord-fuzz-"))
    os.chdir(home)
    failed, total, seen = 0, 0, Counter[str]()
    with contextlib.redirect_stdout(io.StringIO()):
        everything = targets(home)
    table = ["| file | inputs | refused with a sentence | read |", "|---|---|---|---|"]
    for target in everything:
        if arguments.only not in target.name:
            continue
        luck, results = random.Random(f"{arguments.seed} {target.name}"), Counter[str]()
        count = round(arguments.each * target.share)
        for number in range(count):
            kind, data, text = target.try_(luck)
            results[kind] += 1
            if kind not in ("read", "refused"):
                failed += 1
                where = text.strip().splitlines()[-1]
                seen[f"{target.name}: {where}"] += 1
                if seen[f"{target.name}: {where}"] == 1:
                    print(f"\n{target.name}, input {number}: {kind}\n{text}\n", flush=True)
                if arguments.save:
                    arguments.save.mkdir(parents=True, exist_ok=True)
                    (arguments.save / f"{target.file.name}-{number}").write_bytes(data)
        total += count
        table.append(f"| {target.name} | {count} | {results['refused']} | {results['read']} |")
        print(table[-1], flush=True)
    shutil.rmtree(home)
    print(f"\n{total} inputs, {failed} failed.")
    for what, times in seen.most_common():
        print(f"{times} x {what}")
    if arguments.write and not failed:
        from campaign import put

        put("fuzz", "fuzz.py", [*table, "", f"{total:,} inputs in all."])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
