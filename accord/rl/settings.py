"""The settings of reinforcement learning: the only place where their defaults stand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from accord.errors import did_you_mean
from accord.rl.registry import ALGORITHMS, OWNERS, SHIPPED
from accord.rollout.sampling import Sampling


class RLSettings(BaseModel):
    """Everything ``accord rl`` can be told; batch sizes are in named units."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: str = Field("ppo", description=f"How the policy learns from scores: {', '.join(ALGORITHMS)} (docs/algorithms.md)")
    advantage: Literal["gae", "monte_carlo", "leave_one_out", "group", "n_step"] = Field(
        "gae",
        description="What an action is judged by: a critic (gae); its return against a moving average; its score against, or normalised among, the prompt's other completions; n steps and a Q-value (dqn)",
    )
    adaptation: Literal["auto", "split", "lora", "full"] = Field(
        "auto",
        description="What trains: the top layers (split), adapters (lora) or all weights (full); auto is split where accord computes the model itself, full elsewhere",
    )
    top_layers: int = Field(6, ge=1, description="Layers above the split: trained ones of the policy, and of the critic")
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters")
    lora_alpha: float = Field(32.0, gt=0, description="Adapters are scaled by alpha / rank")

    prompts_per_step: int = Field(32, ge=1, description="Prompts a step (a step is one rollout and its updates)")
    completions_per_prompt: int = Field(2, ge=1, description="Completions of each prompt in a step")
    max_new_tokens: int = Field(48, ge=1, description="Length limit of a completion, in tokens")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; scoring uses the same")
    rows: int = Field(64, ge=1, description="Completions decoded side by side")

    rollout_weights: Literal["same", "int8"] = Field(
        "same",
        description="Weights the sampler multiplies by: the policy's, or those rounded to eight bits: half the memory, another distribution, corrected by the ratio of the two",
    )
    correction_cap: float = Field(2.0, ge=1, description="The most a token may count in that correction (rollout_weights int8)")

    gamma: float = Field(1.0, ge=0, le=1, description="Discount of later rewards")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's trade of bias (0) against variance (1)")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="How far the ratio may move before its gradient is cut")
    value_coef: float = Field(0.5, ge=0, description="c1, weight of the value loss")
    value_clip: float | None = Field(0.2, gt=0, description="How far a value may move from the old one in an update; null: no limit")
    entropy_coef: float = Field(0.0, ge=0, description="c2, weight of the entropy bonus")
    baseline_decay: float = Field(0.9, ge=0, lt=1, description="Share of the old value in the moving average (advantage monte_carlo)")
    penalty_beta: float = Field(1.0, gt=0, description="Start value of ppo-penalty's beta")
    penalty_target: float = Field(0.01, gt=0, description="KL[old, new] a token that ppo-penalty steers beta towards, nats")
    trust_region: float = Field(0.01, gt=0, description="TRPO's delta: the most KL[old, new] a token of a step, nats")
    cg_iterations: int = Field(10, ge=1, description="TRPO: conjugate-gradient iterations")
    cg_damping: float = Field(0.1, ge=0, description="TRPO: added to the diagonal of the Fisher matrix")
    critic_epochs: int = Field(4, ge=1, description="TRPO: passes of the critic over a step's completions")
    mask_top_p: float = Field(0.9, gt=0, le=1, description="NLPO: mass of the mask policy's likeliest tokens that may be chosen")
    mask_every: int = Field(5, ge=1, description="NLPO: steps after which the mask policy becomes the current one")
    q_scale: float = Field(
        0.05, gt=0, description="DQN, ILQL: reward units a nat of the policy's logits is worth (Boltzmann temperature, 1 / beta)"
    )
    n_step: int = Field(8, ge=1, description="DQN, ILQL: rewards summed before a target's value")
    exploration: Literal["boltzmann", "epsilon"] = Field(
        "boltzmann", description="DQN: sample from the policy, or take the likeliest token but for a share epsilon"
    )
    epsilon: float = Field(0.1, gt=0, le=1, description="DQN: share of tokens drawn from all alike (exploration epsilon)")
    replay_steps: int = Field(8, ge=1, description="DQN: rollouts that are kept and drawn from")
    target_every: int = Field(4, ge=1, description="DQN, ILQL: steps after which the target network becomes the current one")
    expectile: float = Field(0.7, ge=0.5, lt=1, description="ILQL: which expectile of Q is V; towards 1 it is the best logged token's")
    cql_coef: float = Field(0.01, ge=0, description="ILQL: weight of the term that keeps tokens never logged from looking good")
    whiten_advantages: bool = Field(True, description="Subtract the mean of the advantages and divide by their standard deviation")

    kl_coef: float = Field(0.05, ge=0, description="Penalty a nat of KL to the reference (the start value, if adaptive)")
    kl_target: float | None = Field(None, gt=0, description="Steer kl_coef towards this KL in nats a completion; null: fixed")
    kl_horizon: float = Field(2000.0, gt=0, description="Completions over which the adaptive coefficient reacts")
    kl_estimator: Literal["k1", "k2", "k3", "full"] = Field(
        "k1", description="Estimator of the KL from the sampled token, or full: the exact KL over the vocabulary"
    )
    kl_in: Literal["reward", "loss"] = Field("reward", description="Where the KL penalty stands")
    kl_warn: float = Field(25.0, gt=0, description="Warn when the policy is further than this from the reference, nats a completion")
    entropy_warn: float = Field(0.05, ge=0, description="Warn when the policy's entropy falls below this, nats a token")
    flat_groups_warn: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Warn when in more than this share of the prompts all completions have the same score (advantages within groups)",
    )
    saturation_warn: float = Field(
        0.9, ge=0, le=1, description="Warn when more than this share of the completions has the step's best score"
    )
    value_warn: float = Field(-1.0, le=1, description="Warn when the critic's explained variance is below this five steps in a row")
    kl_stop: float | None = Field(None, gt=0, description="Stop there; null: never")

    truncation: Literal["penalize", "bootstrap", "nothing"] = Field(
        "penalize", description="What a completion cut by the length limit gets besides its score"
    )
    truncation_penalty: float = Field(1.0, ge=0, description="Subtracted from the score of a cut completion")

    epochs: int = Field(2, ge=1, description="Passes over a step's completions")
    minibatches: int = Field(2, ge=1, description="Optimizer steps a pass")
    micro_batch_tokens: int = Field(4096, ge=1, description="Padded tokens computed at once; changes memory, not the gradient")
    learning_rate: float = Field(5e-5, gt=0, description="AdamW, policy")
    critic_learning_rate: float = Field(1e-4, gt=0, description="AdamW, critic")
    warmup_steps: int = Field(2, ge=0, description="Steps over which learning rates rise")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm, policy and critic each")
    max_nonfinite: int = Field(
        3, ge=1, description="This many optimizer steps in a row whose gradient is not finite are a divergence (none is ever taken)"
    )
    on_divergence: Literal["stop", "rollback"] = Field(
        "stop", description="Then: stop, or go back to the last checkpoint with half the learning rates (three times at most)"
    )

    max_steps: int = Field(50, ge=1, description="Stop after this many steps")
    stop_at_score: float | None = Field(None, description="Stop when the validation score reaches this; null: never")
    validate_every: int = Field(5, ge=1, description="Steps between validations")
    validation_prompts: int = Field(32, ge=1, description="Validation prompts sampled each time, always the same, with the same luck")
    checkpoint_every: int = Field(
        10, ge=1, description="Steps between checkpoints; the newest two and the best by validation score are kept"
    )
    reward_timeout: float = Field(60.0, gt=0, description="Seconds a reward function may take for one step's completions")
    reward_memory: float | None = Field(8.0, gt=0, description="Gigabytes a reward function may hold; null: no limit")
    max_rejected: float = Field(
        0.05, ge=0, le=1, description="Stop when a reward has failed on more than this share of the completions (see rejects.jsonl)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Dtype of the computation; trained weights are kept in float32"
    )
    seed: int = Field(0, ge=0, description="Every random number follows from it")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """What is not given takes the algorithm's own default."""
        name = values.get("algorithm", "ppo") if isinstance(values, dict) else None
        spec = ALGORITHMS.get(name) if isinstance(name, str) else None
        if spec is None:
            return values
        own = {"advantage": spec.advantages[0]} if spec.advantages else {}
        if values.get("exploration") == "epsilon" or values.get("rollout_weights", "same") != "same":
            own["kl_estimator"] = "full"
        return {**own, **spec.defaults, **values}

    @property
    def needs_critic(self) -> bool:
        return self.advantage in ("gae", "n_step")

    @model_validator(mode="after")
    def _check(self) -> RLSettings:
        self._check_combination()
        rows = self.prompts_per_step * self.completions_per_prompt
        if rows % self.minibatches:
            raise ValueError(
                f"prompts_per_step x completions_per_prompt = {rows} completions do not divide into {self.minibatches} "
                f"minibatches; set minibatches to a divisor of {rows}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target steers kl_coef by factors, so kl_coef must start above 0")
        self.sampling(0).check_training()
        return self

    def _check_combination(self) -> None:
        """Refuse what does not go together, and say why."""
        name, spec = self.algorithm, ALGORITHMS.get(self.algorithm)
        if spec is None:
            raise ValueError(f"algorithm: there is no '{name}'; use one of {', '.join(ALGORITHMS)}.{did_you_mean(name, ALGORITHMS)}")
        if spec.advantages and self.advantage not in spec.advantages:
            raise ValueError(
                f"algorithm {name} takes its advantages from {' or '.join(spec.advantages)}, not {self.advantage}"
                + (" (with a critic, the policy gradient is a2c)" if name == "reinforce" and self.advantage == "gae" else "")
            )
        if self.advantage in ("leave_one_out", "group") and self.completions_per_prompt < 2:
            raise ValueError(
                f"advantage {self.advantage} compares the completions of a prompt, so completions_per_prompt must be 2 or more"
            )
        if not spec.ratio and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"algorithm {name} has no ratio between new and old policy, so a second optimizer step would learn from another "
                "policy's samples; set epochs and minibatches to 1, or use ppo"
            )
        if self.kl_in == "loss":
            if not spec.kl_in_loss:
                raise ValueError(f"algorithm {name} has no place for the KL in its loss; set kl_in to reward")
            if self.kl_estimator == "k1":
                raise ValueError(
                    "kl_estimator k1 in the loss does nothing: the expected gradient of log pi is zero; use k2, k3 or full, or kl_in reward"
                )
        foreign = [s for s, owners in OWNERS.items() if name in SHIPPED and name not in owners]
        for setting in (*spec.unused, *foreign):
            if getattr(self, setting) != spec.defaults.get(setting, RLSettings.model_fields[setting].default):
                owners = f" (it is for {' and '.join(OWNERS[setting])})" if setting in OWNERS else ""
                raise ValueError(f"{setting} means nothing to algorithm {name}{owners}; leave it out")
        if self.advantage in ("leave_one_out", "group") and self.gamma != 1:
            raise ValueError(f"advantage {self.advantage} judges a completion as a whole, so gamma must be 1")
        if self.epsilon != RLSettings.model_fields["epsilon"].default and self.exploration != "epsilon":
            raise ValueError("epsilon means nothing to exploration boltzmann; set exploration to epsilon, or leave it out")
        if self.rollout_weights == "same" and self.correction_cap != RLSettings.model_fields["correction_cap"].default:
            raise ValueError("correction_cap means nothing to rollout_weights same: there is nothing to correct; leave it out")
        drawn = {"logged ones": spec.offline, "epsilon-greedy ones": self.exploration == "epsilon", "those of rounded weights": self.rollout_weights != "same"}  # fmt: skip
        foreign_tokens = next((name for name, there in drawn.items() if there), None)
        if foreign_tokens and self.kl_estimator != "full":
            raise ValueError(
                f"kl_estimator {self.kl_estimator} needs tokens that the policy itself has drawn; {foreign_tokens} are not, so use full"
            )
        if self.on_divergence == "rollback" and name == "trpo":
            raise ValueError("on_divergence rollback halves the learning rates, and trpo's step does not depend on them; leave it out")
        if self.truncation == "bootstrap" and self.advantage != "gae":
            raise ValueError(f"truncation bootstrap needs a critic's value, and advantage {self.advantage} has none")

    def sampling(self, step: int) -> Sampling:
        """How step ``step`` samples."""
        return Sampling(self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed * 1_000_003 + step)

    def arithmetic(self) -> str:
        """The batch sizes spelled out."""
        rows = self.prompts_per_step * self.completions_per_prompt
        updates = self.epochs * self.minibatches
        if ALGORITHMS[self.algorithm].offline:
            return (
                f"{rows} logged completions a step; {self.epochs} epochs x {self.minibatches} minibatches = {updates} optimizer steps of "
                f"{rows // self.minibatches} completions; {self.max_steps} steps = {updates * self.max_steps} optimizer steps"
            )
        return (
            f"{self.prompts_per_step} prompts x {self.completions_per_prompt} completions = {rows} completions a step; "
            f"{self.epochs} epochs x {self.minibatches} minibatches = {updates} optimizer steps of {rows // self.minibatches} completions; "
            f"{self.max_steps} steps = {rows * self.max_steps} completions, {updates * self.max_steps} optimizer steps"
        )
