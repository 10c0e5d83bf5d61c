"""The objective of one completion, token by token: what every symbol is, and how its terms add up to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accord.checkpoints import Saved
from accord.data.records import Prompt
from accord.errors import UserError
from accord.reward.sources import Reward
from accord.rl.advantages import truncated_ratio
from accord.rl.experience import Experience, score_rollout
from accord.rl.settings import RLSettings
from accord.rl.trainer import State, batch_of, roll
from accord.rollout.engine import Engine
from accord.rollout.environments import Environment
from accord.rollout.policy import Policy
from accord.rollout.scoring import score

NOT_EXPLAINED = ("trpo", "dqn", "ilql")


@dataclass
class Explained:
    """One completion of one step.

    Attributes:
        columns: a number for each of its tokens; probabilities as logs in nats.
        terms: for each term of the objective what each token gives to it, as it enters the mean over the ``count``
            tokens of the step.
        step_terms: the terms over the whole step. loss: the whole step's, minus their sum.
    """

    step: int
    algorithm: str
    prompt: str
    text: str
    score: float
    parts: dict[str, float | None]
    kl_coef: float
    count: int
    tokens: list[str]
    columns: dict[str, list[float]]
    terms: dict[str, list[float]]
    step_terms: dict[str, float]
    loss: float


def explain(
    start: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: RLSettings,
    saved: Saved | None,
    environment: Environment | None = None,
    row: int = 0,
) -> Explained:
    """Play the step that follows a checkpoint, update once, and take apart the loss as it then is.

    Old is the policy of the checkpoint, which sampled; the policy is the one after the step's updates.

    Args:
        saved: the checkpoint; None is the start of training.
        row: which of the step's completions.
    """
    state = State.begin(start, reward, settings)
    step = state.restore(saved)
    policy, critic, algorithm = state.policy, state.critic, state.algorithm
    if settings.algorithm in NOT_EXPLAINED:
        raise UserError(f"{settings.algorithm} does not ascend a sum of such terms; explain a run of another algorithm.")
    engine, guide = Engine(policy, settings.rows, settings.rollout_weights), algorithm.guide()
    rollout = roll(engine, environment, batch_of(prompts, step, settings), settings.completions_per_prompt, settings.sampling(step), guide)
    if not 0 <= row < len(rollout):
        raise UserError(f"This step has {len(rollout)} completions: choose --row 0 to {len(rollout) - 1}.")
    e = algorithm.advantages(score_rollout(policy, critic, reward, rollout, settings, guide, algorithm.old_model(policy)), state.kl.coef)
    if not bool(e.valid[row]):
        raise UserError(f"The reward skipped completion {row} (None), so it is in no term; choose another --row.")
    state.optimizer.set_step(step)
    algorithm.update(policy, critic, state.optimizer, e, step)
    return _take_apart(policy, state, e, row, step)


@torch.no_grad()
def _take_apart(policy: Policy, state: State, e: Experience, row: int, step: int) -> Explained:
    s, algorithm, critic, count = state.settings, state.algorithm, state.critic, e.mask.sum()
    alone = e.select(torch.tensor([row]))
    columns = torch.nonzero(alone.mask[0])[:, 0]
    now = score(policy.model, alone.rollout, policy.split, s.temperature, s.micro_batch_tokens, e.guide).logprobs[0, columns]
    old, ref = alone.old_logprobs[0, columns], alone.ref_logprobs[0, columns]
    ratio = (now - old).exp()
    in_reward = state.kl.coef if s.kl_in == "reward" else 0.0
    penalty = -in_reward * alone.kl[0, columns]
    table = {"log pi": now, "log pi_old": old, "log pi_ref": ref, "ratio": ratio}
    if s.rollout_weights != "same":
        table["correction"] = truncated_ratio(old, alone.rollout.engine_logprobs[0, columns], s.correction_cap)
    if s.algorithm in ("ppo", "grpo", "nlpo"):
        A, eps = alone.advantages[0, columns], s.clip_epsilon
        table["clipped"] = (((ratio > 1 + eps) & (A > 0)) | ((ratio < 1 - eps) & (A < 0))).float()
    table |= {"KL part": penalty, "score part": alone.rewards[0, columns] - penalty}
    if critic is not None:
        table["value"] = alone.values[0, columns]
    table |= {"advantage": alone.advantages[0, columns], "return": alone.returns[0, columns]}
    # A token's part in each term is what the algorithm's own loss gives with that token alone in the mask.
    parts = [
        _terms(algorithm.loss(policy, critic, replace(alone, mask=torch.zeros_like(alone.mask).index_fill(1, column, True)), count)[1])
        for column in columns
    ]
    step_terms, loss = dict.fromkeys(parts[0], 0.0), 0.0
    for index in e.rollout.micro_batches(s.micro_batch_tokens):
        piece, named = algorithm.loss(policy, critic, e.select(index), count)
        loss += float(piece)
        for name, value in _terms(named).items():
            step_terms[name] += value
    rollout = alone.rollout
    ids = rollout.tokens[0, columns].tolist()
    names = policy.tokenizer.inner.convert_ids_to_tokens(ids)
    return Explained(
        step=step,
        algorithm=s.algorithm,
        prompt=rollout.prompts[0].text,
        text=rollout.texts[0],
        score=float(alone.scores[0]),
        parts={name: values[row] for name, values in e.parts.items()},
        kl_coef=state.kl.coef,
        count=int(count),
        tokens=[policy.tokenizer.decode([i]) or name for i, name in zip(ids, names, strict=True)],
        columns={name: values.tolist() for name, values in table.items()},
        terms={name: [part[name] for part in parts] for name in parts[0]},
        step_terms=step_terms,
        loss=loss,
    )


def _terms(named: Mapping[str, Tensor]) -> dict[str, float]:
    return {name.removeprefix("term/"): float(value) for name, value in named.items() if name.startswith("term/")}
