"""Small PPO steps for a long time in one process: memory that does not grow, no file left open.

    .venv/bin/python tests/faults/soak.py --minutes 120

After a tenth of the time (caches fill) memory is read after every step. Its slope is estimated in twenty blocks of time,
by bootstrap over the blocks; it holds if the 95% interval of the growth over the whole time reaches zero or is below
``--allowed`` megabytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent), str(Path(__file__).parent)]
BLOCKS = 20


class Enough(Exception):
    pass


def main() -> None:
    import numpy as np
    import torch
    from campaign import make_home, put

    from accord.data.sources import read_prompts
    from accord.plan import resident_memory
    from accord.reward.sources import build_reward
    from accord.rl.settings import RLSettings
    from accord.rl.trainer import train
    from accord.rollout.policy import Policy
    from accord.runs import Run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="how long [120]")
    parser.add_argument("--allowed", type=float, default=5.0, help="megabytes of growth that are taken for none [5]")
    parser.add_argument("--write", action="store_true", help="write the line in docs/reliability.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="accord-soak-"))
    make_home(home)
    (home / "soaked.py").write_text("def length(prompts, completions): return [len(c) / 10 for c in completions]\n")
    sys.path.insert(0, str(home))
    start = Policy.load(str(home / "model"), "float32")
    seconds, times, memory, handles = arguments.minutes * 60, [], [], []
    run = Run.create(home / "run", {"command": "rl"})
    begun, log = time.monotonic(), run.log

    def watched(step, stats, rows):
        log(step, stats, rows)
        now = time.monotonic() - begun
        if now > seconds / 10:
            times.append(now)
            memory.append(resident_memory() / 1e6)
            handles.append(len(os.listdir("/proc/self/fd")))
        if now > seconds:
            raise Enough

    run.log = watched
    settings = RLSettings(
        top_layers=2, prompts_per_step=8, completions_per_prompt=2, max_new_tokens=12, max_steps=10**9, dtype="float32", validate_every=20,
        validation_prompts=4, checkpoint_every=20, kl_target=2.0,
    )  # fmt: skip
    prompts = read_prompts(home / "prompts.jsonl")
    with contextlib.suppress(Enough):
        train(start, prompts, build_reward([str(home / "reward"), "soaked:length"], start), settings, run, prompts[:4])
    blocks = [np.array(part) for part in np.array_split(np.stack([times, memory], 1), BLOCKS)]
    luck = np.random.default_rng(0)
    middle = np.array([part.mean(0) for part in blocks])
    span = times[-1] - times[0]
    growth = []
    for _ in range(2000):
        drawn = middle[luck.integers(0, BLOCKS, BLOCKS)]
        if len(np.unique(drawn[:, 0])) > 1:
            growth.append(np.polyfit(drawn[:, 0], drawn[:, 1], 1)[0] * span)
    low, high = np.quantile(growth, [0.025, 0.975])
    flat = low <= arguments.allowed
    same = max(handles) - min(handles) <= 2
    line = (
        f"{arguments.minutes:g} minutes, {len(times):,} steps of 16 completions: memory {memory[0]:.0f} MB at first, {memory[-1]:.0f} MB at last; "
        f"growth over the time {np.median(growth):.1f} MB [{low:.1f}, {high:.1f}]; open files {min(handles)} to {max(handles)}."
    )
    print(line)
    if arguments.write and flat and same:
        put("soak", "soak.py", [line])
    shutil.rmtree(home)
    sys.exit(0 if flat and same else 1)


if __name__ == "__main__":
    main()
