"""Which algorithms there are, what each needs, and where its defaults differ from PPO's.

Adding one takes a file and an entry here (docs/algorithms.md shows how).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ADVANTAGES = {
    "gae": "generalised advantage estimation with a critic",
    "leave_one_out": "score minus the mean of the prompt's other completions",
    "group": "score normalised among the prompt's completions",
    "monte_carlo": "discounted return minus a moving average",
}
"""What an action can be judged by in a policy gradient."""


@dataclass(frozen=True)
class Spec:
    """An algorithm's entry.

    Attributes:
        where: ``module:Class``, imported when used.
        summary: one line for people.
        advantages: what may form its advantages; the first is its default.
        ratio: whether its loss corrects for the policy that sampled, so that a rollout serves several
            optimizer steps. Without, more than one would learn from another policy's samples.
        kl_in_loss: whether the penalty may stand in the loss instead of the rewards.
        offline: whether it learns from logged completions, and samples none.
        native: whether it needs a model that accord computes itself, not one run through ``transformers``.
        unused: settings that mean nothing to it; giving one is an error.
        defaults: settings whose default is another than PPO's.
    """

    where: str
    summary: str
    advantages: tuple[str, ...]
    ratio: bool = True
    kl_in_loss: bool = True
    offline: bool = False
    native: bool = False
    unused: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


OWNERS: dict[str, tuple[str, ...]] = {
    "penalty_beta": ("ppo-penalty",), "penalty_target": ("ppo-penalty",),
    "trust_region": ("trpo",), "cg_iterations": ("trpo",), "cg_damping": ("trpo",), "critic_epochs": ("trpo",),
    "mask_top_p": ("nlpo",), "mask_every": ("nlpo",),
    "q_scale": ("dqn", "ilql"), "n_step": ("dqn", "ilql"), "target_every": ("dqn", "ilql"),
    "exploration": ("dqn",), "epsilon": ("dqn",), "replay_steps": ("dqn",),
    "expectile": ("ilql",), "cql_coef": ("ilql",),
}  # fmt: skip
"""Settings that mean something to some of the shipped algorithms only."""

ONE_STEP = {"epochs": 1, "minibatches": 1}
HERE = "accord.rl.algorithms"

ALGORITHMS: dict[str, Spec] = {
    "ppo": Spec(
        f"{HERE}.ppo:PPO", "clipped ratio, several passes over each rollout (Schulman et al. 2017)", tuple(ADVANTAGES)
    ),
    "ppo-penalty": Spec(
        f"{HERE}.ppo_penalty:PPOPenalty", "no clip; an adaptive penalty on KL[old, new] (Schulman et al. 2017, sec. 4)", tuple(ADVANTAGES)
    ),
    "reinforce": Spec(
        f"{HERE}.reinforce:Reinforce", "policy gradient with a moving-average baseline (Williams 1992)", ("monte_carlo", "leave_one_out", "group"),
        ratio=False, defaults={**ONE_STEP, "whiten_advantages": False},
    ),
    "rloo": Spec(
        f"{HERE}.reinforce:Reinforce", "policy gradient, leave-one-out baseline (Ahmadian et al. 2024)", ("leave_one_out",),
        ratio=False, defaults={**ONE_STEP, "whiten_advantages": False, "completions_per_prompt": 4, "prompts_per_step": 16},
    ),
    "grpo": Spec(
        f"{HERE}.ppo:PPO", "clipped ratio, group-normalised scores, KL in the loss (Shao et al. 2024)", ("group", "leave_one_out"),
        defaults={"whiten_advantages": False, "completions_per_prompt": 4, "prompts_per_step": 16, "kl_in": "loss", "kl_estimator": "k3",
                  "epochs": 1, "minibatches": 2},
    ),
    "a2c": Spec(
        f"{HERE}.reinforce:Reinforce", "advantage actor-critic, one step a rollout (Mnih et al. 2016)", ("gae",),
        ratio=False, defaults=ONE_STEP,
    ),
    "trpo": Spec(
        f"{HERE}.trpo:TRPO", "natural gradient with a KL limit and line search (Schulman et al. 2015)", tuple(ADVANTAGES),
        kl_in_loss=False, native=True, unused=("epochs", "minibatches"), defaults=ONE_STEP,
    ),
    "nlpo": Spec(
        f"{HERE}.nlpo:NLPO", "PPO over the top-p set of a lagged mask policy (Ramamurthy et al. 2022)", tuple(ADVANTAGES), native=True
    ),
    "dqn": Spec(
        f"{HERE}.dqn:DQN", "token-level Q-learning: replay, target network, double Q (Mnih et al. 2015)", ("n_step",),
        kl_in_loss=False, unused=("correction_cap", "entropy_coef", "value_coef", "value_clip", "gae_lambda", "clip_epsilon", "whiten_advantages"), defaults={"minibatches": 4, "whiten_advantages": False},
    ),
    "ilql": Spec(
        f"{HERE}.ilql:ILQL", "offline, from logged completions: implicit language Q-learning (Snell et al. 2022)", ("n_step",),
        kl_in_loss=False, offline=True, unused=("rollout_weights", "correction_cap", "entropy_coef", "value_coef", "value_clip", "gae_lambda", "clip_epsilon", "kl_coef", "kl_target", "whiten_advantages"),
        defaults={"prompts_per_step": 64, "completions_per_prompt": 1, "epochs": 1, "minibatches": 4, "whiten_advantages": False,
                  "kl_coef": 0.0, "kl_estimator": "full", "target_every": 1},
    ),
}  # fmt: skip

SHIPPED = tuple(ALGORITHMS)
