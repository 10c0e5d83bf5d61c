"""What is measured at every step, and the warnings that come of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from accord.reward.functions import rejected_rows
from accord.rl.experience import Experience
from accord.rl.masked import masked_mean
from accord.rl.objective import explained_variance
from accord.rl.settings import RLSettings


def measure(e: Experience, kl_coef: float) -> dict[str, float]:
    """Metrics of a step's completions; nats, tokens or shares."""
    rollout, mask = e.rollout, e.rollout.response_mask
    valid = e.scores[e.valid]
    stats = {
        "score": valid.mean() if len(valid) else torch.tensor(float("nan")),
        "score_std": valid.std(correction=0) if len(valid) else torch.tensor(float("nan")),
        "kl": e.kl.sum(-1).mean(),
        "kl_coef": torch.tensor(kl_coef),
        "entropy": masked_mean(e.old_entropy, mask),
        "length": mask.sum(-1).float().mean(),
        "finished": rollout.finished.float().mean(),
        "skipped": (~e.valid).float().sum(),
        "rejected": torch.tensor(float(len(rejected_rows(e.rejects)))),
    }
    if rollout.sampled:
        gap = (rollout.engine_logprobs - e.old_logprobs)[mask]
        stats |= {"engine_gap": gap.abs().max(), "engine_kl": gap.mean()}  # the latter estimates KL[mu || pi_old] a token
    if bool(e.values.any()):  # there is a critic
        stats["explained_variance"] = explained_variance(e.values, e.returns, e.mask)
    for name, values in e.parts.items():
        given = [v for v in values if v is not None]
        stats[f"reward/{name}"] = torch.tensor(sum(given) / len(given) if given else float("nan"))
    return {name: float(value) for name, value in stats.items()}


class Watch:
    """Warns once for each thing that goes wrong."""

    def __init__(self, settings: RLSettings, warn: Callable[[str], None]) -> None:
        self._settings, self._warn, self._said = settings, warn, set[str]()

    def check(self, step: int, stats: dict[str, float]) -> None:
        s = self._settings
        if stats["kl"] > s.kl_warn:
            self._once("kl", f"step {step}: the policy is {stats['kl']:.1f} nats a completion from the reference (kl_warn {s.kl_warn:g}). Its text may fit the reward and nothing else: raise kl_coef, set kl_target, or lower learning_rate.")  # fmt: skip
        if stats["score_std"] == 0:
            self._once("flat", f"step {step}: every completion has the same score, so there is nothing to learn from; check the reward.")
        if stats["skipped"] > stats["rejected"]:
            left_out = stats["skipped"] - stats["rejected"]
            self._once("skipped", f"step {step}: the reward skipped {left_out:.0f} completions (None); they do not train.")
        if stats["rejected"]:
            self._once("rejected", f"step {step}: the reward failed on {stats['rejected']:.0f} completions; they do not train, and rejects.jsonl says why.")  # fmt: skip

    def _once(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._warn(text)
