"""The work that both sides of a comparison are given; imported in accord's environment and in the peers'."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from random import Random

PROMPT, RESPONSE, ROWS = 41, 48, 32  # tokens, tokens, completions an iteration
WORDS = "sea day man sun way house water hand night world year book tree road light fire river king child word door room land city".split()


def texts(count, seed=0):
    """Prompts of exactly 41 tokens in GPT-2-like vocabularies: words that are one token each, with their space."""
    random = Random(seed)
    return ["".join(f" {random.choice(WORDS)}" for _ in range(PROMPT)) for _ in range(count)]


def encode(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) in (PROMPT, RESPONSE), f"{len(ids)} tokens: {text!r}"
    return ids


def pairs(count, seed=0):
    """(prompt, chosen, rejected), 41 and twice 48 tokens."""
    random = Random(seed + 1)
    answer = lambda: "".join(f" {random.choice(WORDS)}" for _ in range(RESPONSE))
    return [(prompt, answer(), answer()) for prompt in texts(count, seed)]


def task():
    """What this process was asked to do: a JSON object on the command line, or the name of a file with one."""
    given = sys.argv[1]
    return json.loads(given if given.startswith("{") else Path(given).read_text())


def clock(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def a_step(run, short=8, long=40, repeats=3):
    """Seconds of one decoding step: what ``long`` new tokens take more than ``short`` ones. ``run(new)`` samples."""
    run(2)
    return statistics.median((clock(lambda: run(long)) - clock(lambda: run(short))) / (long - short) for _ in range(repeats))


def report(**measured):
    """The last line of a process: its numbers and its peak memory in GB."""
    print(json.dumps({**measured, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
