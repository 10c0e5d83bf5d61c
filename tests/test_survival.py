"""A run that is stopped, diverges or runs out of memory ends where one that was left alone does, or says why not."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import save_model

from accord import progress
from accord.api import train_rl
from accord.checkpoints import _sums
from accord.cli import main
from accord.data.records import Prompt
from accord.errors import Diverged, Interrupted, UserError
from accord.nn.budget import TokenBudget, is_out_of_memory
from accord.reward.sources import build_reward
from accord.rl import experience, natural, optimize, qvalues
from accord.rl.algorithms import base, trpo
from accord.rl.settings import RLSettings
from accord.rl.trainer import train
from accord.rollout import decoding, scoring
from accord.rollout.policy import Policy
from accord.runs import Run

SMALL = dict(
    top_layers=2, prompts_per_step=4, completions_per_prompt=2, max_new_tokens=6, max_steps=4, checkpoint_every=2,
    validate_every=2, validation_prompts=2, learning_rate=1e-3, dtype="float32",
)  # fmt: skip


def letters(prompts, completions):
    return [sum(c.isalpha() for c in text) / 4 for text in completions]


def longest(prompts, completions):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def go(folder, tmp_path):
    """Run or resume ``name``; the run and the final weights."""
    prompts = [Prompt(f"p{i}", f"say {'abcdefgh'[i]}") for i in range(8)]

    def go(name, **changes):
        start = Policy.load(str(folder), "float32")
        run = Run.open(tmp_path / name)[0] if (tmp_path / name).exists() else Run.create(tmp_path / name, {"command": "rl"})
        try:
            settings = RLSettings(**{**SMALL, **changes})
            outcome = train(start, prompts, build_reward(letters, start), settings, run, prompts[:2])
            return run, {n: p.detach().clone() for n, p in outcome.policy.trainable().items()}
        finally:
            run.close()

    return go


@contextlib.contextmanager
def stopping(at):
    """A stop is asked for at this decoding step, as Ctrl-C asks for it."""
    count, step = 0, decoding.Decoding.step

    def stop_at(self, longest):
        nonlocal count
        count += 1
        progress._Stop.requested = count == at or progress._Stop.requested
        return step(self, longest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.Decoding, "step", stop_at)
        try:
            yield
        finally:
            progress._Stop.requested = False


def files(run):
    return {name: (run.folder / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}


def test_metrics_are_the_same_bytes_every_time(go):
    (a, weights), (b, again) = go("a"), go("b")
    assert files(a) == files(b) and all(torch.equal(weights[n], again[n]) for n in weights)
    steps = [row["step"] for row in a.read("timings.jsonl")]
    assert steps == [0, 1, 2, 3] and set(a.read("timings.jsonl")[1]) == {"step", "rollout", "score", "update", "validate"}


@pytest.mark.parametrize("at", [1, 5, 9, 15, 20, 26])
def test_a_stop_in_the_middle_of_a_rollout_loses_that_rollout_and_nothing_else(go, at):
    """Also while a validation is sampled, which is finished first: its score belongs to the step before."""
    whole, weights = go("whole")
    with stopping(at), pytest.raises(Interrupted):
        go("cut")
    run, again = go("cut")
    assert files(run) == files(whole) and all(torch.equal(weights[n], again[n]) for n in weights)


def diverging(monkeypatch, until, first=3):
    """From training step ``first`` on gradients are NaN, unless the learning rates were halved ``until`` times."""
    gradients, set_step = optimize.PolicyOptimizer._gradients, optimize.PolicyOptimizer.set_step

    def remember(self, step):
        self.at = step
        set_step(self, step)

    def poisoned(self, rows, loss, count, tokens):
        stats = gradients(self, rows, loss, count, tokens)
        if self.at >= first and self.halvings < until:
            next(iter(self._named["policy"].values())).grad.fill_(float("nan"))
        return stats

    monkeypatch.setattr(optimize.PolicyOptimizer, "set_step", remember)
    monkeypatch.setattr(optimize.PolicyOptimizer, "_gradients", poisoned)


def test_a_divergence_goes_back_to_the_checkpoint_with_half_the_learning_rate(go, monkeypatch, capsys):
    run, _ = go("plain", max_steps=2)
    with monkeypatch.context() as patch:
        diverging(patch, until=1)
        back, weights = go("back", on_divergence="rollback", max_steps=5)
    assert [w["name"] for w in back.read("warnings.jsonl")] == ["rollback"] and back.read("warnings.jsonl")[0]["step"] == 2
    assert "times 0.5" in capsys.readouterr().out
    assert [m["step"] for m in back.read("metrics.jsonl")] == [-1, 0, 1, 2, 3, 4]
    # The same by hand: the checkpoint after two steps, told that learning rates are halved, and five steps from there.
    latest = run.folder / "checkpoints" / "step-2"
    manifest = json.loads((latest / "manifest.json").read_text())
    manifest["about"] |= {"halvings": 1, "stopped": None}
    (latest / "manifest.json").write_text(json.dumps(manifest))
    (latest / "SHA256SUMS").write_text(_sums(latest))
    _, by_hand = go("plain", max_steps=5)
    assert all(torch.equal(weights[n], by_hand[n]) for n in weights)
    _, untouched = go("untouched", max_steps=5)
    assert not all(torch.equal(weights[n], untouched[n]) for n in weights)


def test_a_divergence_that_does_not_end_stops_the_run(go, monkeypatch):
    diverging(monkeypatch, until=99)
    with pytest.raises(UserError, match="went back 3 times"):
        go("r", on_divergence="rollback")
    with pytest.raises(Diverged, match="on_divergence to rollback"):
        go("s")


def test_a_divergence_before_the_first_checkpoint_starts_over(go, monkeypatch):
    diverging(monkeypatch, until=1, first=0)
    run, _ = go("r", on_divergence="rollback")
    assert [m["step"] for m in run.read("metrics.jsonl")] == [-1, 0, 1, 2, 3]


def limited(monkeypatch, tokens, *modules):
    """States of more padded tokens than this do not fit."""
    for module in (base, scoring, *modules):
        whole = module.states_of

        def states(model, rollout, split, whole=whole):
            if rollout.tokens.numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(model, rollout, split)

        monkeypatch.setattr(module, "states_of", states)
    trunk_of = experience.trunk_of

    def trunk(start, rollout, split):
        if rollout.tokens.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return trunk_of(start, rollout, split)

    monkeypatch.setattr(experience, "trunk_of", trunk)


def test_where_memory_runs_out_micro_batches_are_halved_and_the_gradient_stays(go, monkeypatch, capsys):
    whole, weights = go("whole")
    with monkeypatch.context() as patch:
        limited(patch, 60)
        run, again = go("small")
        go("small", max_steps=6)
    told = [w for w in run.read("warnings.jsonl") if w["name"] == "memory"]
    assert len(told) == 1 and "64 tokens" in told[0]["warning"]
    for name in weights:
        torch.testing.assert_close(again[name], weights[name], rtol=0, atol=2e-4)
    ours, theirs = ([m.get("score") for m in r.read("metrics.jsonl")] for r in (run, whole))
    assert ours[:5] == theirs


def failing_once(monkeypatch, at):
    """In the updates the policy's states number ``at`` do not fit, once."""
    states_of, count = base.states_of, 0

    def states(*rest):
        nonlocal count
        count += 1
        if count == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return states_of(*rest)

    monkeypatch.setattr(base, "states_of", states)


def test_half_a_gradient_is_forgotten(go, monkeypatch):
    """The second micro-batch of the first update does not fit: what the first had left is not counted twice."""
    sizes = dict(micro_batch_tokens=64, max_steps=1, minibatches=1)
    whole, _ = go("whole", **sizes)
    failing_once(monkeypatch, 2)
    small, _ = go("small", **sizes)
    assert [w["name"] for w in small.read("warnings.jsonl")] == ["memory"]
    ours, theirs = (run.read("metrics.jsonl")[1] for run in (small, whole))
    for name in ("grad_norm/policy", "grad_norm/critic", "objective/value_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.parametrize("algorithm", ["trpo", "ppo-penalty", "dqn"])
def test_what_an_algorithm_computes_besides_is_halved_too(go, monkeypatch, algorithm):
    """Where all states of more than 60 padded tokens do not fit, wherever they are asked for; 64 leave one row to a micro-batch."""
    sizes = dict(algorithm=algorithm, max_steps=2, minibatches=1, entropy_coef=0.0)
    adaptation = {"adaptation": "lora"} if algorithm == "dqn" else {}  # that leaves no trunk, which is then computed again
    whole, weights = go("whole", **sizes, **adaptation)
    limited(monkeypatch, 60, *((trpo, natural) if algorithm == "trpo" else (qvalues,) if algorithm == "dqn" else ()))
    run, again = go("small", **sizes, **adaptation)
    assert [w["name"] for w in run.read("warnings.jsonl")] == ["memory"]
    assert run.read("metrics.jsonl")[1]["score"] == whole.read("metrics.jsonl")[1]["score"]
    for name in weights:
        torch.testing.assert_close(again[name], weights[name], rtol=0, atol=2e-3)


def test_a_row_that_does_not_fit_is_a_sentence(go, monkeypatch):
    limited(monkeypatch, 3)
    with pytest.raises(UserError, match=r"single row.*max-new-tokens"):
        go("r")


def test_a_budget_starts_over_and_lets_other_errors_through():
    budget, tried = TokenBudget(1000), []

    def work(tokens):
        tried.append(tokens)
        if tokens > 300:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")
        return tokens

    assert budget.fit(work) == 250 and tried == [1000, 500, 250] and budget.halved == 2
    with pytest.raises(RuntimeError, match="shape"):
        budget.fit(lambda tokens: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    assert budget.tokens == 250 and is_out_of_memory(MemoryError())


def test_real_memory_that_runs_out_is_recognised():
    """torch's own error on this machine, for more bytes than an address space has room for."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_copied_run_goes_on(go, tmp_path):
    """Nothing in a run folder says where it lies."""
    go("a", max_steps=2)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    (_, weights), (_, again) = go("a"), go("moved")
    assert all(torch.equal(weights[n], again[n]) for n in weights)


def test_the_same_call_again_is_the_whole_run(folder, tmp_path, capsys):
    """From Python: cut while it samples, then called again with resume, as in a script that is started until it ends."""
    start, prompts = Policy.load(str(folder), "float32"), [Prompt(f"p{i}", f"say {'abcdefgh'[i]}") for i in range(8)]

    def call(name, **changes):
        return train_rl(start, prompts, letters, out=tmp_path / name, validation=prompts[:2], resume=True, **{**SMALL, **changes})

    call("whole")
    with stopping(20), pytest.raises(Interrupted):
        call("cut")
    call("cut")
    ours, theirs = ({p.name: p.read_bytes() for n in ("", "policy") for p in (tmp_path / r / n).iterdir() if p.is_file()} for r in ("cut", "whole"))  # fmt: skip
    del ours["timings.jsonl"], theirs["timings.jsonl"]
    assert ours == theirs and "model.safetensors" in ours
    with pytest.raises(UserError, match=r"in this call: rl.learning_rate \(it was 0.001, it is 0.002\)"):
        call("cut", learning_rate=2e-3)
    with pytest.raises(UserError, match=r"something else to read: prompts"):
        train_rl(start, prompts[::-1], letters, out=tmp_path / "cut", validation=prompts[:2], resume=True, **SMALL)
    with pytest.raises(UserError, match=r"reward 1 \(it was '1\*letters', it is '1\*longest'\)"):
        train_rl(start, prompts, longest, out=tmp_path / "cut", validation=prompts[:2], resume=True, **SMALL)
    train_rl(
        start, prompts, longest, out=tmp_path / "cut", validation=prompts[:2], resume=True, allow_changes=True, **{**SMALL, "max_steps": 5}
    )
    history = Run.open(tmp_path / "cut")[0].read("history.jsonl")
    assert [c["setting"] for row in history for c in row.get("changes", ())] == ["rl.max_steps", "reward 1"]
    capsys.readouterr()
    assert call("whole", max_steps=4).steps == 4 and "changed settings" not in capsys.readouterr().out
    assert main(["resume", str(tmp_path / "cut")]) == 2 and "resume=True" in capsys.readouterr().err
    with pytest.raises(UserError, match="name it: out="):
        train_rl(start, prompts, letters, resume=True, **SMALL)
