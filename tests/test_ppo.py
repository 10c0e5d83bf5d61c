"""PPO as a whole: the invariants of docs/design.md, each seen to fail when the code is broken."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import save_model

from accord.data.records import Prompt
from accord.errors import UserError
from accord.reward.model import RewardModel
from accord.reward.sources import build_reward
from accord.rl.algorithms.ppo import PPO
from accord.rl.experience import score_rollout
from accord.rl.optimize import PolicyOptimizer
from accord.rl.selftest import self_test
from accord.rl.settings import RLSettings
from accord.rl.trainer import State, batch_of, train
from accord.rl.watch import Watch, measure
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.runs import Run

SMALL = dict(
    prompts_per_step=4, completions_per_prompt=2, max_new_tokens=8, top_layers=2, temperature=0.9, micro_batch_tokens=64,
    epochs=2, minibatches=2, learning_rate=1e-3, critic_learning_rate=1e-3, max_steps=4, validate_every=2, checkpoint_every=2,
    lora_rank=4, dtype="float32", truncation="nothing",
)  # fmt: skip


def make(**changes):
    return RLSettings(**{**SMALL, **changes})


def letters(prompts, completions):
    return [sum(c.isalpha() for c in text) / 4 for text in completions]


@pytest.fixture
def begun(tiny, prompts):
    """(state, experience, settings) before any update."""
    return begin(tiny, prompts, make())


def begin(policy, prompts, settings, reward=letters):
    source = build_reward(reward, policy)
    state = State.begin(policy, source, settings)
    rollout = Engine(state.policy).sample(prompts[:4], 2, settings.sampling(0), keep_trunk=True)
    return state, score_rollout(state.policy, state.critic, source, rollout, settings), settings


# 1. Before the first update ratio = 1 and KL = 0, or training does not start.


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
def test_self_test_passes_on_a_sound_start(tiny, prompts, adaptation):
    state, experience, settings = begin(tiny, prompts, make(adaptation=adaptation))
    found = self_test(state.policy, experience, settings)
    assert max(largest for _, largest in found) < 1e-4


def test_rollouts_in_eight_bits_are_another_distribution_and_say_so(tiny, prompts, tmp_path):
    """The sampler's log-probabilities are of what it sampled from; training reads the trunk itself."""
    settings = make(rollout_weights="int8")
    run = Run.create(tmp_path / "run", {"command": "rl"})
    train(tiny, prompts, build_reward(letters, tiny), settings, run)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 1e-4 < metrics[0]["self_test/ratio"] < 0.5
    assert metrics[0]["self_test/reference"] < 1e-5
    assert all(0 < m["engine_gap"] < 5 and abs(m["engine_kl"]) < 0.5 for m in metrics[1:])
    state = State.begin(tiny, build_reward(letters, tiny), settings)
    rollout = Engine(state.policy, weights="int8").sample(prompts[:4], 2, settings.sampling(0), keep_trunk=True)
    assert rollout.trunk is None


def test_self_test_names_a_wrong_temperature(begun):
    state, experience, settings = begun
    wrong = dataclasses.replace(experience, old_logprobs=experience.old_logprobs * 0.9)
    with pytest.raises(UserError, match=r"failed at 'ratio'.*sampler and the scoring path"):
        self_test(state.policy, wrong, settings)


def test_self_test_names_another_reference(begun):
    state, experience, settings = begun
    wrong = dataclasses.replace(experience, ref_logprobs=experience.ref_logprobs - 0.1)
    with pytest.raises(UserError, match=r"failed at 'reference'.*KL = 0"):
        self_test(state.policy, wrong, settings)


def test_self_test_names_a_mask_off_by_one(begun):
    state, experience, settings = begun
    rollout = experience.rollout
    shifted = dataclasses.replace(rollout, response_mask=torch.roll(rollout.response_mask, -1, 1))
    with pytest.raises(UserError, match="response mask"):
        self_test(state.policy, dataclasses.replace(experience, rollout=shifted), settings)


# 3. The score lands on the last response token.


def test_score_lands_on_the_last_response_token(begun):
    _, e, settings = begun
    done = PPO(settings, None, None).advantages(e, kl_coef=0.0)
    for row in range(len(e.scores)):
        columns = torch.nonzero(e.mask[row])[:, 0]
        assert float(done.rewards[row, columns[-1]]) == pytest.approx(float(e.scores[row]))
        assert not done.rewards[row, columns[:-1]].any()


# 4. The reference is the starting policy and stays it.


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
def test_updates_leave_the_reference_alone(tiny, prompts, adaptation, tmp_path):
    before = {n: p.clone() for n, p in tiny.model.state_dict().items()}
    run = Run.create(tmp_path / "r", {"command": "rl"})
    outcome = train(tiny, prompts, build_reward(letters, tiny), make(adaptation=adaptation, max_steps=2), run)
    assert all(torch.equal(before[n], p) for n, p in tiny.model.state_dict().items())
    changed = [n for n, p in outcome.policy.trainable().items() if n not in before or not torch.equal(before[n], p)]
    assert changed
    assert all(".lora_" in n for n in changed) == (adaptation == "lora")
    if adaptation == "split":
        assert not any(n.startswith(("model.layers.0.", "model.layers.1.", "model.embed")) for n in changed)


def test_the_kl_is_to_the_start_after_updates(tiny, prompts):
    """The reference's log-probabilities are the starting model's, whatever the policy has become."""
    state, e, settings = begin(tiny, prompts, make())
    for p in state.policy.trainable().values():
        p.data.mul_(1.3)
    again = score_rollout(state.policy, state.critic, build_reward(letters, tiny), e.rollout, settings)
    torch.testing.assert_close(again.ref_logprobs, e.ref_logprobs)
    logp = torch.log_softmax(tiny.model(e.rollout.tokens, e.rollout.token_mask) / settings.temperature, -1)
    expected = logp[:, :-1].gather(-1, e.rollout.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(again.ref_logprobs[:, 1:][e.mask[:, 1:]], expected[e.mask[:, 1:]], rtol=0, atol=1e-4)
    assert float(again.kl.abs().max()) > 0.01


# 5. Micro-batches change memory, not the gradient.


def test_micro_batch_size_does_not_change_the_gradient(tiny, prompts):
    gradients = []
    for budget in (1, 40, 10**6):
        settings = make(micro_batch_tokens=budget, entropy_coef=0.1, max_grad_norm=1e9)
        state, e, _ = begin(tiny, prompts, settings)
        algorithm = PPO(settings, None, None)
        e = algorithm.advantages(e, 0.05)
        state.optimizer.set_step(0)
        state.optimizer.step(e, partial(algorithm.loss, state.policy, state.critic))
        gradients.append(
            {n: p.grad.clone() for n, p in {**state.policy.trainable(), **state.critic.trainable()}.items() if p.grad is not None}
        )
    for other in gradients[1:]:
        for name, g in gradients[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-4, atol=1e-6)


def test_loss_is_the_objective_of_the_paper(begun):
    """-J = -(J_CLIP - c1 L_VF + c2 S), recomputed in NumPy from log-probabilities, values and entropies."""
    import oracle

    state, e, _ = begun
    settings = make(entropy_coef=0.3, value_coef=0.7)
    algorithm = PPO(settings, None, None)
    e = algorithm.advantages(e, 0.05)
    e = dataclasses.replace(e, old_logprobs=e.old_logprobs + 0.4 * torch.sin(torch.arange(e.mask.shape[1])))
    loss, stats = algorithm.loss(state.policy, state.critic, e, e.mask.sum())
    logits = state.policy.model(e.rollout.tokens, e.rollout.token_mask).detach().numpy() / settings.temperature
    rows, columns = np.nonzero(e.mask.numpy())
    logp = oracle.log_softmax(logits)[rows, columns - 1]
    chosen = logp[np.arange(len(rows)), e.rollout.tokens.numpy()[rows, columns]]
    entropy = -(np.exp(logp) * logp).sum(-1).mean()
    m = e.mask.numpy()
    clip = oracle.clipped(chosen, e.old_logprobs.numpy()[m], e.advantages.numpy()[m], 0.2)
    value = oracle.value_loss(e.values.numpy()[m], e.returns.numpy()[m], e.values.numpy()[m], 0.2)
    assert float(stats["clip_fraction"]) > 0
    assert float(loss.detach()) == pytest.approx(-(clip - 0.7 * value + 0.3 * entropy), rel=1e-4)


# 6. No dropout; unaccounted sampling is refused.


def test_dropout_is_off_while_training(tmp_path, prompts):
    folder = save_model(tmp_path / "m", attention_dropout=0.9)
    state, e, settings = begin(Policy.load(str(folder), "float32"), prompts, make())
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in state.policy.model.modules())
    again = score_rollout(state.policy, state.critic, build_reward(letters, state.policy), e.rollout, settings)
    assert torch.equal(again.old_logprobs, e.old_logprobs)


# 7. A gradient that is not finite is never stepped on.


def test_non_finite_gradients_are_skipped_counted_and_stop(begun):
    state, e, settings = begun
    before = {n: p.clone() for n, p in state.policy.trainable().items()}
    state.optimizer.set_step(0)

    def broken(rows, count):
        loss = sum(p.sum() for p in [*state.policy.trainable().values(), *state.critic.trainable().values()]) * float("nan")
        return loss, {}

    for _ in range(settings.max_nonfinite - 1):
        state.optimizer.step(e, broken)
    assert state.optimizer.skipped == settings.max_nonfinite - 1
    with pytest.raises(UserError, match="not finite"):
        state.optimizer.step(e, broken)
    assert all(torch.equal(before[n], p) for n, p in state.policy.trainable().items())


def test_skipped_samples_do_not_train(tiny, prompts):
    """A reward of None takes a row out of the advantages, the loss and the count."""
    _, e, settings = begin(tiny, prompts, make(), lambda p, c: [None, *[1.0 + i for i in range(len(c) - 1)]])
    assert not e.mask[0].any() and e.valid.tolist() == [False] + [True] * 7
    done = PPO(settings, None, None).advantages(e, 0.05)
    assert not done.advantages[0].any() and not done.rewards[0].any()
    rest = e.select(torch.arange(1, 8))
    torch.testing.assert_close(done.advantages[1:, : rest.mask.shape[1]], PPO(settings, None, None).advantages(rest, 0.05).advantages)


# The whole loop.


def test_ppo_learns_a_preference_it_can_see(tiny, prompts, tmp_path):
    """Thirty steps towards letters: the score on the same prompts and luck rises far beyond its noise."""
    run = Run.create(tmp_path / "r", {"command": "rl"})
    settings = make(max_steps=30, prompts_per_step=8, completions_per_prompt=4, learning_rate=3e-3, kl_coef=0.0)
    outcome = train(tiny, prompts, build_reward(letters, tiny), settings, run)
    sampling = settings.sampling(-1)
    scores = [np.array(letters([], Engine(p).sample(prompts, 8, sampling).texts)) for p in (tiny, outcome.policy)]
    difference = scores[1] - scores[0]
    assert difference.mean() > 4 * difference.std() / len(difference) ** 0.5


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
def test_resume_is_exact(tiny_folder, prompts, tmp_path, adaptation):
    """Four steps, or two and two in another process's memory: the same bytes."""
    settings = make(adaptation=adaptation, kl_target=2.0)
    results = []
    for stops in ([4], [2, 4]):
        folder = tmp_path / f"r{len(stops)}"
        Run.create(folder, {"command": "rl"}).close()
        for limit in stops:
            start = Policy.load(str(tiny_folder), "float32")
            run, _ = Run.open(folder)
            outcome = train(
                start, prompts, build_reward(letters, start), settings.model_copy(update={"max_steps": limit}), run, prompts[:2]
            )
            run.close()
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results.append((outcome.policy.trainable(), metrics, (folder / "completions.jsonl").read_text()))
    (a, metrics_a, text_a), (b, metrics_b, text_b) = results
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert text_a == text_b
    # Validation runs at the end of a run as well, which is where the two were cut differently.
    assert [{k: v for k, v in m.items() if k != "validation_score"} for m in metrics_a] == [
        {k: v for k, v in m.items() if k != "validation_score"} for m in metrics_b
    ]


def test_stop_rules(tiny, prompts, tmp_path):
    run = Run.create(tmp_path / "a", {"command": "rl"})
    outcome = train(tiny, prompts, build_reward(letters, tiny), make(stop_at_score=-1.0), run, prompts[:2])
    assert (outcome.stopped, outcome.steps) == ("stop_at_score", 2)
    run = Run.create(tmp_path / "b", {"command": "rl"})
    outcome = train(tiny, prompts, build_reward(letters, tiny), make(kl_stop=1e-9, learning_rate=0.05), run)
    assert outcome.stopped == "kl_stop" and 2 <= outcome.steps < 4
    run = Run.create(tmp_path / "c", {"command": "rl"})
    assert train(tiny, prompts, build_reward(letters, tiny), make(), run).stopped == "max_steps"


def test_a_run_that_stopped_by_its_score_stays_stopped(tiny, prompts, tmp_path):
    settings = make(stop_at_score=-1.0)
    run = Run.create(tmp_path / "r", {"command": "rl"})
    train(tiny, prompts, build_reward(letters, tiny), settings, run, prompts[:2])
    again = train(tiny, prompts, build_reward(letters, tiny), settings, run, prompts[:2])
    assert (again.stopped, again.steps) == ("stop_at_score", 2)
    assert [m["step"] for m in run.read("metrics.jsonl")] == [-1, 0, 1]


def test_a_checkpoint_of_other_settings_is_refused(tiny, prompts, tmp_path):
    run = Run.create(tmp_path / "r", {"command": "rl"})
    train(tiny, prompts, build_reward(letters, tiny), make(max_steps=2), run)
    with pytest.raises(UserError, match="does not fit the settings"):
        train(tiny, prompts, build_reward(letters, tiny), make(top_layers=3), run)


def test_a_prompt_too_long_is_told_before_the_first_step(tiny, prompts, tmp_path):
    run = Run.create(tmp_path / "r", {"command": "rl"})
    with pytest.raises(UserError, match="'long' has"):
        train(tiny, [*prompts, Prompt("long", "x" * 200)], build_reward(letters, tiny), make(), run)
    assert not run.read("metrics.jsonl")


@pytest.mark.parametrize("then", ["split", "lora", "full"])
@pytest.mark.parametrize("first", ["split", "lora", "full"])
def test_an_aligned_policy_can_be_aligned_again(tiny, prompts, tmp_path, first, then):
    """Its reference is what it is now, not where it once came from; it stays as it is."""
    once = train(
        tiny, prompts, build_reward(letters, tiny), make(adaptation=first, max_steps=1), Run.create(tmp_path / "a", {"command": "rl"})
    ).policy
    before = once.frozen()
    state, e, settings = begin(once, prompts, make(adaptation=then))
    self_test(state.policy, e, settings)
    assert state.policy.trainable()
    tokens = e.rollout.tokens
    torch.testing.assert_close(state.policy.start(tokens), before.model(tokens), rtol=0, atol=1e-5)
    assert (state.policy.start(tokens) - tiny.model(tokens)).abs().max() > 1e-4


def test_the_same_prompt_twice_in_a_batch_has_its_own_luck(tiny, prompts):
    rollout = Engine(tiny).sample([prompts[0], prompts[1], prompts[0]], 1, make().sampling(0))
    assert rollout.texts[0] != rollout.texts[2]
    assert rollout.texts[:2] == Engine(tiny).sample(prompts[:2], 1, make().sampling(0)).texts


FINE = {"kl": 1.0, "entropy": 1.0, "score_std": 1.0, "at_best": 0.1, "flat_groups": 0.0, "skipped": 0.0, "rejected": 0.0}


def test_drift_is_warned_of_once():
    said, flags = [], []
    watch = Watch(make(kl_warn=5.0), lambda *told: said.append(told))
    for step, kl in enumerate((1.0, 6.0, 7.0)):
        flags.append(watch.check(step, {**FINE, "kl": kl}))
    assert flags == [{}, {"warning/kl": 1.0}, {"warning/kl": 1.0}]
    assert len(said) == 1 and said[0][:2] == (1, "kl") and "6.0 nats" in said[0][2] and "kl_coef" in said[0][2]
    again = Watch(make(kl_warn=5.0), lambda *told: said.append(told))
    again.restore(json.loads(json.dumps(watch.state())))  # as a checkpoint keeps it
    assert again.check(3, {**FINE, "kl": 8.0}) == {"warning/kl": 1.0} and len(said) == 1


@pytest.mark.parametrize(
    ("name", "stats", "remedy"),
    [
        ("entropy", {"entropy": 0.01}, "entropy_coef"),
        ("flat", {"score_std": 0.0, "at_best": 1.0}, "check the reward"),
        ("saturation", {"at_best": 0.95}, "finer reward"),
        ("flat_groups", {"flat_groups": 0.6}, "completions_per_prompt"),
        ("skipped", {"skipped": 2.0}, "None"),
        ("rejected", {"skipped": 2.0, "rejected": 2.0}, "rejects.jsonl"),
    ],
)
def test_what_goes_wrong_has_a_name_and_a_remedy(name, stats, remedy):
    said = []
    watch = Watch(make(algorithm="grpo", epochs=1, minibatches=1), lambda *told: said.append(told))
    assert watch.check(0, FINE) == {} and not said
    assert watch.check(1, {**FINE, **stats}) == {f"warning/{name}": 1.0}
    assert said[0][1] == name and remedy in said[0][2]


def test_a_critic_is_given_five_steps():
    said = []
    watch = Watch(make(), lambda *told: said.append(told[0]))
    for step, explained in enumerate([-2.0] * 4 + [0.5] + [-2.0] * 7):
        watch.check(step, {**FINE, "explained_variance": explained})
    assert said == [9]  # the fifth in a row


def test_shares_of_best_scores_and_of_flat_groups_by_hand(tiny, prompts):
    """Groups (1,1), (1,0), (2,skipped), (2,2): three prompts have two scores, two of these are flat; 3 of 7 have the best."""
    settings = make(completions_per_prompt=2)
    state = State.begin(tiny, build_reward(lambda p, c: [1, 1, 1, 0, 2, None, 2, 2], tiny), settings)
    rollout = Engine(state.policy).sample(prompts[:4], 2, settings.sampling(0), keep_trunk=True)
    reward = build_reward(lambda p, c: [1, 1, 1, 0, 2, None, 2, 2], tiny)
    stats = measure(score_rollout(state.policy, state.critic, reward, rollout, settings), 0.0)
    assert stats["at_best"] == pytest.approx(3 / 7) and stats["flat_groups"] == pytest.approx(2 / 3)


def test_reward_model_on_the_same_trunk_gives_the_same_scores(tiny_folder, tiny, prompts, tmp_path):
    """Through the kept activations, from tokens alone, and from texts after save and load."""
    model = RewardModel.on(tiny, 2)
    with torch.no_grad():
        model.scalar.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    model.mean, model.scale = 0.3, 1.7
    model.save(tmp_path / "reward")
    policy = Policy.load(str(tiny_folder), "float32")
    source = build_reward(str(tmp_path / "reward"), policy).sources[0][1]
    settings = make()
    state = State.begin(policy, build_reward(str(tmp_path / "reward"), policy), settings)
    rollout = Engine(state.policy).sample(prompts, 1, settings.sampling(0), keep_trunk=True)
    assert source.on_trunk and rollout.trunk is not None and rollout.trunk_cut == 2
    assert source.model.sits_on(policy.start) and not source.model.sits_on(Policy.load(str(tiny_folder), "float32").start)
    kept = torch.tensor(source.score(rollout))
    fresh = dataclasses.replace(rollout, trunk=None)
    rollout.trunk.zero_()  # the kept activations were really what was read
    assert source.score(rollout) != kept.tolist()
    rollout = dataclasses.replace(rollout, trunk=None)
    torch.testing.assert_close(torch.tensor(source.score(fresh)), kept, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.score_rollout(fresh), kept, rtol=0, atol=1e-5)
    assert kept.std() > 0.01
    # The critic starts as this reward model: after the last token it predicts the score.
    experience = score_rollout(state.policy, state.critic, build_reward(str(tmp_path / "reward"), state.policy), rollout, settings)
    torch.testing.assert_close(experience.final_values, experience.scores, rtol=0, atol=1e-4)


def test_a_reward_that_fails_late_loses_nothing(tiny, prompts, tmp_path):
    calls = []

    def fails_at_the_third(given, completions):
        calls.append(1)
        return letters(given, completions) if len(calls) < 3 else [float("nan")] * len(completions)

    run = Run.create(tmp_path / "r", {"command": "rl"})
    with pytest.raises(UserError, match="returned nan"):
        train(tiny, prompts, build_reward(fails_at_the_third, tiny), make(checkpoint_every=100), run)
    assert run.latest().step == 2


def test_prompts_are_all_seen_before_any_is_seen_again(prompts):
    settings = make()
    first = [p.id for step in range(2) for p in batch_of(prompts, step, settings)]
    assert sorted(first) == sorted(p.id for p in prompts)
    assert first != [p.id for step in range(2, 4) for p in batch_of(prompts, step, settings)]


def test_foreign_model_trains_in_full(tmp_path, prompts):
    policy = Policy.load(str(save_model(tmp_path / "m", "gpt2")), "float32")
    run = Run.create(tmp_path / "r", {"command": "rl"})
    outcome = train(policy, prompts, build_reward(letters, policy), make(max_steps=2, adaptation="auto"), run)
    outcome.policy.save(tmp_path / "out")
    again = Policy.load(str(tmp_path / "out"), "float32")
    assert any(not torch.equal(a, b) for a, b in zip(again.model.parameters(), policy.model.parameters(), strict=True))


def test_optimizer_state_survives(begun):
    state, e, settings = begun
    algorithm = PPO(settings, None, None)
    e = algorithm.advantages(e, 0.05)
    loss = lambda rows, count: algorithm.loss(state.policy, state.critic, rows, count)
    state.optimizer.set_step(3)
    state.optimizer.step(e, loss)
    saved = {k: v.clone() for k, v in state.optimizer.state().items()}
    other = PolicyOptimizer({"policy": (state.policy.trainable(), 1e-3), "critic": (state.critic.trainable(), 1e-3)}, settings)
    other.load_state(saved)
    assert {k: v.tolist() for k, v in other.state().items()} == {k: v.tolist() for k, v in saved.items()}
    assert len(saved) == 3 * (len(state.policy.trainable()) + len(state.critic.trainable()))


def test_chats_train_too(tiny, tmp_path):
    chats = [Prompt(f"c{i}", [{"role": "system", "content": "short"}, {"role": "user", "content": "x" * (i + 1)}]) for i in range(4)]
    run = Run.create(tmp_path / "r", {"command": "rl"})
    assert train(tiny, chats, build_reward(letters, tiny), make(max_steps=1), run).steps == 1
