"""What a run is said to need, against counts by hand and against what the code then does."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SHAPE, save_model

from accord.cli import main
from accord.config import Base, Principled
from accord.data.records import Completion, Example, Pair, PairGroup, Prompt
from accord.disk import write_lines
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.nn.transformer import ModelConfig
from accord.plan_recipe import answers, made, revised
from accord.planning import models
from accord.planning import plan as planning
from accord.planning.models import along, kept_by_a_layer, random_model
from accord.planning.plan import Part, Plan, Stage
from accord.planning.reinforcement import Pace, plan_rl, rl_memory, rl_seconds, sampling_seconds
from accord.planning.reward import Ranked, RewardPace, plan_reward, reward_memory, reward_seconds
from accord.planning.supervised import TuningPace, Work, tuning_memory, tuning_seconds, work_of_examples, work_of_pairs
from accord.pretraining.language import Language
from accord.pretraining.settings import PretrainSettings
from accord.pretraining.tokens import Tokens
from accord.reward.model import RewardModel
from accord.reward.settings import RewardSettings
from accord.reward.sources import Reward
from accord.reward.training import Encoded
from accord.rl.settings import RLSettings
from accord.rl.trainer import State
from accord.rollout.policy import Policy
from accord.stories.stories import stories
from accord.supervised.settings import PreferenceSettings, SFTSettings
from accord.text.tokenizer import Tokenizer
from accord.text.vocabulary import learn_tokenizer
from accord.tuning import adapted, imitation, preference

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
    five = models.saved_by(model.blocks[0].requires_grad_(True), model.geometry(models.layout_of(5, 20)), 32, torch.float32)
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
    pace = Pace(decoding_step=0.1, prefill=0.001, trunk=0, forward=0, scoring=0.01, update=0.02, step_fixed=0.5)
    s = RLSettings(**SETTINGS, rows=4, epochs=3, validate_every=5, validation_prompts=8)
    assert sampling_seconds(pace, 4, 2, 12, 8, 4) == pytest.approx(4 * 12 * 0.001 + 2 * 8 * 0.1)  # two waves of four rows
    assert sampling_seconds(pace, 1, 2, 12, 8, 4) == pytest.approx(12 * 0.001 + 8 * 0.1)  # less than a wave takes as long as one
    step = (0.048 + 1.6) + 4 * (12 + 2 * 8) * 0.01 + 3 * (8 * 20 * 0.02 + 2 * 0.5) + (8 * 12 * 0.001 + 1.6) / 5
    assert rl_seconds(pace, s, 12, steps=7) == pytest.approx(7 * step)


def test_fewer_layers_measure_a_deeper_model():
    """The pace is a line through two depths."""
    two, four = (Pace(*(a + b * depth for a, b in zip(range(7), range(1, 8), strict=True))) for depth in (2, 4))
    deep = along(two, four, (30 - 2) / (4 - 2))
    assert vars(deep) == pytest.approx({name: a + b * 30 for name, a, b in zip(vars(two), range(7), range(1, 8), strict=True)})


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


# Supervised training.

EXAMPLES = [Example(f"e{i}", "say " + "abc"[i % 3] * (1 + i % 5), "xyz"[i % 3] * (2 + i % 7)) for i in range(60)]
TUNING = dict(examples_per_step=4, epochs=3, dtype="float32")


def test_what_sft_reads_is_what_it_then_reads(tiny):
    """Against the task itself; and where only some are put in tokens, about as much."""
    s = SFTSettings(**TUNING)
    task = imitation(tiny, EXAMPLES, None, s)
    work = work_of_examples(task.train.rows, task.heldout.rows, s)
    length = lambda rows: sum(len(r.tokens) for r in rows)
    assert (
        work.steps == task.steps and work.held == length(task.heldout.rows) and work.widest == max(len(r.tokens) for r in task.train.rows)
    )
    assert work.row == pytest.approx(length(task.train.rows) / len(task.train)) and work.step == pytest.approx(4 * work.row)
    assert work.told == pytest.approx(task.train.counted / len(task.train))
    many = [Example(f"m{i}", e.content, e.answer) for i, e in enumerate(EXAMPLES * 30)]
    some = answers(tiny.tokenizer, many[200:], many[:200], s)
    assert some.steps == 1200 and some.row == pytest.approx(length(imitation(tiny, many, [], s).train.rows) / 1800, rel=0.05)
    assert some.held == pytest.approx(200 * some.row)


def test_what_prefer_reads(tiny):
    """A prompt once for its completions; the reference reads everything once, or nothing where a loss knows none; kto other completions, too."""
    group = lambda i: PairGroup(
        p := Prompt(f"p{i}", f"say {i}"), tuple(Completion(p, text, True, k) for k, text in enumerate(("ab", "abcd"))), (Pair(1, 0),)
    )
    groups = [group(i) for i in range(50)]
    s = PreferenceSettings(prompts_per_step=5, dtype="float32")
    task = preference(tiny, groups, None, s)
    of = lambda **changes: work_of_pairs(task.train.judged, task.heldout.judged, s.model_copy(update=changes))
    work = of()
    length = lambda some: sum(len(j.prompt) + 3 + 5 for j in some)  # two and four letters, and an end
    train, held = task.train.judged, task.heldout.judged
    assert work.steps == task.steps and work.step == pytest.approx(5 * length(train) / len(train)) and work.told == 4
    assert work.reference == length([*train, *held]) and work.held == length(held) and work.beside == 0
    assert of(loss="simpo").reference == 0
    assert of(loss="kto").beside == pytest.approx(2 * work.step) and of(loss="kto").held == 3 * work.held


def tuning_parts(kind=SFTSettings, **changes):
    s = kind(**{**({} if kind is PretrainSettings else TUNING), "dtype": "float32", **changes})
    return {p.name: p.bytes for p in tuning_memory(CONFIG, torch.float32, s, Work(10, 200.0, 20.0, 10.0))}


def test_tuning_parts_by_hand():
    whole, matrices = 4 * LAYER + 260 * 32 + 32, 4 * (LAYER - 2 * 32)
    full = tuning_parts()
    assert full["the model"] == 4 * whole and full["gradients"] == 4 * whole
    assert full["trained weights and the optimizer's moments"] == 12 * whole
    assert tuning_parts(optimizer="muon")["trained weights and the optimizer's moments"] == 12 * whole - 4 * matrices
    split = tuning_parts(adaptation="split", top_layers=2)
    assert split["gradients"] == 4 * (2 * LAYER + 32)
    kept = "what a micro-batch keeps for its backward pass"
    assert split[kept] == pytest.approx(full[kept] / 2)  # two layers of four
    assert full[kept] == pytest.approx(4 * sum(x * n for x, n in zip(kept_by_a_layer(CONFIG, torch.float32, 20), (1, 200), strict=True)))
    new = tuning_parts(PretrainSettings)
    assert new["the model"] == 0 and new["gradients"] == 4 * whole


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
def test_tuned_weights_are_those_that_train(adaptation):
    s = SFTSettings(**TUNING, adaptation=adaptation, top_layers=2)
    trained = sum(p.numel() for p in adapted(models.stand_in(random_model(CONFIG, 4, torch.float32)), s).trainable().values())
    assert tuning_parts(adaptation=adaptation, top_layers=2)["gradients"] == 4 * trained


def test_tuning_time_by_hand():
    s = SFTSettings(**TUNING, validate_every=4)
    work = Work(steps=10, step=200.0, row=20.0, told=10.0, held=100.0, reference=50.0, beside=30.0)
    # measured before the first step and after the fourth, the eighth and the last
    assert tuning_seconds(TuningPace(0.001, 0.01, 0.5), s, work) == pytest.approx(
        10 * (200 * 0.01 + 0.5) + (4 * 100 + 50 + 10 * 30) * 0.001
    )


def test_a_part_is_taken_for_the_whole_in_the_right_proportion(monkeypatch):
    """Too large to be measured whole: a pace that is so much a layer comes out as that of all layers."""
    told = models.at_depth(
        CONFIG, torch.float32, torch.device("cpu"), 1, lambda m: TuningPace(2.0 * m.depth, 1.0 + m.depth, 3.0), 4.0, 4.0 * 260 * 32
    )
    assert told == TuningPace(8.0, 5.0, 3.0)


def test_recipes_from_nothing_are_planned_as_they_then_are(tmp_path):
    """The corpus in its own tokenizer, learned from all of it, against one learned from the first stories: steps and rows within 5%."""
    base = Base(documents=6000, vocabulary=900, pretrain={"context": 192}, asked=300)
    early = made(base)
    texts = list(stories(6000, 0))
    real = Tokenizer(learn_tokenizer(texts, "bpe", 900))
    task = Language(*Tokens.of(texts, real, tmp_path / "tokens", "k").split(), base.pretrain)
    work = early.trained[0].work
    assert early.config.vocab_size == real.size and early.config.num_hidden_layers == 6
    assert work.steps == pytest.approx(task.steps, rel=0.05) and work.held == pytest.approx(float(task.heldout.sizes.sum()), rel=0.05)
    assert work.row == pytest.approx(task.each / len(task.train), rel=0.05)
    taught = early.trained[1].work
    assert taught.steps == math.ceil((300 - taught.held / taught.row) / 16) and 0 < taught.held < 60 * taught.row


def test_sft_and_prefer_are_planned(home, capsys, monkeypatch):
    write_lines(home / "e.jsonl", ({"id": e.id, "prompt": e.content, "completion": e.answer} for e in EXAMPLES))
    words = "sft --model model --examples e.jsonl --examples-per-step 4 --epochs 0.2".split()
    monkeypatch.setattr(planning, "available_memory", lambda device: -planning.resident_memory())
    assert main([*words, "--out", "r"]) == 2 and "so it is not started" in " ".join(capsys.readouterr().err.split())
    assert not (home / "r").exists()
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert main([*words, "--out", "r"]) == 0 and "Memory: about" in (told := capsys.readouterr().out) and " SFT: " in told
    assert main(["plan", "r"]) == 0 and " SFT: " in capsys.readouterr().out


def test_what_cannot_be_is_told_before_anything_is_measured(home, capsys):
    write_lines(home / "e.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 500}])
    assert main("sft --model model --examples e.jsonl --out r".split()) == 2
    told = capsys.readouterr()
    assert "exceed the model's context" in told.err and "Measuring" not in told.out
    for text, what in (
        ("command: sft\nexamples: e.jsonl\n", "no 'sft'"),
        ("command: sft\nexamples: e.jsonl\nsft: {}\n", "no 'model'"),
        ("command: pretrain\ntext: [e.jsonl]\npretrain: {}\n", "no 'tokenizer'"),
    ):
        (home / "c.yaml").write_text(text)
        assert main(["plan", "c.yaml"]) == 2 and what in capsys.readouterr().err
    recipe = {
        "base": {"documents": 200, "vocabulary": 400, "pretrain": {"size": "0.5m", "context": 64, "positions": "learned"}},
        "prompts": "stories",
    }
    (home / "r.yaml").write_text(json.dumps(recipe | {"feedback": {"panel": "stories"}, "evaluation": {"criterion": "stories"}}))
    assert main(["plan", "r.yaml"]) == 2 and "raise base.pretrain.context" in " ".join(capsys.readouterr().err.split())
    recipe["base"]["pretrain"]["context"] = 128
    (home / "r.yaml").write_text(json.dumps(recipe | {"feedback": {"panel": "stories"}, "evaluation": {"criterion": "stories"}}))
    assert main(["plan", "r.yaml"]) == 2
    told = capsys.readouterr()
    assert "reward.top_layers is 6; this model has 4 layers" in told.err and "Measuring" not in told.out


def test_a_writer_without_a_template(tmp_path):
    """Its shots are read as the writer reads them."""
    save_model(tmp_path / "plain", chat=False)
    config, tokenizer = models.look(str(tmp_path / "plain"))
    prompts = [Prompt(f"p{i}", "say a", "harmful" if i % 2 else "") for i in range(80)]
    early = revised(Principled(), config, tokenizer, prompts)
    assert early.sampled[1].prompt > 500 and early.slots > 0
    assert not revised(Principled(writer="https://host/v1", writer_model="x"), config, tokenizer, prompts).sampled


# A reward model.


def ranked_group(i: int, texts: tuple[str, ...]) -> PairGroup:
    prompt = Prompt(f"p{i}", f"say {i}")
    return PairGroup(prompt, tuple(Completion(prompt, text, True, k) for k, text in enumerate(texts)), (Pair(1, 0),))


def test_what_a_reward_model_reads_is_what_it_then_keeps(tiny):
    """Against the rows themselves, whose prompts are all of one length here."""
    train, held = [ranked_group(i, ("ab", "abcd", "a")) for i in range(4)], [ranked_group(i, ("abcdefg", "b", "cd")) for i in (5, 6)]
    ranked = Ranked.of(tiny, train, held)
    reward = RewardModel.on(tiny, 2)
    kept, measured = (Encoded.of(reward, groups, "x", TokenBudget(4096), "") for groups in (train, held))
    assert ranked.slots == kept.rows.tokens.numel() + measured.rows.tokens.numel()
    prompt = int((kept.rows.lengths - kept.rows.response_lengths)[0])
    assert (ranked.train, ranked.held) == (4 * (prompt + 3 + 5 + 2), 2 * (prompt + 8 + 2 + 3))  # letters, and an end
    assert ranked.row == pytest.approx(float((kept.rows.lengths.sum() + measured.rows.lengths.sum()) / 18))
    assert (ranked.prompts, ranked.each, ranked.widest) == (4, 3, 3 * (prompt + 8))
    long = PairGroup(
        p := Prompt("long", "say 1 and 2"), tuple(Completion(p, text, True, k) for k, text in enumerate(("abcd", "dcba"))), (Pair(0, 1),)
    )
    same = Ranked.of(tiny, [long, *(ranked_group(i, ("abcd", "dcba")) for i in range(4))], [ranked_group(5, ("abcd", "dcba"))])
    more = prompt + len("say 1 and 2") - len("say 1")
    assert same == Ranked.like([more, *[prompt] * 4], [prompt], 2, 5)
    assert same.slots == 5 * 2 * (more + 5) + 2 * (prompt + 5)


def test_reward_parts_by_hand():
    ranked, s = Ranked(40, 2000.0, 500.0, 3000, 20.0, 4.0, 96), RewardSettings(top_layers=2)
    got = {p.name: p.bytes for p in reward_memory(CONFIG, torch.float32, s, ranked)}
    fit = RewardModel.on(models.stand_in(random_model(CONFIG, 4, torch.float32)), 2)
    trained = sum(p.numel() for p in fit.scalar.trainable().values())
    assert trained == 2 * LAYER + 2 * 32 + 1
    assert got["trained layers and Adam's moments"] == 12 * trained and got["gradients"] == 4 * trained
    assert got["the trunk's activations of every completion"] == 3000 * 32 * 4
    fixed, each = kept_by_a_layer(CONFIG, torch.float32, 20)
    kept = lambda **changes: {p.name: p.bytes for p in reward_memory(CONFIG, torch.float32, s.model_copy(update=changes), ranked)}[
        "what a micro-batch keeps for its backward pass"
    ]
    assert kept() == pytest.approx(2 * (fixed + each * 8 * 4 * 20))  # a step is less than a micro-batch
    assert kept(micro_batch_tokens=200) == pytest.approx(2 * (fixed + each * 200))
    probe = {p.name: p.bytes for p in reward_memory(CONFIG, torch.float32, s.model_copy(update={"epochs": 0}), ranked)}
    assert probe["trained layers and Adam's moments"] == 4 * trained and "gradients" not in probe
    assert kept(micro_batch_tokens=50) == pytest.approx(2 * (fixed + each * 96))  # a prompt's completions stay together


def test_reward_time_by_hand():
    ranked, pace = Ranked(20, 2000.0, 500.0, 3000, 20.0, 4.0, 96), RewardPace(0.001, 0.002, 0.01, 0.5)
    time = lambda **changes: reward_seconds(pace, RewardSettings(**changes), ranked)
    assert time(epochs=2) == pytest.approx(2500 * 0.001 + 2 * 2500 * 0.002 + 2 * 2000 * 0.01 + 2 * 3 * 0.5)  # three steps of eight prompts
    assert time(epochs=0) == pytest.approx(2500 * 0.001 + 2 * 2500 * 0.002)
    assert time(probe=False) == pytest.approx(2500 * 0.001 + 2500 * 0.002 + 2000 * 0.01 + 3 * 0.5)


def test_accord_reward_is_planned(home, capsys, monkeypatch):
    write_lines(home / "p.jsonl", ({"id": f"p{i}", "prompt": f"say {i}", "chosen": "abc", "rejected": "d"} for i in range(40)))
    words = "reward --model model --pairs p.jsonl --top-layers 1".split()
    monkeypatch.setattr(planning, "available_memory", lambda device: -planning.resident_memory())
    assert main([*words, "--out", "r"]) == 2 and "so it is not started" in " ".join(capsys.readouterr().err.split())
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert main([*words, "--out", "r"]) == 0 and " reward model: " in capsys.readouterr().out
    write_lines(home / "p.jsonl", ({"id": f"p{i}", "prompt": f"say {i}", "chosen": "abc" * 300, "rejected": "d"} for i in range(40)))
    assert main([*words, "--out", "s"]) == 2
    told = capsys.readouterr()
    assert "completion 0 has 901, which together exceeds the model's context" in " ".join(told.err.split()) and "Memory" not in told.out
    assert main([*words, "--out", "s", "--heldout", "2"]) == 2 and "heldout is 2; it is a share" in capsys.readouterr().err


def test_a_reward_models_pace_is_measured():
    ranked = Ranked.like([12] * 10, [12] * 3, 4, 8)
    plan = plan_reward(CONFIG, torch.float32, RewardSettings(top_layers=2, epochs=2), ranked)
    assert plan.stages[0].tokens == 2 * 10 * (12 + 4 * 8) and 0 < plan.seconds < 600
    with pytest.raises(UserError, match="this model has 4 layers"):
        plan_reward(CONFIG, torch.float32, RewardSettings(top_layers=5), ranked)
