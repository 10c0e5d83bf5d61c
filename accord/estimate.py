"""How long a recipe will take here: a few seconds of decoding and of matrix work, scaled to its token counts."""

from __future__ import annotations

import time

import torch

from accord.config import Recipe
from accord.data.records import Prompt
from accord.nn.transformer import Transformer
from accord.progress import console
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling

PROMPTS = {"train": 0.65, "validation": 0.10, "heldout": 0.25}


def print_estimate(policy: Policy, recipe: Recipe, prompts: int = 660) -> None:
    """Print the batch arithmetic and an estimate of minutes a stage."""
    console.print(f"[dim]{recipe.rl.arithmetic()}[/]", soft_wrap=True)
    if not isinstance(policy.model, Transformer):
        return
    token, step = _calibrate(policy)
    s, rl, e = recipe.sample, recipe.rl, recipe.evaluation
    width = 45 + s.max_new_tokens
    depth = policy.model.depth
    top = rl.top_layers / depth if rl.adaptation in ("auto", "split") else 1.0
    sampled = prompts * (PROMPTS["train"] + PROMPTS["validation"]) * s.per_prompt
    minutes = {
        "completions": sampled * s.max_new_tokens * step / s.rows,
        "reward": sampled * width * token * (1 + 3 * recipe.reward.epochs * recipe.reward.top_layers / depth),
        "rl": rl.max_steps * rl.prompts_per_step * rl.completions_per_prompt
        * (rl.max_new_tokens * step / rl.rows + (45 + rl.max_new_tokens) * token * top * (4 + 8 * rl.epochs)),
        "evaluation": 2 * prompts * PROMPTS["heldout"] * e.per_prompt * (e.max_new_tokens * step / e.rows + 3 * width * token),
    }  # fmt: skip
    parts = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in minutes.items())
    console.print(f"Estimate for this machine: about {sum(minutes.values()) / 60:.0f} minutes ({parts}).", soft_wrap=True)


@torch.inference_mode()
def _calibrate(policy: Policy) -> tuple[float, float]:
    """Seconds a token of a forward pass, and seconds a decoding step of 64 rows."""
    assert isinstance(policy.model, Transformer)
    tokens = torch.zeros(16, 96, dtype=torch.long, device=policy.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    positions = torch.arange(96, device=policy.device).expand_as(tokens)
    seconds = []
    for _ in range(2):
        clock = time.perf_counter()
        policy.model.hidden(tokens, positions, mask)
        seconds.append(time.perf_counter() - clock)
    engine, prompt = Engine(policy, 64), Prompt("calibration", "Tell me about the weather and the sea.")
    laps = []
    for new in (2, 10):
        clock = time.perf_counter()
        engine.sample([prompt], 64, Sampling(max_new_tokens=new))
        laps.append(time.perf_counter() - clock)
    return min(seconds) / tokens.numel(), max((laps[1] - laps[0]) / 8, 1e-4)
