"""Rewards that misbehave in thirty ways: the completions they fail on are found, told and left out, and nothing else is lost."""

import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest

from accord.data.records import Prompt
from accord.reward.functions import CallableSource, FunctionSource, Reject
from accord.reward.sources import Reward

TEXTS = [f"text {i}" for i in range(10)]
BAD = 6  # the completion that a function below fails on

FUNCTIONS = """
import collections, ctypes, fractions, gc, itertools, multiprocessing, os, resource, signal, subprocess, sys, threading, time
import numpy

def good(completions):
    return [float(len(c)) for c in completions]

class Strange:
    def __repr__(self): raise RuntimeError("no repr")

class Unfloat:
    def __float__(self): raise KeyError("no float")

class Sly(list):
    def __len__(self): raise MemoryError("no length")

def bad(completions): return [i for i, c in enumerate(completions) if c == "text 6"]

def with_value(completions, value):
    scores = good(completions)
    for i in bad(completions): scores[i] = value
    return scores

def if_bad(act):
    def reward(prompts, completions):
        if bad(completions): act()
        return good(completions)
    return reward

def raises_quietly(): raise ValueError
def raises_loudly(): raise ValueError("x" * 10**6)
def raises_strangely():
    class Odd(Exception):
        def __str__(self): raise RuntimeError
    raise Odd
def recurses(): (lambda f: f(f))(lambda f: f(f))
def interrupts(): raise KeyboardInterrupt
def leaves(): sys.exit(3)
def dies(): os._exit(7)
def is_killed(): os.kill(os.getpid(), signal.SIGKILL)
def segfaults(): ctypes.string_at(0)
def aborts(): os.abort()
def hangs(): time.sleep(600)
def spins():
    while True: pass
def hangs_deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
def leaks():
    held = []
    while True: held.append(bytearray(2**24))
def closes_pipes():
    for fd in range(3, 64):
        try: os.close(fd)
        except OSError: pass
    raise ValueError("pipes are closed")
def writes_to_pipes():
    for fd in range(3, 64):
        try: os.write(fd, b"garbage" * 100)
        except OSError: pass
    raise ValueError("garbage was written")

nan = lambda p, c: with_value(c, float("nan"))
infinite = lambda p, c: with_value(c, float("-inf"))
text = lambda p, c: with_value(c, "good")
nested = lambda p, c: with_value(c, [1.0])
mapping = lambda p, c: with_value(c, {"score": 1})
strange = lambda p, c: with_value(c, Strange())
unfloat = lambda p, c: with_value(c, Unfloat())
huge = lambda p, c: with_value(c, 10**400)
complexly = lambda p, c: with_value(c, 1j)
array = lambda p, c: with_value(c, numpy.ones(3))
for function in (raises_quietly, raises_loudly, raises_strangely, recurses, interrupts, leaves, dies, is_killed, segfaults, aborts, hangs,
                 spins, hangs_deaf, leaks, closes_pipes, writes_to_pipes):
    globals()[function.__name__] = if_bad(function)

# These fail whatever they are given.
def none(p, c): return None
def number(p, c): return 1.0
def short(p, c): return [1.0]
def long(p, c): return [1.0] * (len(c) + 1)
def generator(p, c): return (1.0 for _ in c)
def a_string(p, c): return "x" * len(c)
def sly(p, c): return Sly([1.0] * len(c))
def endless(p, c): return [1.0] * 10**10

# And these are only odd.
def prints(p, c):
    print("hello"); sys.stdout.flush(); os.write(1, b"to the descriptor"); sys.stderr.write("and there")
    return good(c)
def forks(p, c):
    if os.fork() == 0: return [0.0] * len(c)
    return good(c)
def starts_processes(p, c):
    subprocess.Popen(["sleep", "600"])
    return good(c)
def starts_threads(p, c):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return good(c)
def changes_its_arguments(p, c):
    out = good(c); p.clear(); c.clear(); return out
def ignores_signals(p, c):
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)
    return good(c)
def reads_input(p, c):
    sys.stdin.read(); return good(c)
def changes_folder(p, c):
    os.chdir("/"); return good(c)
def bools(p, c): return [len(x) > 0 for x in c]
def fractions_(p, c): return [fractions.Fraction(len(x)) for x in c]
def numbers_as_text(p, c): return [str(float(len(x))) for x in c]
"""
ONE = {
    "nan": "returned nan", "infinite": "returned -inf", "text": "returned 'good'", "nested": r"returned \[1.0\]", "mapping": "returned {'score'",
    "strange": "returned a Strange", "unfloat": "returned <", "huge": "returned 1000", "complexly": "returned 1j", "array": "returned array",
    "raises_quietly": "raised ValueError", "raises_loudly": "raised ValueError: xxx", "raises_strangely": "raised Odd",
    "recurses": "raised RecursionError", "interrupts": "raised KeyboardInterrupt", "leaves": "raised SystemExit: 3",
    "dies": "process died .exit code 7", "is_killed": "process died .killed by signal 9", "segfaults": "process died .killed by signal 11",
    "aborts": "process died .killed by signal 6", "hangs": "did not answer within", "spins": "did not answer within",
    "hangs_deaf": "did not answer within", "leaks": "raised MemoryError", "closes_pipes": "process died", "writes_to_pipes": "garbled its own answer",
}  # fmt: skip
ALL = {"none": "NoneType", "number": "float", "short": "1 scores for 10", "long": "11 scores for 10", "generator": "generator",
       "a_string": "it returned str", "sly": "raised MemoryError", "endless": "raised MemoryError"}  # fmt: skip
ODD = ["prints", "forks", "starts_processes", "starts_threads", "changes_its_arguments", "ignores_signals", "reads_input", "changes_folder",
       "bools", "fractions_", "numbers_as_text"]  # fmt: skip


@pytest.fixture
def rollout(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    class Rows(SimpleNamespace):
        __len__ = lambda self: len(self.texts)

    return Rows(prompts=[Prompt(f"p{i}", "x") for i in range(10)], texts=TEXTS, indices=[0] * 10)


def ask(name, rollout, twice=True):
    source = FunctionSource(f"bad:{name}", timeout=60.0 if twice else 3.0, memory=2.0)  # what answers by itself may take its time
    try:
        first = source.score(rollout), source.rejects
        if twice:  # it is as ready as before
            assert (source.score(rollout), [r.row for r in source.rejects]) == (first[0], [r.row for r in first[1]])
        return first
    finally:
        source.close()


@pytest.mark.parametrize("name", ONE)
def test_the_completion_it_fails_on_is_found(name, rollout):
    slow = name in ("hangs", "spins", "hangs_deaf", "closes_pipes", "writes_to_pipes")
    scores, rejects = ask(name, rollout, twice=not slow)
    assert scores == [None if i == BAD else float(len(t)) for i, t in enumerate(TEXTS)]
    assert [reject.row for reject in rejects] == [BAD]
    import re

    assert re.search(ONE[name], rejects[0].cause), rejects[0].cause
    assert len(rejects[0].cause) < 1000


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_anyones_score_rejects_all(name, rollout):
    scores, rejects = ask(name, rollout)
    assert scores == [None] * 10 and [r.row for r in rejects] == list(range(10))
    assert ALL[name] in rejects[0].cause, rejects[0].cause


@pytest.mark.parametrize("name", ODD)
def test_what_is_only_odd_does_no_harm(name, rollout):
    scores, rejects = ask(name, rollout)
    assert scores == [1.0 if name == "bools" else float(len(t)) for t in TEXTS] and not rejects


def test_what_it_started_ends_with_it(rollout):
    before = subprocess.run(["pgrep", "-fc", "sleep 600"], capture_output=True, text=True).stdout
    ask("starts_processes", rollout)
    time.sleep(0.2)
    assert subprocess.run(["pgrep", "-fc", "sleep 600"], capture_output=True, text=True).stdout == before


def test_a_function_that_always_fails_is_not_asked_for_ever(rollout):
    calls = []

    def always(prompts, completions):
        calls.append(len(completions))
        raise ValueError("no")

    source = CallableSource(always)
    assert source.score(rollout) == [None] * 10
    assert len(calls) < 14 and "not asked" in source.rejects[-1].cause


def test_a_sum_leaves_out_what_a_part_rejects(rollout):
    import torch

    rollout.tokens = torch.zeros(10, 1)
    source = FunctionSource("bad:nan", 30.0)
    reward = Reward([(1.0, CallableSource(lambda p, c: [1.0] * len(c))), (0.5, source)])
    got = reward(rollout)
    reward.close()
    assert got.valid.tolist() == [i != BAD for i in range(10)]
    assert got.total[0] == 1 + 0.5 * 6 and got.total[BAD] == 0
    assert got.rejects == [Reject("bad:nan", BAD, "it returned nan; return a finite number, or None to skip")]


def test_a_run_goes_on_and_says_why(tmp_path):
    """From the command line: a reward that fails on some completions, then one that fails on all."""
    from conftest import save_model

    save_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(8)))
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        count = 0
        def now_and_then(prompts, completions):
            if any("say 3" in p for p in prompts): raise KeyError("three")
            return [float(len(c)) for c in completions]
        def broken(prompts, completions): raise KeyError("all")
        """)
    )
    options = ["--model", "model", "--prompts", "prompts.jsonl", "--dtype", "float32", "--top-layers", "1", "--prompts-per-step", "8",
               "--completions-per-prompt", "2", "--minibatches", "1", "--max-new-tokens", "8", "--max-steps", "2", "--max-rejected", "0.2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def accord(*arguments):
        return subprocess.run([sys.executable, "-m", "accord", *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment)

    done = accord("rl", *options, "--reward", "mine:now_and_then", "--out", "some")
    assert done.returncode == 0, done.stdout + done.stderr
    import json

    rejects = [json.loads(line) for line in (tmp_path / "some/rejects.jsonl").read_text().splitlines()]
    assert [(r["step"], r["prompt"], r["completion"]) for r in rejects] == [(s, "say 3", k) for s in (0, 1) for k in (0, 1)]
    assert all("KeyError: 'three' (mine.py:4)" in r["cause"] for r in rejects)
    metrics = [json.loads(line) for line in (tmp_path / "some/metrics.jsonl").read_text().splitlines()]
    assert [m["rejected"] for m in metrics if m["step"] >= 0] == [2.0, 2.0]
    done = accord("rl", *options, "--reward", "mine:broken", "--out", "all")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "could not be scored: reward 'mine:broken': it raised KeyError: 'all'" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker that hangs is left behind")
def test_a_worker_that_hangs_ends_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time\n"
        "def hangs(prompts, completions):\n    pathlib.Path('worker').write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    (tmp_path / "script.py").write_text(
        "from types import SimpleNamespace\nfrom accord.reward.functions import FunctionSource\n"
        "class Rows(SimpleNamespace):\n    __len__ = lambda self: 1\n"
        "FunctionSource('slow:hangs').score(Rows(prompts=[SimpleNamespace(text='x')], texts=['a']))\n"
    )
    process = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path)
    told = tmp_path / "worker"
    until = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    worker = int(told.read_text())
    os.kill(worker, 0)  # it is there
    process.kill()
    process.wait()
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid):
    """Whether there is such a process, and not only its exit code that nobody has asked for."""
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
