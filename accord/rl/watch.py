"""What is measured at every step, and the warnings that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

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
        "at_best": torch.isclose(valid, valid.max(), rtol=0, atol=1e-6).float().mean() if len(valid) else torch.tensor(float("nan")),
        "flat_groups": _flat_groups(e),
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


def _flat_groups(e: Experience) -> Tensor:
    """Share of the prompts with several scored completions whose scores are all the same; 0 if there are none."""
    group, scores = e.rollout.group[e.valid], e.scores[e.valid]
    sizes = torch.bincount(group)
    low, high = (torch.zeros(len(sizes), device=scores.device).scatter_reduce(0, group, scores, how, include_self=False) for how in ("amin", "amax"))  # fmt: skip
    several = sizes > 1
    return (high - low < 1e-6)[several].float().mean() if bool(several.any()) else torch.tensor(0.0)


class Watch:
    """Names what goes wrong, with the remedy: once in the terminal and the report, at every step in the metrics.

    What it has said and counted belongs to a checkpoint: a resumed run says nothing twice.
    """

    PATIENCE = 5  # steps in a row that a critic may be worse than none

    def __init__(self, settings: RLSettings, warn: Callable[[int, str, str], None]) -> None:
        self._settings, self._warn = settings, warn
        self._said: list[str] = []
        self._worse = 0

    def check(self, step: int, stats: Mapping[str, float]) -> dict[str, float]:
        """``warning/NAME``: 1 for each thing that is wrong at this step."""
        s = self._settings
        found: dict[str, str] = {}
        if stats["kl"] > s.kl_warn:
            found["kl"] = f"the policy is {stats['kl']:.1f} nats a completion from the reference (kl_warn {s.kl_warn:g}). Its text may fit the reward and nothing else: raise kl_coef, set kl_target, or lower learning_rate."  # fmt: skip
        if stats["entropy"] < s.entropy_warn:
            found["entropy"] = f"the policy's entropy is {stats['entropy']:.3f} nats a token (entropy_warn {s.entropy_warn:g}): it writes nearly the same every time, and so learns little more. Raise entropy_coef or kl_coef, or lower learning_rate."  # fmt: skip
        if stats["at_best"] == 1 or stats["score_std"] == 0:
            found["flat"] = "every completion has the same score, so there is nothing to learn from; check the reward."
        elif stats["at_best"] > s.saturation_warn:
            found["saturation"] = f"{stats['at_best']:.0%} of the completions have the step's best score (saturation_warn {s.saturation_warn:g}): the reward tells them apart no more. Stop here, or give a finer reward."  # fmt: skip
        elif s.advantage in ("group", "leave_one_out") and stats["flat_groups"] > s.flat_groups_warn:
            found["flat_groups"] = f"in {stats['flat_groups']:.0%} of the prompts all completions have the same score (flat_groups_warn {s.flat_groups_warn:g}), and these teach nothing: raise completions_per_prompt or temperature, choose prompts of middling difficulty, or give a finer reward."  # fmt: skip
        self._worse = self._worse + 1 if stats.get("explained_variance", 1.0) < s.value_warn else 0
        if self._worse >= self.PATIENCE:
            found["value"] = f"the critic explains the returns worse than their mean does (explained variance {stats['explained_variance']:.1f}, below value_warn {s.value_warn:g} for {self._worse} steps): lower critic_learning_rate, or use an algorithm without a critic (rloo, grpo)."  # fmt: skip
        if stats["skipped"] > stats["rejected"]:
            found["skipped"] = f"the reward skipped {stats['skipped'] - stats['rejected']:.0f} completions (None); they do not train."
        if stats["rejected"]:
            found["rejected"] = f"the reward failed on {stats['rejected']:.0f} completions; they do not train, and rejects.jsonl says why."
        for name, text in found.items():
            self.once(step, name, text)
        return {f"warning/{name}": 1.0 for name in found}

    def once(self, step: int, name: str, text: str) -> None:
        """Say it unless something of this name was said before."""
        if name not in self._said:
            self._said.append(name)
            self._warn(step, name, text)

    def state(self) -> dict[str, Any]:
        return {"said": list(self._said), "worse": self._worse}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._said, self._worse = list(state.get("said", [])), int(state.get("worse", 0))
