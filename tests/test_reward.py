"""Reward models: the loss by hand, learning, calibration, and the outside world kept out."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

from accord import checkpoints, progress
from accord.api import save_reward, train_reward
from accord.checkpoints import until_done
from accord.data.records import Completion, Pair, PairGroup, Prompt, split_of
from accord.errors import Interrupted, UserError
from accord.reward import training
from accord.reward.comparison import Comparison, length_slope
from accord.reward.model import RewardModel
from accord.reward.probe import fit_probe
from accord.reward.settings import RewardSettings
from accord.reward.sources import build_reward
from accord.reward.training import train_reward_model
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling


def group(name, texts, pairs, ties=()):
    prompt = Prompt(name, "which?")
    completions = tuple(Completion(prompt, t, True, i) for i, t in enumerate(texts))
    return PairGroup(prompt, completions, tuple(Pair(*p) for p in pairs), tuple(Pair(*p) for p in ties))


def test_pair_loss_by_hand():
    """Group means of weighted -log sigmoid, then the mean over groups: a group of three pairs counts as one of one."""
    groups = [group("a", "xyz", [(0, 1, 1.0), (0, 2, 3.0)]), group("b", "xy", [(1, 0, 1.0)])]
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    loss = lambda d: np.log1p(np.exp(-d))
    expected = ((1 * loss(1.0) + 3 * loss(1.5)) / 4 + loss(1.0)) / 2
    assert float(Comparison(RewardSettings()).loss(scores, groups, [0, 3])) == pytest.approx(expected)


def exclaimers(n, seed=0):
    """Completions with an exclamation mark are preferred: something the model can see."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        word = "".join(rng.choice(list("abcdefgh"), size=4))
        out.append(group(f"g{i}", [word + "!", word + ".", word + "!!", word], [(0, 1, 1.0), (2, 3, 1.0), (0, 3, 1.0), (2, 1, 1.0)]))
    return out


SETTINGS = dict(top_layers=2, epochs=6, learning_rate=3e-3, heldout=0.25, probe=False)
PROBE = {**SETTINGS, "probe": True}


@pytest.fixture
def trained(tiny):
    return train_reward(tiny, exclaimers(48), **SETTINGS)


def test_reward_model_learns_what_it_is_shown(trained):
    model, report = trained
    assert report.accuracy.low > 0.8
    assert report.accuracy.low <= report.accuracy.value <= report.accuracy.high
    assert report.calibration_error < 0.2
    good, bad = model.classify(["which?", "which?"], ["face!", "face."])
    assert good["logit"] > bad["logit"] and good["probability"] == pytest.approx(1 / (1 + np.exp(-good["logit"])))


def test_scores_are_normalised_with_the_stored_mean_and_scale(trained, tiny, tmp_path):
    model, _ = trained
    completions = [c for g in exclaimers(48) for c in g.completions]
    scores = np.array(model.score([c.prompt.content for c in completions], [c.text for c in completions]))
    assert abs(scores.mean()) < 0.15 and scores.std() == pytest.approx(1.0, abs=0.15)
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward", tiny)
    texts = ["face!", "face."]
    assert again.score(["which?"] * 2, texts) == pytest.approx(model.score(["which?"] * 2, texts), abs=1e-5)
    about = json.loads((tmp_path / "reward" / "accord.json").read_text())
    assert (about["mean"], about["scale"]) == (model.mean, model.scale)


def test_saved_reward_model_is_a_transformers_classifier(trained, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model, _ = trained
    model.save(tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    for finished in (False, True):  # the last token is the end token, and it is what is read
        rows = model.encode([Completion(Prompt("a", "which?"), "face!", finished)])
        mine = model.raw_scores(rows).item() - model.scalar.head.bias.item()
        assert theirs(rows.tokens).logits.item() == pytest.approx(mine, abs=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "accord.json").unlink(), "not a reward model"),
        (lambda f: (f / "accord.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "accord.json").write_text('{"kind": "reward_model", "format": 99}'), "format 99"),
        (lambda f: (f / "accord.json").write_text('{"kind": "reward_model", "format": 1}'), "field 'cut' is None"),
    ],
)
def test_a_damaged_reward_model_is_fatal(tiny, tmp_path, damage, message):
    RewardModel.on(tiny, 1).save(tmp_path / "r")
    damage(tmp_path / "r")
    with pytest.raises(UserError, match=message):
        RewardModel.load(tmp_path / "r")


def test_a_missing_head_is_fatal(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    RewardModel.on(tiny, 1).save(tmp_path / "r")
    file = tmp_path / "r" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "score.weight"}, file)
    with pytest.raises(UserError, match="head is missing"):
        RewardModel.load(tmp_path / "r")


@pytest.fixture
def rollout(tiny, prompts):
    return Engine(tiny).sample(prompts, 1, Sampling(max_new_tokens=4))


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import os, time
        def length(prompts, completions): return [len(c) for c in completions]
        def skips(prompts, completions): return [None] + [1.0] * (len(completions) - 1)
        def raises(prompts, completions): raise KeyError("no such thing")
        def nan(prompts, completions): return [0.0, float("nan")] + [0.0] * (len(completions) - 2)
        def text(prompts, completions): return ["good"] * len(completions)
        def short(prompts, completions): return [1.0]
        def nothing(prompts, completions): return None
        def named(prompts, completions): return dict(enumerate(prompts))
        def tensor(prompts, completions):
            import torch
            return torch.arange(len(completions)) / 2
        def tensors(prompts, completions):
            import torch
            return [torch.tensor(float(len(c))) for c in completions]
        def hangs(prompts, completions): time.sleep(600)
        def dies(prompts, completions): os._exit(7)
        constant = 3
        """)
    )


def test_functions_of_texts(module, tiny, rollout):
    reward = build_reward(["0.5*mine:length", "mine:skips"], tiny)
    got = reward(rollout)
    assert got.valid.tolist() == [False] + [True] * 7
    assert got.total.tolist()[1:] == pytest.approx([0.5 * len(t) + 1.0 for t in rollout.texts[1:]])
    assert got.parts["mine:length"] == [len(t) for t in rollout.texts]
    reward.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine:constant", r"could not be imported: TypeError.*not a function"),
        ("mine:nowhere", r"could not be imported: AttributeError"),
        ("nobody:home", r"could not be imported: ModuleNotFoundError"),
        ("x*mine:length", r"neither a folder, nor module:function"),
        ("no-such-folder", r"neither a folder"),
    ],
)
def test_a_reward_that_is_none_is_one_sentence(module, tiny, spec, message):
    with pytest.raises(UserError, match=message):
        build_reward(spec, tiny)


def test_tensors_are_numbers(module, tiny, rollout):
    reward = build_reward(["mine:tensor", "mine:tensors"], tiny)
    got = reward(rollout)
    assert got.parts == {"mine:tensor": [i / 2 for i in range(8)], "mine:tensors": [float(len(t)) for t in rollout.texts]}
    reward.close()


def test_a_script_without_a_main_guard(tmp_path):
    """The worker imports the reward's module and not the script that asked for it: once, and what it prints goes to the terminal."""
    (tmp_path / "mine.py").write_text("def length(prompts, completions):\n    print('hello')\n    return [len(c) for c in completions]\n")
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        print("script runs")
        from types import SimpleNamespace
        from accord.reward.sources import FunctionSource
        source = FunctionSource("mine:length")
        class Rows(SimpleNamespace):
            __len__ = lambda self: 2
        print(source.score(Rows(prompts=[SimpleNamespace(text="x")] * 2, texts=["ab", "c"])))
        """)
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "script runs\n[2.0, 1.0]\n" and "hello" in done.stderr


def test_a_classifier_is_a_reward(tiny, rollout, tmp_path, trained):
    from conftest import SHAPE, byte_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(tmp_path / "c")
    byte_tokenizer().save_pretrained(tmp_path / "c")
    scores = build_reward(f"classifier:{tmp_path / 'c'}@good", tiny)(rollout).total
    ids = byte_tokenizer()(rollout.texts[0], return_tensors="pt")
    logits = model.eval()(**{k: v for k, v in ids.items() if k != "token_type_ids"}).logits[0]
    assert float(scores[0]) == pytest.approx(float(logits[1] - logits[0]), abs=1e-3)
    with pytest.raises(UserError, match="say which is good"):
        build_reward(f"classifier:{tmp_path / 'c'}", tiny)
    with pytest.raises(UserError, match="no label 'great'"):
        build_reward(f"classifier:{tmp_path / 'c'}@great", tiny)


def test_a_bert_classifier_is_a_reward(tiny, rollout, tmp_path):
    """Encoders have no end token, and need none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    config = BertConfig(vocab_size=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    got = build_reward(f"classifier:{tmp_path / 'bert'}", tiny)(rollout)
    assert got.valid.all() and got.total.isfinite().all()


def test_components_of_one_name_are_told_apart(tiny, rollout):
    one, two = (lambda p, c: [1.0] * len(c)), (lambda p, c: [2.0] * len(c))
    got = build_reward([one, two], tiny)(rollout)
    assert list(got.parts) == ["<lambda>", "<lambda>#2"] and got.total.tolist() == [3.0] * 8


def test_too_few_pairs(tiny):
    with pytest.raises(UserError, match="needs pairs to train on"):
        train_reward(tiny, exclaimers(1), **SETTINGS)


# Training that is cut.


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def failing(monkeypatch, at, error):
    """The reward model's optimizer step number ``at`` (from 0) raises."""
    step, count = training.Fit.step, 0

    def fails(self, *rest):
        nonlocal count
        count += 1
        if count == at + 1:
            raise error
        step(self, *rest)

    monkeypatch.setattr(training.Fit, "step", fails)


@pytest.mark.parametrize("at", [0, 1, 5, 17, 29])  # 33 groups of 48 are trained on: five steps an epoch, thirty in all
def test_training_goes_on_where_it_was_cut(tiny, tmp_path, monkeypatch, capsys, at):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    _, whole = train_reward(tiny, exclaimers(48), **PROBE, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        failing(patch, at, OSError("the power went"))
        with pytest.raises(OSError, match="the power went"):
            train_reward(tiny, exclaimers(48), **PROBE, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.training").exists() == (at > 0)
    capsys.readouterr()
    _, report = train_reward(tiny, exclaimers(48), **PROBE, out=tmp_path / "cut")
    assert (f"at step {at}" in capsys.readouterr().out) == (at > 0)
    assert report == whole and len(whole.losses) == 30
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_stop_keeps_the_training(tiny, tmp_path, monkeypatch):
    """Whatever the time since the last checkpoint; and what was kept before is not written again."""
    step, count = training.Fit.step, 0

    def stops(self, *rest):
        nonlocal count
        step(self, *rest)
        count += 1
        progress._Stop.requested = count == 7

    with monkeypatch.context() as patch:
        patch.setattr(training.Fit, "step", stops)
        try:
            with pytest.raises(Interrupted, match="training is kept"):
                train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "cut")
        finally:
            progress._Stop.requested = False
    assert [p.name for p in (tmp_path / "cut.training").glob("step-*")] == ["step-7"]
    train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "cut")
    train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "whole")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_another_training_is_not_gone_on_with(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        failing(patch, 9, OSError())
        with pytest.raises(OSError):
            train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    other = exclaimers(48)
    at = next(i for i, g in enumerate(other) if split_of(g.prompt.id, 0.0, SETTINGS["heldout"]) == "train")
    other[at] = PairGroup(other[at].prompt, other[at].completions, (Pair(1, 0),))
    with pytest.raises(UserError, match=r"r\.training holds.*the training pairs\. Put that back"):
        train_reward(tiny, other, **SETTINGS, out=tmp_path / "r")
    with pytest.raises(UserError, match=r"with something else: epochs \(it was 6, it is 2\)"):
        train_reward(tiny, exclaimers(48), **{**SETTINGS, "epochs": 2}, out=tmp_path / "r")
    with pytest.raises(UserError, match=r"something else: the training pairs, the held-out pairs\."):
        train_reward(tiny, exclaimers(48), **{**SETTINGS, "heldout": 0.3}, out=tmp_path / "r")
    moved = Policy.load(str(tiny_folder), "float32")
    next(moved.model.parameters()).data[0] += 1
    for policy in (moved, Policy.load(str(tiny_folder), "bfloat16")):
        with pytest.raises(UserError, match=r"something else: the model\. Put"):
            train_reward(policy, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    with until_done(tmp_path / "r.training"), pytest.raises(UserError, match="in use by another"):
        train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")


@pytest.mark.parametrize("tokens", [1, 60, 100])
def test_micro_batches_have_the_gradient_of_the_whole(tiny, monkeypatch, tokens):
    _, whole = train_reward(tiny, exclaimers(48), **SETTINGS)
    sizes, batch = [], training.Encoded.batch
    monkeypatch.setattr(training.Encoded, "batch", lambda self, some: (sizes.append(len(some)), batch(self, some))[1])
    _, parts = train_reward(tiny, exclaimers(48), **SETTINGS, micro_batch_tokens=tokens)
    assert sum(sizes) == 33 * 6 + 48 and max(sizes) < 7  # and all are scored once in the end
    np.testing.assert_allclose(parts.losses[:10], whole.losses[:10], rtol=1e-3)


def test_where_memory_runs_out_half_a_gradient_is_forgotten(tiny, monkeypatch, capsys):
    """The third part of the first step does not fit: what the first two had left is not counted twice."""
    _, whole = train_reward(tiny, exclaimers(48), **SETTINGS)
    loss, count = Comparison.loss, 0

    def full(*rest):
        nonlocal count
        count += 1
        if count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(*rest)

    monkeypatch.setattr(Comparison, "loss", full)
    _, parts = train_reward(tiny, exclaimers(48), **SETTINGS, micro_batch_tokens=128)
    assert "64 tokens" in capsys.readouterr().out
    np.testing.assert_allclose(parts.losses[:4], whole.losses[:4], rtol=1e-4)


def test_memory_that_runs_out_under_the_trunk_halves_too(tiny, tmp_path, monkeypatch):
    """Also after a resume, where the memory would suffice: the micro-batches stay as they were, and so do the numbers."""
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    trunk_of = training.trunk_of

    def trunk(start, part, cut):
        if part.tokens.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return trunk_of(start, part, cut)

    with monkeypatch.context() as patch:
        patch.setattr(training, "trunk_of", trunk)
        _, whole = train_reward(tiny, exclaimers(48), **SETTINGS)
        failing(patch, 9, OSError())
        with pytest.raises(OSError):
            train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    _, report = train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    assert report.losses == whole.losses


def test_started_over_where_changes_are_allowed(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    groups = exclaimers(48)
    other = RewardSettings(top_layers=2, epochs=2, learning_rate=3e-3)
    with monkeypatch.context() as patch:
        failing(patch, 9, OSError())
        with pytest.raises(OSError):
            save_reward(tmp_path / "r", tiny, groups[12:], groups[:12], RewardSettings(top_layers=2, epochs=6))
    with monkeypatch.context() as patch:
        failing(patch, 4, OSError())
        with pytest.raises(OSError):
            save_reward(tmp_path / "r", tiny, groups[12:], groups[:12], other, allow_changes=True)
    assert "from its start" in capsys.readouterr().out
    _, report = save_reward(tmp_path / "r", tiny, groups[12:], groups[:12], other)  # of the new one there is a checkpoint already
    assert "at step 4" in capsys.readouterr().out
    assert report.losses == train_reward_model(tiny, groups[12:], groups[:12], other)[1].losses


def test_a_folder_of_ones_own_is_not_taken_for_checkpoints(tiny, tmp_path, monkeypatch):
    mine = tmp_path / "r.training" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("notes")
    with pytest.raises(UserError, match=r"r\.training is where checkpoints would be kept, and it holds something else \(mine.txt\)"):
        train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="already exists"):
        train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    assert mine.read_text() == "notes"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".", "/", "~/r", "r/../r"):
        with pytest.raises(UserError, match="already exists"):
            train_reward(tiny, exclaimers(48), **SETTINGS, out=name)


def test_checkpoints_that_are_half_deleted_are_no_obstacle(tiny, tmp_path, monkeypatch):
    """Killed while they are deleted, after the model was saved; and a disk that fails just then is told."""
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "drop_folder", dropping(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(UserError, match=r"Cannot write to .*Input/output error"):
            train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "drop_folder", dropping(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".dropping-r.training", "other", "r"]
    shutil.copytree(tmp_path / ".dropping-r.training", tmp_path / "kept")
    with pytest.raises(UserError, match="already exists"):
        train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    assert not (tmp_path / ".dropping-r.training").exists()
    (tmp_path / "kept").rename(tmp_path / ".dropping-r.training")
    (tmp_path / "r").rename(tmp_path / "third")
    train_reward(tiny, exclaimers(48), **SETTINGS, out=tmp_path / "r")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "r", "third"]
    assert files_of(tmp_path / "r") == files_of(tmp_path / "other") == files_of(tmp_path / "third")


def dropping(error):
    """``drop_folder`` as it is but for the last deletion of all, which fails when the folder is out of sight."""
    drop = checkpoints.drop_folder

    def fails(path):
        if path.name == "r.training":
            os.replace(path, path.with_name(f".dropping-{path.name}"))
            raise error
        drop(path)

    return fails


# Ties, margins, length.


def loss_by_hand(kind, d, parameter):
    """(-log P(preferred), -log P(tie)) from the papers' own forms, with the strengths e^s."""
    one, two = np.exp(d), 1.0
    if kind == "davidson":
        total = one + two + parameter * np.sqrt(one * two)
        return -np.log(one / total), -np.log(parameter * np.sqrt(one * two) / total)
    theta = np.exp(parameter)
    return -np.log(one / (one + theta * two)), -np.log((theta**2 - 1) * one * two / ((one + theta * two) * (theta * one + two)))


@pytest.mark.parametrize("kind", ["davidson", "rao-kupper"])
@pytest.mark.parametrize("d", [-3.0, -0.4, 0.0, 1.7])
def test_tie_aware_losses_by_hand(kind, d):
    model = Comparison(RewardSettings(ties=kind), tied=0.3).double()
    won, tied = loss_by_hand(kind, d, float(model.threshold))
    x = torch.tensor(d, dtype=torch.float64)
    assert float(model.preferred(x)) == pytest.approx(won, rel=1e-6) and float(model.tied(x)) == pytest.approx(tied, rel=1e-6)
    lost = float(model.preferred(-x))
    assert np.exp(-np.array([won, tied, lost])).sum() == pytest.approx(1.0, rel=1e-6)
    if d == 0:
        assert np.exp(-tied) == pytest.approx(0.3, rel=1e-5)  # where learning starts, equal scores tie as often as people did


def test_ties_stand_in_the_loss_with_their_weights():
    scores = torch.tensor([1.0, 0.2, 0.5])
    g = group("a", "xyz", [(0, 1, 2.0)], [(0, 2, 0.5)])
    for kind in ("davidson", "rao-kupper"):
        model = Comparison(RewardSettings(ties=kind), 0.2)
        parameter = float(model.threshold.detach())
        expected = (2.0 * loss_by_hand(kind, 0.8, parameter)[0] + 0.5 * loss_by_hand(kind, 0.5, parameter)[1]) / 2.5
        assert float(model.loss(scores, [g], [0])) == pytest.approx(expected, rel=1e-5)
    assert float(Comparison(RewardSettings()).loss(scores, [g], [0])) == pytest.approx(np.log1p(np.exp(-0.8)), rel=1e-5)


def test_prompts_count_by_their_weight():
    """A labeler's weight counts among prompts too: where they are the only one who ranked a prompt, it cannot count within it."""
    scores, groups = (
        torch.tensor([1.0, 0.2, 0.5, 0.0]),
        [replace(group(n, "xy", [(0, 1, w)]), weight=w) for n, w in (("a", 2.0), ("b", 0.5))],
    )
    expected = (2.0 * np.log1p(np.exp(-0.8)) + 0.5 * np.log1p(np.exp(-0.5))) / 2
    assert float(Comparison(RewardSettings()).loss(scores, groups, [0, 2])) == pytest.approx(expected, rel=1e-5)


def test_margin_by_rank_distance():
    scores = torch.tensor([1.0, 0.2])
    loss = Comparison(RewardSettings(margin=0.5)).loss
    for distance, expected in ((1.0, 0.8), (3.0, -0.2)):
        assert float(loss(scores, [group("a", "xy", [(0, 1, 1.0, distance)])], [0])) == pytest.approx(np.log1p(np.exp(-expected)), rel=1e-5)


@pytest.mark.parametrize("kind", ["davidson", "rao-kupper"])
def test_tie_parameter_is_learned(tiny, monkeypatch, kind):
    """Two with an exclamation mark tie, and two without. It starts where equal scores tie as often as people did, which is too
    seldom: most of what they compared is not equal. Learned, it expects about as many ties as there are."""
    groups = [group(g.prompt.id, [c.text for c in g.completions], g.pairs, [(0, 2), (1, 3)]) for g in exclaimers(48)]
    settings = {**SETTINGS, "epochs": 10, "learning_rate": 1e-3, "ties": kind}
    _, learned = train_reward(tiny, groups, **settings)
    monkeypatch.setattr(training, "RATE", 0.0)
    _, fixed = train_reward(tiny, groups, **settings)
    off = lambda report: abs(report.ties["predicted"] - report.ties["share"])
    assert learned.ties["share"] == pytest.approx(1 / 3) and learned.accuracy.low > 0.8
    assert off(learned) < 0.6 * off(fixed) and learned.ties["threshold"] > 1.3 * fixed.ties["threshold"]


def test_only_ties_are_too_few_pairs(tiny):
    groups = [group(g.prompt.id, ["a", "b"], [], [(0, 1)]) for g in exclaimers(48)]
    for kind in ("drop", "davidson"):
        with pytest.raises(UserError, match="needs pairs"):
            train_reward(tiny, groups, **SETTINGS, ties=kind)


def test_length_slope_is_a_logistic_regression():
    """scikit-learn on the same pairs, each seen from both sides."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, size=(300, 2))
    x = np.log(lengths[:, 0] / lengths[:, 1])
    won = rng.random(300) < 1 / (1 + np.exp(-0.8 * x))
    weights = rng.random(300) + 0.5
    groups = [group(str(i), "xy", [(0, 1, w) if first else (1, 0, w)]) for i, (first, w) in enumerate(zip(won, weights, strict=True))]
    theirs = LogisticRegression(fit_intercept=False, C=1e3, tol=1e-10).fit(x[:, None], won, sample_weight=weights).coef_[0, 0]
    assert length_slope(groups, lengths.tolist()) == pytest.approx(theirs, rel=1e-3)


def test_length_control_adds_what_length_explains_while_it_trains(tiny):
    """The first step's loss, all groups in one, by hand: -log sigma(d + b log(length / length))."""
    rng = np.random.default_rng(0)
    word = lambda n: "".join(rng.choice(list("abcdefgh"), size=n))
    groups = [
        group(f"g{i}", [word(n), word(2 * n)], [(1, 0) if rng.random() < 0.8 else (0, 1)])
        for i, n in enumerate(rng.integers(3, 9, size=60))
    ]
    train = [g for g in groups if split_of(g.prompt.id, 0.0, SETTINGS["heldout"]) == "train"]
    _, report = train_reward(tiny, groups, **SETTINGS, prompts_per_step=60, length_control=True)
    scores = RewardModel.on(tiny, SETTINGS["top_layers"], 0).raw_scores
    losses = []
    for g in train:
        rows = RewardModel.on(tiny, SETTINGS["top_layers"], 0).encode(g.completions)
        s = scores(rows).detach().numpy() + report.length_slope * np.log(rows.response_lengths.numpy())
        losses.append(np.log1p(np.exp(-(s[g.pairs[0].preferred] - s[g.pairs[0].other]))))
    assert report.length_slope > 1 and report.losses[0] == pytest.approx(np.mean(losses), rel=1e-4)


# The probe that training begins with.


def preferences(rng, count, noise, size=12):
    """Groups of three with states of very unlike numbers; who is preferred follows a direction among them, as far as noise lets it."""
    states = rng.normal(3, 1, (3 * count, size)) * np.geomspace(0.01, 100, size)
    states[:, 4] = 7.0  # never changes
    score = (states / states.std(0).clip(1e-9)) @ rng.normal(size=size) * 0.5 + noise * rng.normal(size=3 * count)
    groups = []
    for g in range(count):
        of = score[3 * g : 3 * g + 3]
        pairs = [
            (i, j, float(rng.uniform(0.5, 2))) if of[i] > of[j] else (j, i, float(rng.uniform(0.5, 2))) for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        groups.append(group(f"g{g}", "abc", pairs[: 1 + g % 3]))
    return torch.tensor(states, dtype=torch.float32), groups, list(range(0, 3 * count, 3))


def weighted_differences(states, groups, offsets):
    """(P,H) of standardised states, and (P,) weights that add up to 1 in a group, plainly."""
    scaled = states.double().numpy()
    scaled = (scaled - scaled.mean(0)) / np.where(scaled.std(0) > 1e-6, scaled.std(0), np.inf)
    pairs = [
        (at + p.preferred, at + p.other, p.weight / sum(q.weight for q in g.pairs))
        for g, at in zip(groups, offsets, strict=True)
        for p in g.pairs
    ]
    return np.array([scaled[i] - scaled[j] for i, j, _ in pairs]), np.array([w for *_, w in pairs])


def test_the_probe_is_a_ridge_logistic_regression():
    """scikit-learn on the same differences, each from both sides, with the strength that was found."""
    from sklearn.linear_model import LogisticRegression

    states, groups, offsets = preferences(np.random.default_rng(0), 150, 1.0)
    probe = fit_probe(states, groups, offsets)
    x, w = weighted_differences(states, groups, offsets)
    flip = np.where(np.arange(len(x)) % 2, 1, -1)
    peer = LogisticRegression(C=1 / (probe.strength * len(groups)), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
        x * flip[:, None], flip, w
    )
    deviation = states.double().numpy().std(0)
    mine = probe.weight.double().numpy() * np.where(deviation > 1e-6, deviation, 0)
    assert mine == pytest.approx(peer.coef_[0], abs=2e-4) and probe.weight[4] == 0
    assert float((states @ probe.weight + probe.bias).mean()) == pytest.approx(0, abs=1e-3)


def test_the_strength_is_what_other_prompts_ask_for():
    """Preferences by chance want the strongest ridge there is, clear ones a weak one; and nothing is better predicted than it is."""
    rng = np.random.default_rng(1)
    strengths = {}
    for noise in (0.0, 1.0, 1e9):
        states, groups, offsets = preferences(rng, 200, noise)
        probe = fit_probe(states, groups, offsets)
        strengths[noise] = probe.strength
        assert (probe.log_loss < 0.35) if noise == 0 else (probe.log_loss > 0.3)
    assert strengths[0.0] <= 0.03 < strengths[1e9] and strengths[1e9] >= 1.0
    assert probe.log_loss == pytest.approx(np.log(2), abs=0.02)  # predicted from other prompts, chance stays chance


def test_the_probe_leaves_to_length_what_is_added_for_it():
    """Where the gradient of the penalised likelihood, written out, is nothing."""
    rng = np.random.default_rng(2)
    states, groups, offsets = preferences(rng, 120, 1.0)
    added = torch.tensor(rng.normal(size=len(states)), dtype=torch.float32)
    probe = fit_probe(states, groups, offsets, added)
    x, v = weighted_differences(states, groups, offsets)
    pairs = [(at + p.preferred, at + p.other) for g, at in zip(groups, offsets, strict=True) for p in g.pairs]
    extra = np.array([float(added[i] - added[j]) for i, j in pairs])
    deviation = states.double().numpy().std(0)
    w = probe.weight.double().numpy() * np.where(deviation > 1e-6, deviation, 0)
    wrong = 1 / (1 + np.exp(x @ w + extra))
    assert x.T @ (v * wrong) == pytest.approx(len(groups) * probe.strength * w, abs=2e-3)
    assert np.abs(fit_probe(states, groups, offsets).weight - probe.weight).max() > 1e-3


def test_too_few_to_leave_some_out():
    """One prompt has no other folds: an ordinary ridge, and nothing is said of how it predicts."""
    states, groups, offsets = preferences(np.random.default_rng(3), 1, 1.0)
    probe = fit_probe(states, groups, offsets)
    assert (probe.strength, probe.log_loss) == (1.0, None) and torch.isfinite(probe.weight).all()


def test_a_stop_comes_through_the_probe(tiny, monkeypatch):
    ticks = []

    def stop(saved):
        ticks.append(saved)
        if sum("Nothing is kept" in t for t in ticks) == 7:
            raise Interrupted(saved)

    monkeypatch.setattr(training, "safe_point", stop)
    with pytest.raises(Interrupted):
        train_reward(tiny, exclaimers(48), **PROBE)


def test_states_that_are_no_numbers_are_told(tiny_folder):
    policy = Policy.load(str(tiny_folder), "float32")
    policy.start.model.norm.weight.data[0] = float("inf")
    with pytest.raises(UserError, match="states are not finite"):
        train_reward(policy, exclaimers(48), **{**PROBE, "epochs": 0})


def test_no_epochs_are_the_probe_alone(tiny, tmp_path):
    """Every layer as in the start, and the report says the same of the reward model and of what it began with."""
    model, report = train_reward(tiny, exclaimers(48), **{**PROBE, "epochs": 0}, out=tmp_path / "r")
    fresh = RewardModel.on(tiny, SETTINGS["top_layers"])
    for name, p in fresh.scalar.trainable().items():
        assert name.startswith("head") or torch.equal(p, dict(model.scalar.named_parameters())[name])
    assert report.losses == [] and report.probe["accuracy"] == report.accuracy.to_json() and report.accuracy.low > 0.6
    completions = [c for g in exclaimers(48) for c in g.completions]
    states = fresh.states(fresh.encode(completions))
    head = model.scalar.head
    assert model.raw_scores(model.encode(completions)).detach().numpy() == pytest.approx(
        (states @ head.weight[0] + head.bias).detach().numpy(), abs=1e-4
    )
    saved = json.loads((tmp_path / "r" / "report.json").read_text())
    assert saved["probe"]["strength"] == report.probe["strength"]
    _, trained = train_reward(tiny, exclaimers(48), **PROBE)
    assert trained.probe == report.probe and trained.losses[0] < 0.05 and trained.log_loss < report.log_loss
    with pytest.raises(UserError, match="would train nothing"):
        train_reward(tiny, exclaimers(48), **{**SETTINGS, "epochs": 0})
