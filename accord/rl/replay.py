"""Experience replay: the last rollouts, as tokens and rewards."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from accord.rl.experience import Experience


@dataclass
class Stored:
    """What of a rollout is kept, on the CPU. tokens, token_mask, response_mask, mask, rewards (B,T); finished (B,)."""

    tokens: Tensor
    token_mask: Tensor
    response_mask: Tensor
    mask: Tensor
    rewards: Tensor
    finished: Tensor


class Replay:
    """The completions of the newest ``steps`` rollouts, drawn from uniformly."""

    def __init__(self, steps: int) -> None:
        self._stored: deque[Stored] = deque(maxlen=steps)

    def __len__(self) -> int:
        return sum(len(stored.tokens) for stored in self._stored)

    def add(self, e: Experience) -> None:
        r = e.rollout
        kept = (r.tokens, r.token_mask, r.response_mask, e.mask, e.rewards, r.finished)
        self._stored.append(Stored(*(t.detach().cpu().clone() for t in kept)))

    def sample(self, rng: np.random.Generator, size: int, like: Experience) -> Experience:
        """``size`` completions with their rewards; the other fields of an :class:`Experience` are 0."""
        places = [(stored, row) for stored in self._stored for row in range(len(stored.tokens))]
        drawn = [places[i] for i in rng.choice(len(places), size=size, replace=len(places) < size)]
        width = max(int(stored.token_mask[row].sum()) for stored, row in drawn)
        device = like.rollout.tokens.device

        def stack(name: str) -> Tensor:
            rows = [getattr(stored, name)[row][:width] for stored, row in drawn]
            return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in rows]).to(device)

        tokens, rewards = stack("tokens"), stack("rewards")
        zeros, flat = torch.zeros_like(rewards), torch.zeros(size, device=device)
        rollout = replace(
            like.rollout,
            tokens=tokens,
            positions=torch.arange(width, device=device).expand_as(tokens),
            token_mask=stack("token_mask"),
            response_mask=stack("response_mask"),
            engine_logprobs=zeros,
            finished=torch.stack([stored.finished[row] for stored, row in drawn]).to(device),
            prompts=[],
            indices=[],
            texts=[],
            trunk=None,
        )
        names = {f.name for f in fields(Experience)}
        blank = {name: zeros for name in names if isinstance(v := getattr(like, name), Tensor) and v.ndim == 2}
        blank |= {"scores": flat, "final_values": flat, "valid": torch.ones(size, dtype=torch.bool, device=device)}
        return replace(like, **{**blank, "rollout": rollout, "mask": stack("mask"), "rewards": rewards, "parts": {}})  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        return {f"replay/{i}/{f.name}": getattr(s, f.name) for i, s in enumerate(self._stored) for f in fields(Stored)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._stored.clear()
        numbers = sorted({int(name.split("/")[1]) for name in tensors if name.startswith("replay/")})
        self._stored.extend(Stored(*(tensors[f"replay/{i}/{f.name}"] for f in fields(Stored))) for i in numbers)
