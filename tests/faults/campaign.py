"""Processes killed and disks failing at random moments; what is left must go on to the very same result.

    make test-faults                                          # the long form; writes the table in docs/reliability.md
    .venv/bin/python tests/faults/campaign.py --kills 20 --errors 10

A command runs once undisturbed: the reference. Then it runs again and again and is disturbed each time: killed (kill -9)
at a random operation on a file of its folder, in the middle of a write too, or at a random time; or from a random
operation on the disk is full (ENOSPC) or broken (EIO), once, three times or for good. It is then resumed, often killed
once more, until it ends. Every file of the folder must then be the reference's, byte for byte, but for what tells times.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCS = ROOT / "docs/reliability.md"
SERVER = """
import ctypes, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import accord.api, accord.cli, accord.feedback.criterion, accord.pipeline, accord.evaluation.report, accord.reward.training, transformers
accord.feedback.criterion.judge([]), accord.feedback.criterion.lexicon()  # read once
accord.reward.training.SAVE_EVERY = 0.0  # a checkpoint a step: there is more to disturb
shim = ctypes.CDLL(None)
shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
shim.fault_count.restype = ctypes.c_long
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(job["home"])
        out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2), os.close(0)
        shim.fault_arm(job["folder"].encode(), *job["arm"])
        try:
            code = accord.cli.main(job["command"])
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        print("operations", shim.fault_count(), flush=True)
        os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
SMALL = [
    "--top-layers", "2", "--prompts-per-step", "4", "--completions-per-prompt", "2", "--max-new-tokens", "6", "--max-steps", "4",
    "--dtype", "float32", "--validate-every", "2", "--validation-prompts", "4", "--checkpoint-every", "1", "--kl-target", "2",
]  # fmt: skip
RECIPE = """
model: writer
prompts: prompts.jsonl
sample: {per_prompt: 2, max_new_tokens: 16}
reward: {top_layers: 1, epochs: 2, micro_batch_tokens: 256}
rl: {top_layers: 1, prompts_per_step: 8, completions_per_prompt: 1, max_new_tokens: 16, epochs: 1, minibatches: 1, max_steps: 3, validate_every: 2, checkpoint_every: 1, learning_rate: 3.0e-3}
evaluation: {per_prompt: 1, max_new_tokens: 16}
gates: {min_pairs: 1, reward_accuracy: 0.0, win_rate: 0.0}
"""
COMMANDS = {
    "rl": (["rl", "--model", "model", "--prompts", "prompts.jsonl", "--reward", "reward", *SMALL], True),
    "reward": (["reward", "--model", "model", "--pairs", "pairs.jsonl", "--top-layers", "2", "--epochs", "1"], False),
    "sft": (
        [
            "sft",
            "--model",
            "model",
            "--examples",
            "examples.jsonl",
            "--examples-per-step",
            "4",
            "--epochs",
            "2",
            "--checkpoint-every",
            "1",
            "--validate-every",
            "2",
            "--dtype",
            "float32",
        ],
        True,
    ),
    "run": (["run", "recipe.yaml"], True),
    "sample": (["sample", "--model", "model", "--prompts", "prompts.jsonl", "--per-prompt", "2", "--max-new-tokens", "6"], False),
}
"""name -> (the command, whether it is resumed by name or by giving it again)."""


class Server:
    """accord, imported once; each command runs in a fork of it, with the failing disk loaded."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "logs").mkdir(exist_ok=True)
        library = home / "disk.so"
        compiler = next(c for c in ("cc", "gcc", "g++") if shutil.which(c))
        subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "disk.c"), "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "ACCORD_DISK_WAIT": "0", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, command: list[str], folder: Path, at: int = 0, error: int = 0, times: int = 0, seconds: float | None = None):
        """Exit code (negative: the signal) and output. ``seconds``: kill it after that long."""
        log = self.home / "logs" / f"{folder.name}.log"
        job = {"home": str(self.home), "command": command, "folder": str(folder), "arm": [at, error, times], "log": str(log)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        return code, log.read_text(errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def make_home(home: Path) -> None:
    """A user's folder: a small model, one whose words make pairs, a reward model, prompts, pairs, a recipe."""
    import torch

    sys.path.insert(0, str(HERE.parent))
    from conftest import save_model, word_tokenizer

    from accord.reward.model import RewardModel
    from accord.rollout.policy import Policy

    save_model(home / "model")
    save_model(home / "writer", tokenizer=word_tokenizer())
    (home / "recipe.yaml").write_text(RECIPE)
    words = "one two three four five six seven eight nine ten red blue green white black brown grey pink gold sun moon star sea".split()
    themes = ("helpfulness", "harmlessness")
    rows = [{"id": f"p{i}", "prompt": f"say {w} and {v}", "theme": themes[i % 2]} for i, (w, v) in enumerate(zip(words, words[3:] + words[:3], strict=True))]  # fmt: skip
    rows += [{"id": f"{q}{i}", "prompt": f"{q} {w}?", "theme": themes[i % 2]} for i, w in enumerate(words) for q in ("and", "why", "or")]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": f"yes, {row['id']}", "rejected": "no"} for row in rows]
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    examples = [{"id": row["id"], "prompt": row["prompt"], "completion": f"yes, {row['id']}"} for row in rows]
    (home / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    reward = RewardModel.on(Policy.load(str(home / "model"), "float32"), 2)
    with torch.no_grad():
        reward.scalar.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    reward.save(home / "reward")


def put(name: str, program: str, lines: list[str]) -> None:
    """Write a part of docs/reliability.md."""
    start, end = f"<!-- {name}: tests/faults/{program} writes this part -->", f"<!-- /{name} -->"
    head, rest = DOCS.read_text().split(start)
    DOCS.write_text(f"{head}{start}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}")


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file but for times: of timings the steps they are of, and the report is drawn from the other files."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
        data = path.read_bytes()
        if path.name == "timings.jsonl":
            data = json.dumps([json.loads(line)["step"] for line in data.decode().splitlines()]).encode()
        if path.name == "stages.jsonl":
            rows = [json.loads(line) for line in data.decode().splitlines()]
            data = json.dumps([{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_gb")} for row in rows]).encode()
        if path.name == "report.html":
            data = b"whole" if data.rstrip().endswith(b"</html>") else b"cut"
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


class Campaign:
    def __init__(self, name: str, server: Server, luck: random.Random) -> None:
        self.name, self.server, self.luck = name, server, luck
        self.command, self.resumed = COMMANDS[name]
        self.failures: list[str] = []
        self.hits: dict[str, int] = {}
        self.out = "out.jsonl" if name == "sample" else "out"
        reference = server.home / f"{name}-reference"
        reference.mkdir()
        clock = time.perf_counter()
        code, log = server.run([*self.command, "--out", str(reference / self.out)], reference)
        assert code == 0, log
        self.seconds = time.perf_counter() - clock
        self.operations = int(log.split()[-1])
        self.want = snapshot(reference)

    def disturbed(self, number: int, kind: str) -> None:
        """One run, disturbed and resumed until it ends; what is wrong goes to ``failures``."""
        luck, folder = self.luck, self.server.home / f"{self.name}-{kind}-{number}"
        folder.mkdir()
        story, attempts = [], 0
        while True:
            attempts += 1
            again = self.resumed and (folder / "out/config.yaml").exists()
            command = ["resume", str(folder / "out")] if again else [*self.command, "--out", str(folder / self.out)]
            how = self.how(kind) if attempts == 1 or (attempts < 4 and luck.random() < 0.4) else {}
            code, log = self.server.run(command, folder, **how)
            story.append(f"{' '.join(command[:2])} {how} -> {code}")
            if "Traceback" in log:
                self.failures.append(f"{folder.name}: traceback after {story}\n{log[-1500:]}")
                break
            if code == 0 or (attempts > 1 and not how and "already exists" in log):  # it was whole when its end was disturbed
                code = 0
                break
            if attempts > 1 and how and "already exists" in log:  # it was whole already; what is left of it goes at the next attempt
                continue
            told = code == 2 and how.get("error") and ("Cannot write" in log or "Cannot read" in log)
            if not (code == -signal.SIGKILL and how) and not told:
                self.failures.append(f"{folder.name}: ended with {code} after {story}\n{log[-1500:]}")
                break
            kind_hit = "kill at an operation" if how.get("at") and not how.get("error") else "kill at a time" if not how.get("error") else errno.errorcode[how["error"]]  # fmt: skip
            self.hits[kind_hit] = self.hits.get(kind_hit, 0) + 1
        else:
            raise AssertionError
        if code == 0:
            have = snapshot(folder)
            if have != self.want:
                differ = sorted(n for n in {*have, *self.want} if have.get(n) != self.want.get(n))
                self.failures.append(f"{folder.name}: {differ} differ after {story}")
                return
        if not any(folder.name in f for f in self.failures):
            shutil.rmtree(folder, ignore_errors=True)

    def how(self, kind: str) -> dict:
        luck = self.luck
        if kind == "kill" and luck.random() < 0.4:
            return {"seconds": luck.random() * self.seconds}
        at = luck.randint(1, self.operations)
        if kind == "kill":
            return {"at": at}
        return {"at": at, "error": luck.choice((errno.ENOSPC, errno.EIO)), "times": luck.choice((1, 3, -1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="disturbed runs of accord rl, killed [200]")
    parser.add_argument("--errors", type=int, default=100, help="with a failing disk [100]")
    parser.add_argument("--others", type=float, default=0.2, help="for the other commands, this share of both [0.2]")
    parser.add_argument("--only", choices=COMMANDS, help="only this command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work there and keep what failed")
    parser.add_argument("--write", action="store_true", help="write the table in docs/reliability.md")
    arguments = parser.parse_args()
    home = Path(arguments.keep or tempfile.mkdtemp(prefix="accord-faults-")).absolute()
    home.mkdir(parents=True, exist_ok=True)
    make_home(home)
    server, lines, failed = Server(home), [], 0
    for name in [arguments.only] if arguments.only else COMMANDS:
        share = 1.0 if name == "rl" else arguments.others
        campaign = Campaign(name, server, random.Random(f"{arguments.seed} {name}"))
        for kind, count in (("kill", round(arguments.kills * share)), ("error", round(arguments.errors * share))):
            clock, before = time.perf_counter(), len(campaign.failures)
            campaign.hits.clear()
            for number in range(count):
                campaign.disturbed(number, kind)
            for failure in campaign.failures[before:]:
                print(failure, flush=True)
            hits = ", ".join(f"{n} {what}" for what, n in sorted(campaign.hits.items()))
            wrong = len(campaign.failures) - before
            failed += wrong
            what = "killed" if kind == "kill" else "with a failing disk"
            lines.append(f"| `accord {name}` {what} | {count} | {hits} | {campaign.operations} | {wrong or 'none'} |")
            print(lines[-1], f"{time.perf_counter() - clock:.0f} s", flush=True)
    server.close()
    if arguments.write and not failed:
        table = ["| runs | how many | disturbances that ended a process | operations on files in an undisturbed run | ended otherwise than the undisturbed one |", "|---|---|---|---|---|", *lines]  # fmt: skip
        put("table", "campaign.py", table)
    if not arguments.keep:
        shutil.rmtree(home)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
