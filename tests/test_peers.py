"""The same tensors through TRL's own code. docs/differences.md says why what differs differs.

PPO and its advantages stand inside TRL's ``train``; those lines are taken from there as they are and run.
"""

import inspect
import os
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl")
ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
from trl.trainer import utils as trl_utils  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

from accord.nn.logprobs import token_stats  # noqa: E402
from accord.rl.advantages import gae, group_normalised, leave_one_out  # noqa: E402
from accord.rl.kl import kl_estimate  # noqa: E402
from accord.rl.masked import masked_mean, whiten  # noqa: E402
from accord.rl.objective import clipped_surrogate, policy_gradient, value_loss  # noqa: E402
from accord.rl.rewards import token_rewards  # noqa: E402

B, P, T, V, K = 8, 3, 9, 13, 4  # rows; columns of prompts, of completions; vocabulary; completions of a prompt
KL_COEF, GAMMA, EPSILON, TEMPERATURE = 0.07, 0.9, 0.2, 0.8
close = dict(rtol=1e-5, atol=1e-7)


def lines_of(function, first, last, variables):
    """Run the lines of a peer's function from the one with ``first`` up to the one with ``last``; returns its variables."""
    source = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(source) if first in line)
    stop = next(i for i, line in enumerate(source[start:], start) if last in line)
    exec(textwrap.dedent("\n".join(source[start:stop])), {**vars(ppo), **variables}, variables)
    return SimpleNamespace(**variables)


@pytest.fixture(params=[0, 1, 2])
def batch(request):
    """Random float64 tensors: completions only, (B,T), ragged; ``lengths`` (B,)."""
    rng = np.random.default_rng(request.param)
    t = lambda *shape: torch.tensor(rng.normal(size=shape))
    lengths = torch.tensor(rng.integers(2, T - 1, size=B))
    mask = torch.arange(T)[None] < lengths[:, None]
    old = t(B, T) * 0.5 - 2
    return SimpleNamespace(
        lengths=lengths, mask=mask, old=old, new=(old + 0.3 * t(B, T)).requires_grad_(), ref=old + 0.2 * t(B, T), scores=t(B),
        values=t(B, T), advantages=t(B, T), full=torch.ones(B, T, dtype=torch.bool), rng=rng,
    )  # fmt: skip


def test_whitening(batch):
    """Theirs divides by the sample's standard deviation (n - 1), ours by the population's (n)."""
    n = int(batch.mask.sum())
    theirs = ppo.masked_whiten(batch.values, batch.mask)[batch.mask]
    torch.testing.assert_close(whiten(batch.values, batch.mask)[batch.mask], theirs * (n / (n - 1)) ** 0.5, **close)


def their_advantages(batch, lengths, gamma, lam):
    args = SimpleNamespace(kl_estimator="k1", kl_coef=KL_COEF, whiten_rewards=False, gamma=gamma, lam=lam)
    index = torch.arange(T).repeat(B, 1)
    padding, padding_p1 = index > (lengths - 1)[:, None], index > lengths[:, None]
    blank = lambda x: x.masked_fill(padding, ppo.INVALID_LOGPROB)
    return lines_of(
        ppo.PPOTrainer.train, "# 4. compute rewards", "advantages = masked_whiten", dict(
            ref_logprobs=blank(batch.ref), logprobs=blank(batch.old.clone()), args=args, sequence_lengths=lengths - 1,
            sequence_lengths_p1=lengths, scores=batch.scores, padding_mask_p1=padding_p1, responses=torch.zeros(B, T),
            values=batch.values.masked_fill(padding_p1, 0.0), torch=torch,
        ),
    )  # fmt: skip


def our_advantages(batch, lengths, gamma, lam):
    mask = torch.arange(T)[None] < lengths[:, None]
    kl = kl_estimate(batch.old, batch.ref, "k1").masked_fill(~mask, 0.0)
    done, nothing = torch.ones(B, dtype=torch.bool), torch.zeros(B, dtype=torch.float64)
    rewards = token_rewards(batch.scores, kl, mask, lengths - 1, KL_COEF, done, "nothing", 0.0, gamma, nothing)
    return gae(rewards, batch.values.masked_fill(~mask, 0.0), mask, gamma, lam), rewards


def test_rewards_and_gae_of_completions_that_fill_the_width(batch):
    """There the score lands on the last token in TRL too."""
    lengths = torch.full((B,), T)
    theirs = their_advantages(batch, lengths, GAMMA, 0.7)
    (advantages, returns), rewards = our_advantages(batch, lengths, GAMMA, 0.7)
    torch.testing.assert_close(rewards, theirs.rewards, **close)
    torch.testing.assert_close(advantages, theirs.advantages, **close)
    torch.testing.assert_close(returns, theirs.returns, **close)


def test_where_the_terminal_score_sits(batch):
    """In a shorter row TRL puts it one column after the last token, and asks the critic for a value there."""
    lam = 0.7
    theirs = their_advantages(batch, batch.lengths, GAMMA, lam)
    (advantages, _), rewards = our_advantages(batch, batch.lengths, GAMMA, lam)
    rows, last = torch.arange(B), batch.lengths - 1
    torch.testing.assert_close(rewards[rows, last] - theirs.rewards[rows, last], batch.scores, **close)
    torch.testing.assert_close(theirs.rewards[rows, last + 1], batch.scores, **close)
    after = batch.values[rows, last + 1]  # their V there
    expected = batch.scores - (GAMMA * after + GAMMA * lam * (batch.scores - after))
    torch.testing.assert_close(advantages[rows, last] - theirs.advantages[rows, last], expected, **close)
    # Undiscounted and without bootstrapping the extra column makes no difference.
    theirs, (ours, _) = their_advantages(batch, batch.lengths, 1.0, 1.0), our_advantages(batch, batch.lengths, 1.0, 1.0)
    torch.testing.assert_close(ours.advantages[batch.mask], theirs.advantages[batch.mask], **close)


def test_ppo_loss_and_gradient(batch):
    """From logits to the loss. Their value loss takes in the column after the last token, so rows fill the width there."""
    t = lambda *shape: torch.tensor(batch.rng.normal(size=shape))
    logits, tokens = t(B, P + T, V), torch.tensor(batch.rng.integers(0, V, size=(B, T)))
    vpred, returns, grads, losses = t(B, P + T), t(B, T), [], []
    for ours in (True, False):
        z, v = logits.clone().requires_grad_(), vpred.clone().requires_grad_()
        values = v[:, P - 1 : -1]
        if ours:
            flat = z[:, P - 1 : -1][batch.mask]
            matrix = torch.eye(V, dtype=torch.float64)
            logprobs = torch.zeros(B, T, dtype=torch.float64).masked_scatter(
                batch.mask, token_stats(flat, matrix, tokens[batch.mask], TEMPERATURE).logprobs
            )
            policy = clipped_surrogate(logprobs, batch.old, batch.advantages, batch.mask, EPSILON)
            value = value_loss(values, returns, batch.full, batch.values, 0.2)
            loss, fraction = -policy.objective + 0.6 * value.loss, policy.clip_fraction
        else:
            args = SimpleNamespace(temperature=TEMPERATURE, cliprange=EPSILON, cliprange_value=0.2, vf_coef=0.6)
            nothing = torch.zeros(B, T, dtype=torch.bool)
            # Their logits are divided in place and by temperature + 1e-7.
            forward = lambda *_, z=z, v=v: (SimpleNamespace(logits=z * (1 + 1e-7 / TEMPERATURE)), v[..., None])
            out = lines_of(
                ppo.PPOTrainer.train, "output, vpred_temp = forward(", "accelerator.backward(loss)", dict(
                    forward=forward, model=None, mb_query_responses=None, processing_class=SimpleNamespace(pad_token_id=0),
                    context_length=P, args=args, mb_responses=tokens, padding_mask=~batch.mask, padding_mask_p1=nothing,
                    micro_batch_inds=slice(None), mb_values=batch.values, mb_return=returns, mb_logprobs=batch.old,
                    mb_advantage=batch.advantages, torch=torch,
                ),
            )  # fmt: skip
            loss, fraction = out.loss, ppo.masked_mean((out.pg_losses2 > out.pg_losses).double(), batch.mask)
        loss.backward()
        losses.append((loss.detach(), fraction.double()))
        grads.append((z.grad, v.grad))
    torch.testing.assert_close(losses[0], losses[1], **close)
    torch.testing.assert_close(grads[0], grads[1], **close)


def trainer(cls, batch, **more):
    """What ``_compute_loss`` asks of its trainer."""
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    given = dict(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.new, torch.zeros(B, T), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=KL_COEF, loss_type="bnpo",
        epsilon_low=EPSILON, epsilon_high=EPSILON, use_vllm=False, vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, max_completion_length=T,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), model=SimpleNamespace(training=True),
        accelerator=accelerator, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    self = SimpleNamespace(**{**given, **more})
    ids, mask = torch.zeros(B, T, dtype=torch.long), batch.mask.long()
    return lambda **inputs: cls._compute_loss(
        self, None, dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask, **inputs)
    )


def gradient(batch, loss):
    batch.new.grad = None
    loss.backward()
    return batch.new.grad.clone()


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_grpo_loss_and_gradient(batch, loss_type):
    """With ``kl_in`` loss and k3; their loss_type bnpo and dapo average over tokens, as ours does."""
    theirs = trainer(GRPOTrainer, batch, loss_type=loss_type)(
        advantages=batch.advantages[:, 0], old_per_token_logps=batch.old, ref_per_token_logps=batch.ref,
        num_items_in_batch=batch.mask.sum(),
    )  # fmt: skip
    advantages = batch.advantages[:, :1].expand(B, T)
    kl = masked_mean(kl_estimate(batch.new, batch.ref, "k3"), batch.mask)
    ours = -clipped_surrogate(batch.new, batch.old, advantages, batch.mask, EPSILON).objective + KL_COEF * kl
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(gradient(batch, ours), gradient(batch, theirs), **close)


def test_grpo_s_own_mean_is_within_each_completion_first(batch):
    """Their loss_type grpo is ours with every token weighed by the mean length over its completion's."""
    theirs = trainer(GRPOTrainer, batch, loss_type="grpo", beta=0.0)(advantages=batch.advantages[:, 0], old_per_token_logps=batch.old)
    weight = (batch.lengths.double().mean() / batch.lengths)[:, None]
    ours = -clipped_surrogate(batch.new, batch.old, batch.advantages[:, :1] * weight, batch.mask, EPSILON).objective
    torch.testing.assert_close(gradient(batch, ours), gradient(batch, theirs), **close)


def groups(batch):
    return batch.scores, torch.arange(B) // K, torch.ones(B, dtype=torch.bool)


def test_group_normalised_advantages(batch):
    """Theirs divide by the sample's standard deviation plus 1e-4."""
    weights = torch.ones(1, dtype=torch.float64)
    self = SimpleNamespace(multi_objective_aggregation="sum_then_normalize", scale_rewards="group", reward_weights=weights)
    given = dict(
        self=self, rewards_per_func=batch.scores[:, None], num_generations=K, torch=torch, nanstd=trl_utils.nanstd,
        unscorable_mask=torch.zeros(B, dtype=torch.bool), device="cpu",
    )  # fmt: skip
    out = lines_of(
        GRPOTrainer._generate_and_score_completions, 'if self.multi_objective_aggregation == "sum', "# Unscorable completions", given
    )
    rewards = batch.scores.view(-1, K)
    deviation = rewards.std(1, keepdim=True)  # of the sample
    ours = group_normalised(*groups(batch)).view(-1, K)
    expected = ours * (deviation * (1 - 1 / K) ** 0.5) / (deviation + 1e-4)
    torch.testing.assert_close(expected.reshape(-1), out.advantages, **close)


def test_rloo_advantages_and_gradient(batch):
    """On-policy, their loss per completion (the ratio of whole completions, mean over rows) has our gradient, scaled."""
    source = SimpleNamespace(normalize_advantages=False)
    out = lines_of(
        RLOOTrainer._generate_and_score_completions, "grouped_rewards = rewards.view", "# Normalize advantages",
        dict(rewards=batch.scores, num_generations=K, torch=torch, nanstd=trl_utils.nanstd, self=source),
    )  # fmt: skip
    ours = leave_one_out(*groups(batch))
    torch.testing.assert_close(ours, out.advantages, **close)
    old = (batch.new.detach() * batch.mask).sum(-1)
    theirs = trainer(RLOOTrainer, batch)(advantages=ours, old_logps=old)
    mine = -policy_gradient(batch.new, ours[:, None].expand(B, T), batch.mask) * batch.mask.sum() / B
    torch.testing.assert_close(gradient(batch, mine), gradient(batch, theirs), **close)
