"""Learning from pairs: each loss by hand and against TRL's on the same tensors, the same bytes after a stop, and mistakes."""

import math
import os
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, save_model, stopped_at
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import accord
from accord.cli import main
from accord.data.pairs import group_pairs
from accord.data.records import Completion, Pair, PairGroup, Prompt, Ranking
from accord.data.sources import read_pairs
from accord.disk import write_lines
from accord.errors import Interrupted, UserError
from accord.nn.budget import TokenBudget
from accord.rollout.policy import Policy
from accord.supervised.comparisons import Comparisons
from accord.supervised.preference import (
    Logprobs,
    Preference,
    batches,
    completion_losses,
    implicit_rewards,
    log1mexp,
    pair_losses,
)
from accord.supervised.settings import PreferenceSettings
from accord.tuning import preference

LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
WORDS = [("ab", "cde"), ("hello", "no"), ("x", "yyyyyy"), ("fine", "good"), ("one two", "three"), ("q", "r")]
PAIRS = [
    PairGroup(Prompt(f"p{i}", "say " + "abcdef"[i] * (1 + i)), tuple(Completion(Prompt("", ""), t, True, k) for k, t in enumerate(both)), (Pair(0, 1),))
    for i, both in enumerate(WORDS)
]  # fmt: skip
SMALL = dict(prompts_per_step=2, epochs=2, learning_rate=1e-3, checkpoint_every=2, validate_every=2, dtype="float32")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_losses_by_hand():
    """Four numbers a pair: log p of both under policy and reference, and how many tokens."""
    of = Logprobs(torch.tensor([-4.0, -9.0]), torch.tensor([-5.0, -6.0]), torch.tensor([4, 6]))
    s = lambda **more: PreferenceSettings(**more)
    pair = (Pair(0, 1),)
    told = lambda settings: pair_losses(of, pair, settings).item()
    assert told(s(beta=0.5)) == pytest.approx(-math.log(sigmoid(0.5 * (1 - -3))))
    assert told(s(loss="ipo", beta=0.5)) == pytest.approx(((1 / 4 - -3 / 6) - 1) ** 2)
    assert told(s(loss="simpo", beta=2, gamma=0.5)) == pytest.approx(-math.log(sigmoid(2 * (-1 - -1.5) - 0.5)))
    odds = lambda p: p / (1 - p)
    ratio = math.log(odds(math.exp(-1)) / odds(math.exp(-1.5)))
    assert told(s(loss="orpo", beta=0.3)) == pytest.approx(1 - 0.3 * math.log(sigmoid(ratio)))
    kto = s(loss="kto", beta=0.5, desirable_weight=2, undesirable_weight=3)
    assert completion_losses(of, torch.tensor([1.0, -1.0]), 0.25, kto).tolist() == pytest.approx(
        [2 * (1 - sigmoid(0.5 - 0.25)), 3 * (1 - sigmoid(0.25 + 1.5))]
    )
    assert completion_losses(of, torch.tensor([0.0, -0.1]), 0.25, kto)[0] == 0
    assert implicit_rewards(of, s(beta=0.5)).tolist() == [0.5, -1.5]
    assert [s(loss=loss).strength for loss in LOSSES] == [0.1, 0.1, 0.1, 0.1, 2.0] and s(loss="simpo", beta=0.1).strength == 0.1


def test_log1mexp_loses_no_digits():
    x = -np.logspace(-9, 2, 200)
    want = np.log1p(-np.exp(x.astype(np.longdouble)))
    mine = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    out = log1mexp(mine)
    np.testing.assert_allclose(out.detach().numpy(), np.where(x > -1e-3, np.log(-np.expm1(x)), want.astype(float)), rtol=1e-12)
    out.sum().backward()
    np.testing.assert_allclose(mine.grad.numpy(), -1 / np.expm1(-x), rtol=1e-9)  # d/dx log(1 - e^x) = -e^x / (1 - e^x)


# ---- against TRL: its trainers' own functions, on a transformers model with the same weights


def padded(rows):
    """(ids, attention, completion mask) of (prompt ids, answer ids) rows."""
    width = max(len(p) + len(a) for p, a in rows)
    fill = lambda parts: torch.tensor([part + [0] * (width - len(part)) for part in parts])
    return fill([p + a for p, a in rows]), fill([[1] * len(p + a) for p, a in rows]), fill([[0] * len(p) + [1] * len(a) for p, a in rows])


@pytest.fixture
def both(tiny_folder):
    """Our start, and transformers' model moved away from it, so that policy and reference differ; ours with the same weights."""
    start = Policy.load(str(tiny_folder), "float32")
    theirs, reference = (AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32) for _ in range(2))
    theirs.model.embed_tokens.padding_idx = None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    policy = start.adapt("full", 1, 1, 1.0, 0)
    weights = dict(theirs.named_parameters())
    for name, p in policy.trainable().items():
        p.data.copy_(weights[name])
    return start, policy, theirs, reference


def trl_self(model, reference, **more):
    return SimpleNamespace(
        model=model, ref_model=reference, accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=False, use_liger_kernel=False, args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, **more,
    )  # fmt: skip


def trl_loss(loss, model, reference, some, settings):
    """TRL's loss of these comparisons, one pair a prompt."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    pytest.importorskip("trl")
    rows = [(j.prompt, a) for k in (0, 1) for j in some.judged for a in [j.answers[k]]]  # all preferred, then all others
    ids, attention, completion = padded(rows)
    if loss in ("dpo", "ipo"):
        from trl.trainer.dpo_trainer import DPOTrainer

        me = trl_self(model, reference, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[{"dpo": "sigmoid"}.get(loss, loss)],
                      loss_weights=[1.0], beta=settings.strength)  # fmt: skip
        return DPOTrainer._compute_loss(me, model, {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}, False)
    if loss == "kto":
        from trl.trainer.kto_trainer import KTOTrainer

        me = trl_self(model, reference, beta=settings.strength, calculate_KL=True, loss_type="kto", desirable_weight=settings.desirable_weight,
                      undesirable_weight=settings.undesirable_weight)  # fmt: skip
        me._compute_kl_logps = lambda m, b: KTOTrainer._compute_kl_logps(me, m, b)
        before = [some.judged[-1], *some.judged[:-1]]
        other = padded([(j.prompt, a) for j, b in zip(some.judged, before, strict=True) for a in b.answers])
        batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion,
                 "label": torch.tensor([True] * len(some) + [False] * len(some))} | dict(zip(
                     ("KL_input_ids", "KL_attention_mask", "KL_completion_mask"), other, strict=True))  # fmt: skip
        return KTOTrainer._compute_loss(me, model, batch, False)
    logits = model(ids, attention_mask=attention).logits[:, :-1]
    tokens = torch.gather(logits.log_softmax(-1), 2, ids[:, 1:, None])[..., 0] * completion[:, 1:]
    mean = tokens.sum(1) / completion[:, 1:].sum(1)
    preferred, others = mean.chunk(2)
    if loss == "orpo":
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer

        told = ORPOTrainer.odds_ratio_loss(trl_self(model, reference, beta=settings.strength), preferred, others)[0]
        return -preferred.mean() - told.mean()  # theirs counts the prompt's tokens into the first term (docs/differences.md)
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    me = trl_self(model, reference, beta=settings.strength, alpha=0.0, loss_type="simpo", simpo_gamma=settings.gamma, label_smoothing=0.0)
    return CPOTrainer.cpo_loss(me, preferred, others)[0].mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_trls(both, loss):
    """The same pairs through both, in one micro-batch, in several and each prompt alone."""
    start, policy, theirs, reference = both
    s = PreferenceSettings(loss=loss, prompts_per_step=len(PAIRS), beta=0.7, undesirable_weight=1.3)
    some = Comparisons(start, PAIRS, None)
    want = trl_loss(loss, theirs, reference, some, s)
    want.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    task = Preference(start, some, None, s)
    task.begin()
    for tokens in (10_000, 100, 1):
        for p in policy.trainable().values():
            p.grad = None
        order = list(range(len(some)))
        sums = task._over(policy, some, task._reference, order, tokens, backward=True)
        assert sums.told()["loss"] == pytest.approx(float(want.detach()), rel=2e-5)
        for name, p in policy.trainable().items():
            assert (p.grad - grads[name]).abs().max() <= 2e-5 * max(1.0, float(grads[name].abs().max())), (name, tokens)
    if loss == "kto":
        assert sums.kl > 0  # else nothing of it was compared
    before = sums.told()
    mine = implicit_rewards_by_hand(loss, theirs, reference, some, s)
    assert before["implicit_reward_preferred"] == pytest.approx(mine[:, 0].mean().item(), rel=1e-4)
    assert before["implicit_reward_other"] == pytest.approx(mine[:, 1].mean().item(), rel=1e-4)
    assert before["accuracy"] == pytest.approx((mine[:, 0] > mine[:, 1]).float().mean().item())


@torch.no_grad()
def implicit_rewards_by_hand(loss, model, reference, some, s):
    out = []
    for j in some.judged:
        both = []
        for answer in j.answers:
            ids = torch.tensor([j.prompt + answer])
            l, r = (
                float(m(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(j.prompt) - 1 :].sum())
                for m in (model, reference)
            )
            n = len(answer)
            both.append({"dpo": s.strength * (l - r), "kto": s.strength * (l - r), "ipo": (l - r) / n, "simpo": s.strength * l / n,
                         "orpo": l / n - math.log(1 - math.exp(l / n))}[loss])  # fmt: skip
        out.append(both)
    return torch.tensor(out)


def test_batches_of_what_is_held_out():
    """All of it once, and with two or more no batch of one, which KTO could estimate no KL from."""
    for count in range(1, 40):
        for size in (1, 2, 3, 8):
            found = batches(count, size)
            assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])] and found[-1][1] == count
            assert count == 1 or min(b - a for a, b in found) >= 2, (count, size)
            assert max(b - a for a, b in found) < 2 * max(2, size)


def test_a_prompt_that_is_twice_in_a_step_gets_none_of_its_own_completions(both):
    start, policy, *_ = both
    some = Comparisons(start, PAIRS, None)
    task = Preference(start, some, None, PreferenceSettings(loss="kto"))
    told = lambda numbers, tokens=10_000: task._mismatched_kl(policy, some, numbers, tokens)
    assert told([0, 1, 0, 2, 1]) == pytest.approx(told([0, 1, 2])) != 0 and told([3, 3]) == 0.0
    theirs = {0: 2, 1: 0, 2: 1}
    sizes = [some.rollout(part, [theirs[i] for i in part]).tokens.numel() for part in some.packs([0, 1, 2], 40, theirs)]
    assert max(sizes) <= 40


RANKED = [Completion(Prompt("r", "three?"), text, True, k) for k, text in enumerate(("best", "middle one", "last", "also middle"))]


def test_rankings_of_many(both):
    """Four completions with weights: the loss is the weighted mean over their pairs, the prompt counts by its weight."""
    start, policy, _, _ = both
    group = group_pairs({"r": RANKED}, [Ranking("r", "a", (1, 2, None, 2))], fail_weight=0.5, labeler_weights={"a": 3.0})
    assert len(group[0].pairs) == 5 and group[0].weight == 3.0
    s = PreferenceSettings(prompts_per_step=2, beta=0.7)
    some = Comparisons(start, [*group, PAIRS[0]], None)
    assert some.judged[0].labels == pytest.approx([1.0, (-1 + 0.5) / 2.5, -1.5 / 2.5, (-1 + 0.5) / 2.5])
    task = Preference(start, some, None, s)
    task.begin()
    told = task._over(policy, some, task._reference, [0, 1], 10_000, backward=False).told()
    logp = [[float(x) for x in row] for row in some.logprobs(policy.model, TokenBudget(10_000), "x")]
    reference = [[float(x) for x in row] for row in task._reference]
    r = [[0.7 * (a - b) for a, b in zip(*both, strict=True)] for both in zip(logp, reference, strict=True)]
    of = lambda pairs, r: sum(p.weight * -math.log(sigmoid(r[p.preferred] - r[p.other])) for p in pairs) / sum(p.weight for p in pairs)
    assert told["loss"] == pytest.approx((3.0 * of(group[0].pairs, r[0]) + of(PAIRS[0].pairs, r[1])) / 2, rel=1e-5)
    weights = [p.weight for p in (*group[0].pairs, *PAIRS[0].pairs)]
    right = [float(r[0][p.preferred] > r[0][p.other]) for p in group[0].pairs] + [float(r[1][0] > r[1][1])]
    assert told["accuracy"] == pytest.approx(np.average(right, weights=weights))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_is_held_out_is_measured_whole(tiny, loss):
    """However it is cut into batches and micro-batches; with kto, no batch is left of one prompt."""
    s = lambda n: PreferenceSettings(loss=loss, prompts_per_step=n, micro_batch_tokens=50)
    found = []
    for size in (2, 6):
        task = preference(tiny, PAIRS[:5], PAIRS[1:], s(size))
        task.begin()
        policy = tiny.adapt("full", 1, 1, 1.0, 0)
        with torch.no_grad():
            for p in policy.trainable().values():
                p.add_(0.01)
        found.append(task.measure(policy, TokenBudget(50)))
    if loss == "dpo":
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert set(found[0]) == set(found[1]) and ("kl_estimate" in found[0]) == (loss == "kto")


@pytest.mark.parametrize(("loss", "adaptation"), [("dpo", "full"), ("kto", "lora"), ("orpo", "split")])
def test_a_stop_changes_no_byte(tiny_folder, tmp_path, loss, adaptation):
    def go(name, resume=False, pairs=PAIRS):
        return accord.train_preference(
            Policy.load(str(tiny_folder), "float32"), pairs, out=tmp_path / name, validation=PAIRS[:3], resume=resume,
            **SMALL, loss=loss, adaptation=adaptation, top_layers=2, lora_rank=2,
        )  # fmt: skip

    whole = go("whole")
    assert whole.steps == 6 and whole.after["loss"] != whole.before["loss"]
    with stopped_at(3), pytest.raises(Interrupted, match="Training is saved"):
        go("cut")
    again = go("cut", resume=True)
    assert (again.before, again.after, again.steps) == (whole.before, whole.after, 6)
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with pytest.raises(UserError, match="pairs"):
        go("cut", resume=True, pairs=PAIRS[:-1])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=128, n_embd=16, n_layer=1, n_head=2, eos_token_id=256)).save_pretrained("gpt2")
    byte_tokenizer().save_pretrained("gpt2")
    rows = [
        {"id": g.prompt.id, "prompt": g.prompt.content, "chosen": g.completions[0].text, "rejected": g.completions[1].text} for g in PAIRS
    ]
    write_lines(tmp_path / "pairs.jsonl", rows)
    write_lines(tmp_path / "held.jsonl", rows[:2])
    words = "prefer --model model --prompts-per-step 2 --learning-rate 1e-3".split()
    assert main([*words, "--pairs", "pairs.jsonl", "--validation", "held.jsonl", "--out", "r"]) == 0
    told = capsys.readouterr().out
    assert "Held-out loss 0.693 -> " in told and "told apart" in told and "r/policy" in told  # log 2: policy and reference are one
    page = (tmp_path / "r/report.html").read_text()
    assert "learning from preferences" in page and "Pairs told apart" in page and "Implicit reward" in page
    assert main(["resume", "r"]) == 0  # done already
    assert main([*words, "--out", "x"]) == 2 and "Give one of --pairs" in capsys.readouterr().err
    assert main([*words, "--pairs", "pairs.jsonl", "--loss", "kto", "--prompts-per-step", "1", "--out", "x"]) == 2
    assert "two prompts or more" in capsys.readouterr().err
    assert main([*words, "--pairs", "pairs.jsonl", "--loss", "dpoo", "--out", "x"]) == 2 and "loss" in capsys.readouterr().err
    write_lines(tmp_path / "long.jsonl", [*rows, {"prompt": "x" * 100, "chosen": "y" * 60, "rejected": "z", "id": "long"}])
    assert main([*words, "--pairs", "long.jsonl", "--out", "x"]) == 2
    assert "1 of 7 prompts" in (told := capsys.readouterr().err) and "'long'" in told and "--max-tokens 128" in told
    assert not (tmp_path / "x").exists()
    for model, more, message in (
        ("model", ["--adaptation", "split"], "this model has 4 layers"),
        ("gpt2", ["--adaptation", "lora"], "cannot lora them"),
    ):  # a run that cannot begin leaves no folder
        assert main(["prefer", "--model", model, *more, "--pairs", "pairs.jsonl", "--out", "x"]) == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    write_lines(
        tmp_path / "tied.jsonl",
        [{"prompt": "q", "completions": [{"text": "a"}, {"text": "b"}], "pairs": [], "ties": [{"preferred": 0, "other": 1}]}],
    )
    assert main([*words, "--pairs", "tied.jsonl", "--out", "x"]) == 2 and "ties teach nothing" in capsys.readouterr().err
    write_lines(tmp_path / "completions.jsonl", ({**c.to_json()} for c in RANKED))
    write_lines(tmp_path / "rankings.jsonl", [Ranking("r", "a", (1, 2, None, 2)).to_json()])
    assert main([*words, "--completions", "completions.jsonl", "--rankings", "rankings.jsonl", "--loss", "ipo", "--out", "ranked"]) == 0
    capsys.readouterr()
    assert main(["resume", "ranked"]) == 0
    assert len(read_pairs(tmp_path / "pairs.jsonl")) == 6
