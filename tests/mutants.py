"""Break each formula in turn; the tests named beside it must notice.

    python tests/mutants.py            # all of them: a line each, exit 1 if one survives
    python tests/mutants.py GAE kl     # those whose file or description has one of these words
    python tests/mutants.py --write    # and write the table, docs/mutants.md
    python tests/mutants.py --third    # every third of them, as make test does; make test-faults does all

A mutant is one changed piece of source, put in place of its module in a forked process; files stay as they are.
"""

import contextlib
import importlib.abc
import importlib.util
import io
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
TABLE = ROOT / "docs" / "mutants.md"

MATH, ALG, PPO, ROLL = "test_rl_math.py", "test_algorithms.py", "test_ppo.py", "test_rollout.py"
LOSS = "test_loss_and_gradient_equal_the_oracle"

# (module, what stands there, what is put there instead, what is wrong then, test file, -k)
MUTANTS = [
    # Advantages.
    ("rl/advantages", "rewards[:, t] + gamma * next_value - values[:, t]", "rewards[:, t] + next_value - values[:, t]", "GAE: delta without gamma", MATH, "gae"),
    ("rl/advantages", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage", "GAE: lambda forgotten", MATH, "gae"),
    ("rl/advantages", "delta + gamma * lam * next_advantage", "delta + lam * next_advantage", "GAE: gamma forgotten in the recursion", MATH, "gae"),
    ("rl/advantages", "next_value = values.new_zeros(B)", "next_value = values[:, -1]", "GAE without (1 - done): a value after the end", MATH, "gae"),
    ("rl/advantages", "next_advantage = torch.where(chosen, advantage, next_advantage)", "next_advantage = advantage", "GAE: tokens of the environment not stepped over", MATH, "gae"),
    ("rl/advantages", "next_value = torch.where(chosen, values[:, t], next_value)", "next_value = values[:, t]", "GAE: values of the environment's tokens taken in", MATH, "gae"),
    ("rl/advantages", "torch.where(mask, advantages + values, 0.0)", "torch.where(mask, advantages, 0.0)", "returns without the value", MATH, "gae"),
    ("rl/advantages", "& ~torch.eye(len(group), dtype=torch.bool, device=group.device)", "", "leave-one-out: the completion itself in its baseline", ALG, "advantages or by_hand"),
    ("rl/advantages", "totals - baseline, 0.0)", "baseline - totals, 0.0)", "leave-one-out: sign", ALG, "advantages or by_hand"),
    ("rl/advantages", "(totals - mean) / (deviation + eps), 0.0)", "totals - mean, 0.0)", "group advantage: not divided by the deviation", ALG, "advantages"),
    ("rl/advantages", "(totals[None, :] - mean[:, None]) ** 2", "(totals[None, :]) ** 2", "group advantage: second moment for variance", ALG, "advantages"),
    ("rl/advantages", "target = rewards + gamma * shifted", "target = rewards + shifted", "n-step targets: discount forgotten", ALG, "advantages"),
    ("rl/advantages", "following = torch.where(mask[:, t], target[:, t], following)", "following = target[:, t]", "n-step targets: other columns not stepped over", ALG, "advantages"),
    ("rl/advantages", "(logprobs - sampled_logprobs).exp()", "(sampled_logprobs - logprobs).exp()", "correction of the sampler upside down", ALG, LOSS + " and eight"),
    ("rl/advantages", ".exp().clamp(max=cap)", ".exp()", "correction of the sampler without its cap", ALG, LOSS + " and eight"),
    # Masks, means, whitening.
    ("rl/masked", "denominator = mask.sum() if count is None else count", "denominator = mask.sum()", "mean over the micro-batch, not the whole step", MATH, "accumulated"),
    ("rl/masked", "denominator = mask.sum() if count is None else count", "denominator = mask.numel() if count is None else count", "mean over padding too", MATH, "surrogate"),
    ("rl/masked", "return masked_sum(values, mask) / denominator", "return masked_sum(values, mask)", "sum for mean", MATH, "surrogate"),
    ("rl/masked", "torch.where(mask, values, torch.zeros_like(values)).sum()", "values.sum()", "what lies under the mask counts", MATH, "under_the_mask"),
    ("rl/masked", "centred / (deviation + eps), torch", "values / (deviation + eps), torch", "whitening: mean not subtracted", MATH, "whitening"),
    ("rl/masked", "masked_mean(centred**2, mask).sqrt()", "masked_mean(centred**2, mask)", "whitening: variance for deviation", MATH, "whitening"),
    ("rl/masked", "deviation > ROUNDING * largest", "deviation >= 0", "whitening: rounding blown up", ALG, "teach_nothing"),
    # Rewards and KL.
    ("rl/rewards", "(-kl_coef * kl)", "(kl_coef * kl)", "sign of the KL penalty", MATH, "token_rewards"),
    ("rl/rewards", "rewards.scatter_add(1, last[:, None], terminal[:, None])", "rewards.scatter_add(1, last[:, None] - 1, terminal[:, None])", "score one token early", MATH, "token_rewards"),
    ("rl/rewards", "terminal = terminal - penalty * cut", "terminal = terminal * (1 - cut) - penalty * cut", "truncation replaces the score", MATH, "token_rewards"),
    ("rl/rewards", "terminal + gamma * final_values * cut", "terminal + gamma * final_values", "finished episodes bootstrapped too", MATH, "token_rewards"),
    ("rl/rewards", "cut = (~finished)", "cut = (finished)", "finished and truncated mixed up", MATH, "token_rewards"),
    ("rl/kl", "return d**2 / 2", "return d**2", "k2 without its half", MATH, "kl"),
    ("rl/kl", "torch.expm1(-d) + d", "torch.expm1(d) - d", "k3 of the other direction", MATH, "kl"),
    ("rl/kl", "d = logprobs - ref_logprobs", "d = ref_logprobs - logprobs", "KL of the other direction", MATH, "kl"),
    ("rl/kl", "kl / self.target - 1.0", "1.0 - kl / self.target", "adaptive KL steers the wrong way", MATH, "adaptive"),
    ("rl/kl", "-0.2), 0.2)", "-2.0), 2.0)", "adaptive KL: error not clipped", MATH, "adaptive"),
    # Objectives.
    ("rl/objective", "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)", "PPO: max for min", MATH, "surrogate or clip"),
    ("rl/objective", "torch.minimum(unclipped, clipped)", "clipped", "PPO: always clipped, the way back cut too", MATH, "surrogate or clip"),
    ("rl/objective", "ratio.clamp(1 - epsilon, 1 + epsilon)", "ratio.clamp(1 / (1 + epsilon), 1 + epsilon)", "PPO: lower end of the clip", MATH, "surrogate or clip"),
    ("rl/objective", "log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)\n    ratio = log_ratio.exp()", "log_ratio = torch.where(mask, old_logprobs.detach() - logprobs, 0.0)\n    ratio = log_ratio.exp()", "ratio upside down", MATH, "surrogate"),
    ("rl/objective", "(clipped < unclipped).float()", "(clipped != unclipped).float()", "clip fraction counts what the clip does not cut", MATH, "clip_fraction"),
    ("rl/objective", "0.5 * masked_mean(torch.maximum(error, near_error)", "0.5 * masked_mean(torch.minimum(error, near_error)", "value clip: min for max", MATH, "value_loss"),
    ("rl/objective", "0.5 * masked_mean(torch.maximum(error, near_error)", "masked_mean(torch.maximum(error, near_error)", "value loss without its half", MATH, "value_loss"),
    ("rl/objective", "near = old + (values - old).clamp(-clip, clip)", "near = values.clamp(-clip, clip)", "value clip around 0, not around the old value", MATH, "value_loss"),
    ("rl/objective", "ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()", "ratio = torch.where(mask, logprobs, 0.0).exp()", "ratio without the old policy", ALG, LOSS + " and penalty"),
    ("rl/objective", "1 - error.var(correction=0) / target.var(correction=0)", "error.var(correction=0) / target.var(correction=0)", "explained variance upside down", MATH, "explained"),
    # Log-probabilities.
    ("nn/logprobs", "        logits = logits / temperature\n", "        pass\n", "temperature forgotten", MATH, "token_stats"),
    ("nn/logprobs", "-(logp.exp() * logp).sum(-1))", "-logp.sum(-1))", "entropy without its weights", MATH, "token_stats"),
    ("nn/logprobs", "return (dz * slope)", "return (dz)", "temperature forgotten in the gradient", MATH, "gradient_is_autograd"),
    ("nn/logprobs", "b[:, None] * (logp + entropy))", "b[:, None] * logp)", "entropy's gradient without the entropy", MATH, "gradient_is_autograd"),
    ("nn/logprobs", "(P * (p - q - (P * (p - q))", "(P * (p - q + (P * (p - q))", "exact KL: sign in its gradient", ALG, "exact_kl"),
    ("nn/logprobs", "(q.exp() - P) * g", "(P - q.exp()) * g", "exact KL: sign of the other side's gradient", ALG, "exact_kl"),
    ("nn/logprobs", "probability.cumsum(-1) - probability < top_p", "probability.cumsum(-1) < top_p", "nucleus: the token that reaches the mass left out", ALG, "nucleus"),
    ("nn/layout", "common.long().cumprod(1).sum(1)", "common.long().sum(1)", "tokens shared after rows have parted", "test_layout.py", "beginning"),
    ("nn/attention", "hidden = distance < 0\n", "hidden = distance > 0\n", "attention to what comes after", "test_layout.py", "attention_and"),
    ("rollout/rollout", "torch.cat((self.response_mask[:, 1:], torch.zeros_like(self.response_mask[:, :1])), dim=1)", "self.response_mask", "state after the token for the state before it", ALG, LOSS + " and reinforce"),
    # Algorithms.
    ("rl/algorithms/base", '"entropy": s.entropy_coef * entropy}', '"entropy": -s.entropy_coef * entropy}', "sign of the entropy bonus", ALG, LOSS + " and a2c"),
    ("rl/algorithms/base", "-s.value_coef * value.loss", "-value.loss", "c1 forgotten", ALG, LOSS + " and a2c"),
    ("rl/algorithms/base", '"kl": -rows.kl_coef', '"kl": rows.kl_coef', "sign of the KL in the loss", ALG, LOSS + " and grpo"),
    ("rl/algorithms/base", "kl_estimate(scored.logprobs, rows.ref_logprobs", "kl_estimate(scored.logprobs, rows.old_logprobs", "old policy for the reference", ALG, LOSS + " and grpo"),
    ("rl/credit", 'in_reward = kl_coef if s.kl_in == "reward" else 0.0', "in_reward = kl_coef", "KL penalised twice", ALG, LOSS + " and grpo"),
    ("rl/credit", "        return before\n", "        return self.baseline\n", "REINFORCE: baseline knows the rollout it judges", ALG, "baseline_lags"),
    ("rl/algorithms/ppo", "rows.old_logprobs, rows.advantages", "rows.ref_logprobs, rows.advantages", "reference for the old policy in the ratio", ALG, LOSS + " and ppo-0"),
    ("rl/objective", "torch.where(mask, logprobs, 0.0) * advantages.detach()", "torch.where(mask, logprobs, 0.0) * advantages.detach().abs()", "policy gradient: advantage without its sign", ALG, LOSS + " and reinforce"),
    ("rl/algorithms/ppo_penalty", "self.settings.temperature, reverse=True)", "self.settings.temperature)", "PPO-penalty: KL[new, old] for KL[old, new]", ALG, LOSS + " and penalty"),
    ("rl/algorithms/ppo_penalty", "moved = -self.beta", "moved = self.beta", "PPO-penalty: sign", ALG, LOSS + " and penalty"),
    ("rl/algorithms/ppo_penalty", "        return beta / 2\n", "        return beta * 2\n", "PPO-penalty: beta adapts the wrong way", ALG, "rule_by_hand"),
    ("rl/natural", "s = p * (t - (p * t).sum(-1, keepdim=True))", "s = p * t", "TRPO: Fisher matrix without p p^T", ALG, "fisher"),
    ("rl/natural", "/ temperature**2 * kept", "/ temperature * kept", "TRPO: temperature once", ALG, "fisher"),
    ("rl/algorithms/trpo", "if kl <= s.trust_region and now > start:", "if now > start:", "TRPO: KL limit not looked at", ALG, "keeps_its_limit"),
    ("rl/algorithms/trpo", "(2 * s.trust_region / curvature) ** 0.5", "(2 * s.trust_region / curvature)", "TRPO: step length without its root", ALG, "keeps_its_limit"),
    ("rl/natural", "p = r + size / last * p", "p = r", "conjugate gradient: steepest descent", ALG, "conjugate"),
    ("rl/algorithms/dqn", "theirs = logits_at(model, rows, policy.split, s.temperature, best)", "theirs = logits_at(model, rows, policy.split, s.temperature)", "DQN: value of the action taken, not of the best", ALG, "dqn_targets"),
    ("rl/algorithms/dqn", "s.q_scale * spread(theirs.chosen - theirs.largest, rows.rollout)", "0.0 * spread(theirs.chosen - theirs.largest, rows.rollout)", "DQN: max over the target network instead of double Q", ALG, "dqn_targets"),
    ("rl/algorithms/dqn", "q = values_before(critic, rows.rollout)[0] + ", "q = values_before(critic, rows.rollout)[0] - ", "DQN: advantage subtracted", ALG, "dqn_targets"),
    ("rl/algorithms/qlearning", "            take_over(module, {", "            dict({", "Q-learning: a checkpoint's target network is not taken over", ALG, "resume and ilql"),
    ("rl/qvalues", ".sum(-1) / temperature", ".sum(-1)", "Q: temperature forgotten", ALG, "dqn_targets"),
    ("rl/algorithms/dqn", "rows.mask, s.gamma, s.n_step)", "rows.mask, 1.0, s.n_step)", "DQN: target without the discount", ALG, "dqn_targets"),
    ("rl/algorithms/ilql", "q = value.detach() + self", "q = value + self", "ILQL: missing stop-gradient, V learns from Q's error", ALG, "ilql_targets"),
    ("rl/algorithms/ilql", "spread(z - z_ref, rows.rollout)", "spread(z, rows.rollout)", "ILQL: Q not relative to the reference", ALG, "ilql_targets"),
    ("rl/algorithms/ilql", "cql = -masked_mean", "cql = masked_mean", "ILQL: sign of the CQL term", ALG, "ilql_targets"),
    ("rl/algorithms/ilql", "expectile_loss(rows.values - value,", "expectile_loss(value - rows.values,", "ILQL: the lower expectile", ALG, "ilql_targets"),
    ("rl/algorithms/ilql", "values_before(critic, rollout)[0], rows.mask, s.gamma", "values_before(old_critic, rollout)[0], rows.mask, s.gamma", "ILQL: V(s') of the target network", ALG, "ilql_targets"),
    ("rl/objective", "torch.where(error < 0, 1 - tau, tau)", "torch.where(error < 0, tau, 1 - tau)", "expectile: tau upside down", ALG, "expectile_by_hand"),
    ("nn/logprobs", "self.base * theirs + self.strength * (logits - theirs)", "self.base * theirs + self.strength * (theirs - logits)", "contrast: away from the policy", ALG, "contrast"),
    ("nn/logprobs", "        return self.strength\n", "        return 1.0\n", "contrast: strength forgotten in the gradient", ALG, "contrast"),
    ("nn/logprobs", "1 - self.epsilon)", "1.0)", "epsilon-greedy: more than all", ALG, "epsilon_greedy_by_hand"),
    ("rl/offline", "row.rewards[row.end - 1] += one.score - sum", "row.rewards[row.end - 1] += one.score - 0 * sum", "a log's rewards counted twice", ALG, "logged_so"),
    ("data/pairs", "(i, j) if places[i] < places[j] else (j, i)", "(i, j) if places[i] > places[j] else (j, i)", "pairs: the worse is preferred", "test_data.py", "conversion_table"),
    ("data/pairs", "if ranking.ranks[i] is not None:", "if True:", "pairs: two F are a tie", "test_data.py", "conversion_table"),
    ("data/pairs", "len(used) if rank is None else used.index(rank)", "len(used) if rank is None else rank", "pairs: distance in numbers given, not in ranks", "test_data.py", "conversion_table"),
    ("reward/comparison", "return self._davidson(d) - d / 2", "return self._davidson(d) - d", "Davidson: strengths without their roots", "test_reward.py", "by_hand"),
    ("reward/comparison", "F.softplus(self.threshold - d)", "F.softplus(-self.threshold - d)", "Rao-Kupper: threshold helps", "test_reward.py", "by_hand"),
    ("reward/comparison", "torch.log(torch.expm1(2 * at))", "torch.log(torch.expm1(at))", "Rao-Kupper: theta for its square", "test_reward.py", "by_hand"),
    ("reward/comparison", "group.weight * (torch.cat(losses) * weight).sum() / weight.sum()", "(torch.cat(losses) * weight).mean()", "pair loss: not divided by the group's weight", "test_reward.py", "by_hand"),
    ("reward/comparison", "return total / len(groups)", "return total", "pair loss: sum over prompts", "test_reward.py", "by_hand"),
    ("reward/comparison", "[pair.distance - 1 for pair in pairs]", "[pair.distance for pair in pairs]", "margin: also between neighbours", "test_reward.py", "margin"),
    ("feedback/agreement", "(upto[k] - (upto[c] - totals[c]) - (totals[c] + totals[k]) / 2) ** 2", "(k - c) ** 2", "alpha: interval for ordinal", "test_agreement.py", "own_example"),
    ("feedback/agreement", "/ max(n - 1, 1))", "/ n)", "alpha: chance with replacement", "test_agreement.py", "own_example"),
    ("feedback/agreement", "12 * spread / whole", "12 * spread / (m * m * (n**3 - n))", "Kendall's W: not corrected for ties", "test_agreement.py", "friedman"),
    ("feedback/agreement", "counts += smoothing * everyone / everyone.sum(0)", "counts = everyone + 0 * counts", "Dawid-Skene: every labeler is the average one", "test_agreement.py", "own_equations"),
    # What people say, and what is told of it.
    ("feedback/overview", "float(c.value * difference > 0)", "float(difference > 0)", "length preference: whichever is preferred", "test_overview.py", "by_hand"),
    ("feedback/overview", "for sign in (1, -1))", "for sign in (1, 1))", "confusion of repeated items from one side", "test_overview.py", "by_hand"),
    ("feedback/overview", "asked = {r.prompt_id for r in on_gold}", "asked = set()", "known ranks are compared with nothing", "test_overview.py", "by_hand"),
    ("feedback/priority", ".mean(0), 1e-12", "[0], 1e-12", "uncertainty: models' disagreement does not count", "test_store.py", "uncertain_prompts"),
    ("feedback/priority", "one - other, -50, 50", "one + other, -50, 50", "uncertainty of a sum of scores", "test_store.py", "uncertain_prompts"),
    ("feedback/store", "items.c.taken < settings.overlap", "items.c.taken <= settings.overlap", "another overlap asks for one ranking too many", "test_store.py", "overlap or settings"),
    ("data/pairs", "for prompt, given in found.items()} | last", "for prompt, given in found.items()}", "a reviewer's decision counts for nothing", "test_store.py", "decision"),
    ("feedback/web/labeling", "place = {index: place for place, index in enumerate(order)}", "place = {place: index for place, index in enumerate(order)}", "ranks of the wrong completions", "test_web.py", "as_they_were_imported"),
    ("feedback/web/site", "if told != session.csrf:", "if told is None:", "any token will do", "test_web.py", "own_pages"),
    ("feedback/web/security", "if _netloc(origin) != host or not host:", "if not host:", "another page's form is taken", "test_web.py", "own_pages"),
    ("feedback/web/security", "if had > most:", "if had > 10 * most:", "a body without a length may be of any", "test_web.py", "too_large"),
    ("feedback/web/doors", "wait = site.by_name.take(name) or site.by_address.take(address)", "wait = site.by_address.take(address)", "a name's password may be guessed as often as an address may ask", "test_web.py", "guessing"),
    ("feedback/people", "query.where(invitations.c.taken_by.is_(None), ", "query.where(", "an invitation is for everybody", "test_web.py", "invitation"),
    ("data/pairs", "(above - below)", "(below - above)", "score by rank: the last is best", "test_data.py", "scores_by_rank"),
    # Rollouts.
    ("rollout/sampling", "right=True", "right=False", "inverse CDF: the token before the one passed", ROLL, "inverse_cdf"),
    ("rl/experience", "before = torch.cat((torch.zeros_like(after[:, :1]), after[:, :-1]), dim=1)", "before = after", "value after the token for the value before it", ALG, LOSS + " and a2c"),
    # The decisions of the design.
    ("rl/experience", "lambda tokens: score(policy.start, rollout, policy.trunk_layers,", "lambda tokens: score(policy.model, rollout, policy.split,", "reference: the policy itself, not the start", PPO, "kl_is_to_the_start"),
    ("rl/selftest", "if not (mean <= tolerance and largest <= most):", "if False:", "self-test never fails", PPO, "self_test"),
    ("rl/selftest", "    if not good:\n", "    if False:\n", "mask not checked", PPO, "self_test"),
    ("supervised/imitation", "1.0, entropic=False).logprobs.sum() / count", "1.0, entropic=False).logprobs.sum() / max(1, int(rollout.response_mask.sum()))", "a mean of micro-batches' means", "test_sft.py", "gradient"),
    ("supervised/training", "share := rate_at(step, task.steps, settings)", "share := 1.0", "the learning rate stays where it is", "test_sft.py", "adamws"),
    ("supervised/training", 'self.optimizer.load_state(under("optimizer/", saved.tensors))', "pass", "a resumed run forgets Adam's moments", "test_sft.py", "stop"),
    # Preferences without reinforcement learning.
    ("supervised/preference", "return ratio / of.tokens if settings.loss == \"ipo\" else beta * ratio", "return beta * ratio", "IPO: sums for means", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "ratio = of.policy - of.reference", "ratio = of.policy", "DPO without its reference", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "return (d - 1 / (2 * settings.strength)) ** 2", "return (d - 1 / settings.strength) ** 2", "IPO: the margin twice too large", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "return -F.logsigmoid(d - settings.gamma)", "return -F.logsigmoid(d + settings.gamma)", "SimPO: sign of the margin", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "return mean - log1mexp(mean)", "return mean", "ORPO: log-probabilities for log-odds", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "return -(of.policy / of.tokens)[better] - settings.strength", "return -settings.strength", "ORPO without what it imitates", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "torch.sigmoid(z - r), settings.undesirable_weight * torch.sigmoid(r - z)", "torch.sigmoid(r - z), settings.undesirable_weight * torch.sigmoid(z - r)", "KTO upside down", "test_prefer.py", "hand or trls"),
    ("supervised/preference", "[numbers[-1], *numbers[:-1]], strict=True)", "numbers, strict=True)", "KTO: the KL from each prompt's own completions", "test_prefer.py", "trls and kto"),
    ("supervised/preference", "loss = group.weight * (losses * weights).sum() / weights.sum().clamp_min(1e-12)", "loss = (losses * weights).sum() / weights.sum().clamp_min(1e-12)", "prompts' weights forgotten", "test_prefer.py", "rankings"),
    ("supervised/preference", "total = total + loss / len(numbers)", "total = total + loss / len(part)", "a mean of micro-batches' means", "test_prefer.py", "trls"),
    ("supervised/comparisons", "net[pair.other] -= pair.weight", "pass", "KTO: nothing is undesirable", "test_prefer.py", "rankings"),
    # Pretraining.
    ("nn/layout", "- (lengths.cumsum(0) - lengths)[row]", "", "positions count on from document to document", "test_pretrain.py", "apart or packed"),
    ("nn/layout", "Places.once(row * widest + positions, torch.Size((len(lengths), widest)))", "Places.once(torch.arange(len(tokens)), torch.Size((1, len(tokens))))", "documents see those before them", "test_pretrain.py", "apart or packed"),
    ("pretraining/tokens", "begins = self.spans[owner, 0] + place * context", "begins = self.spans[owner, 0] + place * (context + 1)", "a token between two parts is never told", "test_pretrain.py", "told_once"),
    ("pretraining/tokens", "row = np.array([end, *ids, end], dtype=dtype)", "row = np.array([end, *ids], dtype=dtype)", "no document ends", "test_pretrain.py", "disk"),
    ("pretraining/language", ".logprobs[: batch.own].sum()", ".logprobs.sum()", "what fills up a batch counts", "test_pretrain.py", "packed or sees"),
    ("pretraining/language", "default_rng([self.settings.seed, epoch])", "default_rng([self.settings.seed])", "the same order in each epoch", "test_pretrain.py", "epoch"),
    ("pretraining/language", "total / math.log(2) / self._held_rows.bytes", "total / self._held_rows.bytes", "nats for bits", "test_pretrain.py", "packed"),
    ("nn/transformer", "torch.stack((angles.sin(), angles.cos()), dim=-1)", "torch.stack((angles.cos(), angles.sin()), dim=-1)", "sine and cosine exchanged", "test_pretrain.py", "positions"),
    ("rollout/decoder", "embed(tokens, positions, self.model.dtype)", "embed(tokens, positions * 0, self.model.dtype)", "sampling forgets what it adds for places", "test_pretrain.py", "positions"),
    ("stories/grammar", "return math.log2(len(self.options)) + math.fsum(o.bits", "return math.fsum(o.bits", "entropy without the choice itself", "test_stories.py", "small_grammar"),
    ("stories/grammar", "if text.startswith(bound[self.name], at):", "if any(text.startswith(word, at) for word in self.words):", "what is referred to may be anything", "test_stories.py", "small_grammar"),
    # A look inside, and two models.
    ("inside/trace", "/ math.sqrt(a.head_dim)", "/ a.head_dim", "attention scaled by d", "test_inside.py", "transformers"),
    ("inside/trace", "return Step(attention, shapes, block.window, change.norm(dim=-1), added.norm(dim=-1), x + added), x + added", "return Step(attention, shapes, block.window, change.norm(dim=-1), added.norm(dim=-1), x, ), x + added", "the stream before the MLP shown for the one after", "test_inside.py", "transformers"),
    ("inside/page", "shares = (down + (rank < missing[..., None]))", "shares = down", "rows of a map do not add up", "test_inside.py", "packed"),
    ("inside/comparison", "kl = exact_kl(mine, mine_out, theirs, their_out)", "kl = exact_kl(theirs, their_out, mine, mine_out)", "KL of the other direction", "test_inside.py", "plain_sums"),
    ("optimizer", "p.ndim == 2 and not any(word in name for word in LOOKED_UP)", "p.ndim == 2", "Muon turns the embedding too", "test_pretrain.py", "muon"),
    ("text/chats", "return len(opened)", "return whole.find(answer.strip(), len(opened))", "what the template writes into an answer is not learned", "test_sft.py", "counts"),
    ("text/chats", "return place + len(variant) + blank + len(found)", "return place + len(variant)", "the token that ends a turn does not count", "test_sft.py", "counts"),
    ("optimizer", "if all(bool(torch.isfinite(norm)) for norm in norms.values()):", "if True:", "steps on a gradient that is not finite", PPO, "non_finite"),
    ("rl/optimize", "value, named = loss(rows.select(index), count)", "value, named = loss(rows.select(index), rows.select(index).mask.sum())", "gradient depends on the micro-batch", PPO, "micro_batch"),
    ("rl/experience", "mask = rollout.response_mask & scored.valid[:, None]", "mask = rollout.response_mask", "skipped completions train", PPO, "skipped_samples"),
    ("rollout/policy", "copy.deepcopy(b).float().requires_grad_(True)", "b.float().requires_grad_(True)", "split: the policy trains the reference's own layers", PPO, "leave_the_reference_alone"),
    ("reward/functions", "else value if value is not None and not math.isfinite(value) else None", "else None", "a reward of NaN is taken", "test_contained.py", "found and nan"),
    ("rollout/sampling", 'raise UserError("top_k and top_p change', 'print("top_k and top_p change', "top-p sampling in training goes unnoticed", ROLL, "unaccounted"),
    ("rollout/pieces", "uniform, temperature, tokens, logprobs", "uniform, 1.0, tokens, logprobs", "sampler forgets the temperature", ROLL, "scoring_path_agree"),
    ("rl/experience", "    if guide is not None:\n        raw = budget", "    if False:\n        raw = budget", "NLPO: KL of the masked policy", ALG, "kl_without_its_mask"),
    # Constitutional AI.
    ("constitution/judging", "return (x + y) / 2, (x - y) / 2", "return x, (x - y) / 2", "a judge is believed in one order", "test_constitution.py", "cancelled"),
    ("constitution/judging", "return (x + y) / 2, (x - y) / 2", "return (x + y) / 2, (x + y) / 2", "the position bias is the preference", "test_constitution.py", "cancelled"),
    ("constitution/judging", "Pair(c.second, c.first, 1 - c.probability)", "Pair(c.second, c.first, c.probability)", "a soft label's other side has the same weight", "test_constitution.py", "cross_entropy"),
    ("constitution/judging", "min(max(probability, clamp), 1 - clamp)", "max(probability, clamp)", "a clamp holds on one side only", "test_constitution.py", "clamp"),
    ("constitution/judging", "math.fsum(probabilities) / len(probabilities)", "probabilities[0]", "of an ensemble the first principle counts", "test_constitution.py", "ensemble"),
    ("constitution/principles", "math.log(luck.random() or 5e-324) / p.weight", "math.log(luck.random() or 5e-324)", "principles are drawn without their weights", "test_constitution.py", "drawn_by_weight"),
    ("constitution/judges", "next(told).double().log_softmax(0)", "next(told).double()", "a judge's options do not add up to 1", "test_constitution.py", "own_log_probabilities"),
    ("constitution/revising", "request(drawn[i][k].revision)", "request(drawn[i][0].revision)", "every revision is by the first principle", "test_constitution.py", "chains_are"),
    ("constitution/revising", "(*texts[k])", "(*texts[-1])", "after each revision the score of the last", "test_constitution.py", "chains_are"),
    ("constitution/revising", "and not declines(chain.last)", "and not declines(chain.first)", "whether the first answer declines decides what is kept", "test_constitution_recipe.py", "directly"),
    ("constitution/rules", "(not refuses and j.", "(j.", "an answer that declines may be harmful", "test_constitution_recipe.py", "points_by_hand or three_models"),
    ("constitution/rules", "(1 - 0.75 * found[\"refuses\"])", "1", "declining an ordinary request costs nothing", "test_constitution_recipe.py", "points_by_hand"),
    ("constitution/rules", "given[a] - given[b]", "given[b] - given[a]", "the rules prefer what is worse", "test_constitution_recipe.py", "points_by_hand"),
    ("constitution/rules", " and not _TO_APOLOGIZE.search(prompt)", "", "an apology that was asked for is no answer", "test_constitution_recipe.py", "evades"),
    ("constitution/judging", "return abs((self.probability", "return ((self.probability", "people get what the judge is sure is worse", "test_constitution_recipe.py", "people_get"),
    ("constitution/routing", "== (c.value < 0)", "== (c.value > 0)", "agreement with people the wrong way round", "test_constitution_recipe.py", "people_get"),
    ("constitution/redteam", ".sample(ways, variants)", ".sample(ways[:variants], variants)", "every wish is asked in the same ways", "test_constitution_recipe.py", "nothing_away"),
    ("constitution/stages", "[new - old for old, new", "[old - new for old, new", "what has changed since the first model, with the wrong sign", "test_constitution_recipe.py", "three_models"),
    ("constitution/stages", "if g.prompt.id not in theirs]", "]", "the judge's pairs stay where people ranked", "test_constitution_recipe.py", "what_is_known"),
    ("planning/supervised", "read = work.measured(s.validate_every) * work.held", "read = work.held", "what is held out is planned to be read once", "test_plan.py", "tuning_time"),
    ("planning/supervised", "else sum(tokens),", "else sum(tokens[: len(train)]),", "a reference is planned not to read what is held out", "test_plan.py", "prefer_reads"),
    ("planning/reward", "return everything * (pace.trunk", "return ranked.train * (pace.trunk", "what is held out is planned to be read by no trunk", "test_plan.py", "reward_time"),
    ("planning/models", "x + (y - x) * share", "x + y * share", "a deep model's pace is not on the line through two", "test_plan.py", "deeper_model"),
]  # fmt: skip


class Broken(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Serves one module from changed source."""

    def __init__(self, name, path, source):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_loader(fullname, self, origin=self.path) if fullname == self.name else None

    def get_filename(self, fullname):
        return self.path

    def get_data(self, path):
        return self.source.encode()

    def path_stats(self, path):
        raise OSError  # no byte code is read or written


class FirstFailure:
    """Pytest plugin: which test noticed."""

    def __init__(self):
        self.name, self.ran = None, 0

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed and self.name is None:
            self.name = report.nodeid.split("::")[-1].split("[")[0]


def changed(module, before, after):
    path = ROOT / "accord" / f"{module}.py"
    source = path.read_text()
    if source.count(before) < 1:
        raise SystemExit(f"{path}: {before!r} is not there any more; give the mutant its new source.")
    return path, source.replace(before, after, 1)


def start(module, before, after, file, words):
    """Run these tests with this mutant in place, in a process of its own; returns where its answer can be read."""
    path, source = changed(module, before, after)
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        return read
    import pytest

    finder, plugin = Broken(f"accord.{module.replace('/', '.')}", str(path), source), FirstFailure()
    sys.meta_path.insert(0, finder)
    silence = io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", words], plugins=[plugin])
        name = plugin.name or ("" if plugin.ran else "NO TEST RAN")
        if code != 0 and not name:
            name = "the module does not import"
    except BaseException as error:
        name = type(error).__name__
    os.write(write, name.encode())
    os._exit(0)


def answer(read):
    """The name of the first test that failed; '' if none did."""
    with os.fdopen(read) as pipe:
        name = pipe.read()
    os.wait()
    return name


def main(words):
    # Heavy imports once, before the forks; nothing of accord.
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    lines, survivors = [], []
    chosen = [m for m in MUTANTS if not words or any(w in m[0] or w in m[3] for w in words)][:: 3 if "--third" in sys.argv else 1]
    waiting, answers = [], []
    for module, before, after, _, file, which in chosen:
        waiting.append(start(module, before, after, file, which))
        if len(waiting) == 2:  # at a time
            answers.append(answer(waiting.pop(0)))
    answers += [answer(read) for read in waiting]
    for (module, _, _, wrong, _, _), name in zip(chosen, answers, strict=True):
        print(f"{'killed  ' if name else 'SURVIVES'}  {module}: {wrong}  [{name}]", flush=True)
        lines.append(f"| `{module}.py` | {wrong} | `{name}` |")
        if not name or name in ("NO TEST RAN", "the module does not import"):
            survivors.append(wrong)
    if "--write" in sys.argv and len(chosen) == len(MUTANTS) and not survivors:
        TABLE.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


HEAD = """# What the tests notice

Each formula broken in turn, and the first test that failed. Made by `python tests/mutants.py --write`, which exits with 1 if
one survives; the tests run every third of them.

| file | what is wrong | noticed by |
|---|---|---|
"""

if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--")]))
