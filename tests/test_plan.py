"""What a run is said to need, against counts by hand and against what the code then does."""

import dataclasses
import json

import pytest
import torch
from conftest import SHAPE, save_model

from accord import plan as planning
from accord.cli import main
from accord.errors import UserError
from accord.nn.transformer import ModelConfig
from accord.plan import Pace, Part, Plan, Stage, kept_by_a_layer, plan_rl, random_model, rl_memory, rl_seconds, sampling_seconds
from accord.reward.sources import Reward
from accord.rl.settings import RLSettings
from accord.rl.trainer import State
from accord.rollout.policy import Policy

CONFIG = ModelConfig(
    "LlamaForCausalLM", SHAPE["vocab_size"], 32, 64, 4, 4, 2, 8, tie_word_embeddings=True, windowed=(False,) * 4
)  # fmt: skip
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32  # q, k and v, o, gate and up and down, two norms
SETTINGS = dict(prompts_per_step=4, completions_per_prompt=2, max_new_tokens=8, top_layers=2, dtype="float32", minibatches=2)
MIB = 2**20


def parts(**changes):
    s = RLSettings(**{**SETTINGS, **changes})
    return {p.name: p.bytes for p in rl_memory(CONFIG, torch.float32, s, [5, 12], 0)}


def test_parts_by_hand():
    got = parts()
    assert got["the model"] == 4 * (4 * LAYER + 260 * 32 + 32)
    assert got["the policy's trained weights and Adam's moments"] == 12 * (2 * LAYER + 32)  # fp32: itself and two moments
    assert got["the critic's"] == 12 * (2 * LAYER + 32)
    assert got["gradients"] == 4 * 2 * (2 * LAYER + 32)
    assert got["the key/value cache"] == 2 * 4 * 8 * (12 + 8) * 2 * 8 * 4  # K and V, layers, rows, slots, heads, width, bytes
    assert got["the sampler's copies of frozen layers"] == 4 * (2 * LAYER + 260 * 32)
    assert got["the sampler's copies of trained layers"] == 4 * 2 * LAYER
    assert parts(adaptation="full")["the policy's trained weights and Adam's moments"] == 12 * (4 * LAYER + 260 * 32 + 32)
    assert parts(algorithm="rloo", minibatches=1)["the critic's"] == 0
    assert parts(rollout_weights="int8")["the sampler's copies of trained layers"] == 2 * LAYER


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
def test_trained_weights_are_those_that_train(adaptation):
    """Counted from the shape, and in the policy itself."""
    model = random_model(CONFIG, 4, torch.float32)
    start = Policy(model, None, {}, "x", model, trunk_layers=4)
    s = RLSettings(**SETTINGS, adaptation=adaptation)
    state = State.begin(start, Reward([]), s)
    trained = sum(p.numel() for p in state.policy.trainable().values())
    assert parts(adaptation=adaptation)["the policy's trained weights and Adam's moments"] == 12 * trained
    critic = sum(p.numel() for p in state.critic.trainable().values())
    assert parts()["the critic's"] == 12 * (critic - 33)  # without the head: a weight a channel and a bias


def test_what_a_layer_keeps_grows_with_the_tokens():
    fixed, each = kept_by_a_layer(CONFIG, torch.float32, 20)
    model = random_model(CONFIG, 1, torch.float32)
    five = planning._saved(model.blocks[0].requires_grad_(True), model.geometry(planning._layout(5, 20)), 32, torch.float32)
    assert fixed + each * 100 == pytest.approx(five, rel=0.02)
    assert each > 4 * (32 * 4 + 64 * 3)  # at least the matrices' inputs


def test_a_plan_adds_up_and_refuses_what_cannot_fit():
    parts = [
        Part("weights", 100 * MIB, "always", "use a smaller model"),
        Part("cache", 300 * MIB, "sampling", "lower --rows"),
        Part("activations", 700 * MIB, "updating", "lower --micro-batch-tokens"),
    ]
    plan = Plan(parts, [Stage("a", 1, 2.0), Stage("b", 1, 3.0)], 1000 * MIB)
    assert plan.memory == 800 * MIB and plan.seconds == 5.0
    plan.check()
    with pytest.raises(UserError, match=r"needs about 0.8 GiB.*largest part is activations.*lower --micro-batch-tokens"):
        dataclasses.replace(plan, available=700 * MIB).check()


def test_time_by_hand():
    pace = Pace(decoding_step=0.1, prefill=0.001, trunk=0, forward=0, scoring=0.01, update=0.02, step_fixed=0.5, reward_step=0)
    s = RLSettings(**SETTINGS, rows=4, epochs=3, validate_every=5, validation_prompts=8)
    assert sampling_seconds(pace, 4, 2, 12, 8, 4) == pytest.approx(4 * 12 * 0.001 + 2 * 8 * 0.1)  # two waves of four rows
    assert sampling_seconds(pace, 1, 2, 12, 8, 4) == pytest.approx(12 * 0.001 + 8 * 0.1)  # less than a wave takes as long as one
    step = (0.048 + 1.6) + 4 * (12 + 2 * 8) * 0.01 + 3 * (8 * 20 * 0.02 + 2 * 0.5) + (8 * 12 * 0.001 + 1.6) / 5
    assert rl_seconds(pace, s, 12, steps=7) == pytest.approx(7 * step)


def test_fewer_layers_measure_a_deeper_model():
    """The pace is a line through two depths."""
    two, four = (Pace(*(a + b * depth for a, b in zip(range(8), range(1, 9), strict=True))) for depth in (2, 4))
    deep = two.at(30, four, (2, 4))
    assert vars(deep) == pytest.approx({name: a + b * 30 for name, a, b in zip(vars(two), range(8), range(1, 9), strict=True)})


def test_measured_on_the_runs_own_code():
    s = RLSettings(**SETTINGS, max_steps=3)
    plan = plan_rl(CONFIG, s, [5, 12], reward_layers=2)
    assert plan.stages[0].tokens == 3 * 8 * 8 and 0 < plan.seconds < 600
    assert not plan_rl(CONFIG, s, [5, 12], 0, environment=True).stages


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {w}"}) + "\n" for w in "abcdefgh"))
    (tmp_path / "rl.yaml").write_text("".join(f"{k}: {v}\n" for k, v in SETTINGS.items()))
    return tmp_path


def test_the_command(home, capsys):
    assert main(["plan", "rl.yaml", "--model", "model", "--prompts", "prompts.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "Memory: about" in out and "50 steps of ppo: 3,200 tokens" in out
    assert main(["plan", "rl.yaml", "--model", "model"]) == 2
    assert "No prompts given" in capsys.readouterr().err
    assert main(["plan", "nothing.yaml"]) == 2


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(home, capsys, monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda device: -planning.resident_memory())
    (home / "mine.py").write_text("def one(prompts, completions): return [1.0] * len(completions)\n")
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    assert main(["rl", "--model", "model", "--prompts", "prompts.jsonl", "--reward", "mine:one", "--out", "runs/a", *options]) == 2
    assert "so it is not started" in " ".join(capsys.readouterr().err.split())
    assert not (home / "runs").exists()
