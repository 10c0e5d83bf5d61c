"""Small PPO steps for a long time in one process: memory that does not grow, no file left open.

    .venv/bin/python tests/faults/soak.py --minutes 120

After a tenth of the time (caches fill) memory is read after every step: what the process has of the machine (resident), and
what of that is in use (glibc's ``mallinfo2``), which a leak cannot hide in and holes between blocks do not enter. Slopes are
estimated in twenty blocks of time, by bootstrap over the blocks; it holds if the 95% interval of what the memory in use grows by
over the whole time reaches zero or is below ``--allowed`` megabytes, and the resident memory grows by less than ``--holes``.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent), str(Path(__file__).parent)]
BLOCKS = 20


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]  # fmt: skip


def in_use():
    """Bytes that are allocated and not freed, by whatever uses malloc."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    now = libc.mallinfo2()
    return now.uordblks + now.hblkhd


class Enough(Exception):
    pass


def main() -> None:
    import numpy as np
    import torch
    from campaign import make_home, put

    from accord.data.sources import read_prompts
    from accord.planning.plan import resident_memory
    from accord.reward.sources import build_reward
    from accord.rl.settings import RLSettings
    from accord.rl.trainer import train
    from accord.rollout.policy import Policy
    from accord.runs import Run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="how long [120]")
    parser.add_argument("--allowed", type=float, default=5.0, help="megabytes that memory in use may grow by [5]")
    parser.add_argument("--holes", type=float, default=50.0, help="megabytes that resident memory may grow by [50]")
    parser.add_argument("--write", action="store_true", help="write the line in docs/reliability.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="accord-soak-"))
    make_home(home)
    (home / "soaked.py").write_text("def length(prompts, completions): return [len(c) / 10 for c in completions]\n")
    sys.path.insert(0, str(home))
    start = Policy.load(str(home / "model"), "float32")
    seconds = arguments.minutes * 60
    times, memory, used, handles = (array.array("d", bytes(8 * 10**6)) for _ in range(4))  # of their full size from the start
    count = 0
    run = Run.create(home / "run", {"command": "rl"})
    for i in range(400_000):  # Python's table of names grows once, by 3.84 MB, when enough have come and gone (a path's parts are such)
        sys.intern(f"come-and-gone-{i}")
    begun, log = time.monotonic(), run.log

    def watched(step, stats, rows):
        nonlocal count
        log(step, stats, rows)
        now = time.monotonic() - begun
        if now > seconds / 10:
            times[count], memory[count], used[count] = now, resident_memory() / 1e6, in_use() / 1e6
            handles[count] = len(os.listdir("/proc/self/fd"))
            count += 1
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
    span = times[count - 1] - times[0]
    luck = np.random.default_rng(0)

    def growth(values):
        """Over the whole time: estimate and 95% interval, and the blocks' means."""
        blocks = np.array([part.mean(0) for part in np.array_split(np.stack([times[:count], values[:count]], 1), BLOCKS)])
        drawn = (blocks[luck.integers(0, BLOCKS, BLOCKS)] for _ in range(2000))
        slopes = [np.polyfit(some[:, 0], some[:, 1], 1)[0] * span for some in drawn if len(np.unique(some[:, 0])) > 1]
        return np.median(slopes), *np.quantile(slopes, [0.025, 0.975]), blocks[:, 1]

    kept, kept_low, kept_high, by_block = growth(used)
    more, low, high, resident = growth(memory)
    print("in use, MB:", by_block.round(2).tolist(), "\nresident, MB:", resident.round(1).tolist())
    flat = kept_low <= arguments.allowed and low <= arguments.holes
    fewest, most = int(min(handles[:count])), int(max(handles[:count]))
    same = most - fewest <= 2
    line = (
        f"{arguments.minutes:g} minutes, {count:,} steps of 16 completions: memory in use grew by {kept:.1f} MB [{kept_low:.1f}, {kept_high:.1f}] "
        f"over the time, resident memory by {more:.1f} MB [{low:.1f}, {high:.1f}] from {resident[0]:.0f} MB; open files {fewest} to {most}."
    )
    print(line)
    if arguments.write and flat and same:
        put("soak", "soak.py", [line])
    shutil.rmtree(home)
    sys.exit(0 if flat and same else 1)


if __name__ == "__main__":
    main()
