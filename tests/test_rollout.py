"""Sampling: what the generator says of its own tokens is true, whatever is beside them."""

import numpy as np
import pytest
import torch
from conftest import save_model

from accord.data.records import Prompt
from accord.errors import UserError
from accord.nn.native import library
from accord.rollout import decoding
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.rollout import micro_batches
from accord.rollout.sampling import Sampling, draw, restrict, uniforms
from accord.rollout.scoring import kl_between, score, trunk_of

SAMPLING = Sampling(temperature=0.9, max_new_tokens=10, seed=3)


@pytest.fixture
def rollout(tiny, prompts):
    return Engine(tiny, rows=8).sample(prompts, 2, SAMPLING)


def test_layout(tiny, prompts, rollout):
    eos = tiny.tokenizer.eos_ids
    assert tiny.tokenizer.pad_id in eos  # padding equals the end token, and nothing below is confused by it
    assert rollout.finished.any() and not rollout.finished.all()
    for row in range(len(rollout)):
        prompt = tiny.tokenizer.encode_prompt(prompts[row // 2].content)
        chosen = rollout.tokens[row][rollout.response_mask[row]].tolist()
        assert rollout.tokens[row, : len(prompt)].tolist() == prompt
        assert eos[0] in prompt  # the template's own end tokens are not the policy's
        assert not rollout.response_mask[row, : len(prompt)].any()
        assert int(rollout.lengths[row]) == len(prompt) + len(chosen)
        assert bool(rollout.finished[row]) == (chosen[-1] in eos)
        assert not set(chosen[:-1]) & set(eos)
        assert bool(rollout.finished[row]) or len(chosen) == 10
        assert int(rollout.last[row]) == len(prompt) + len(chosen) - 1


def test_sampler_and_scoring_path_agree(tiny, rollout):
    """Ratio 1: the sampler's log-probability of each token is the scoring path's."""
    again = score(tiny.model, rollout, 0, SAMPLING.temperature, 64)
    torch.testing.assert_close(again.logprobs, rollout.engine_logprobs, rtol=0, atol=2e-5)
    wrong = score(tiny.model, rollout, 0, 1.0, 64)
    assert (wrong.logprobs - rollout.engine_logprobs).abs().max() > 1e-2  # the temperature matters


def test_scores_do_not_depend_on_padding_order_or_micro_batches(tiny, rollout):
    whole = score(tiny.model, rollout, 0, 0.9, 10**6).logprobs
    torch.testing.assert_close(score(tiny.model, rollout, 0, 0.9, 1).logprobs, whole, rtol=0, atol=2e-5)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(0))
    shuffled = score(tiny.model, rollout.select(order), 0, 0.9, 64).logprobs
    torch.testing.assert_close(shuffled, whole[order][:, : shuffled.shape[1]], rtol=0, atol=2e-5)


def test_tokens_do_not_depend_on_what_is_beside_them(tiny, prompts, rollout):
    """Two rows at a time with refills, all at once, and one prompt alone: the same completions."""
    for rows in (2, 5, 16):
        again = Engine(tiny, rows=rows).sample(prompts, 2, SAMPLING)
        assert again.texts == rollout.texts
    alone = Engine(tiny, rows=4).sample(prompts[3:4], 2, SAMPLING)
    assert alone.texts == rollout.texts[6:8]


def test_bursts_as_on_a_gpu_write_the_same(tiny, prompts, rollout, monkeypatch):
    """Several steps before anyone looks which rows have ended, and the cache read in larger pieces than needed."""
    before = decoding.Decoding.__init__

    def eight_at_a_time(self, *arguments):
        before(self, *arguments)
        self.burst, self.bucket = 8, 16

    monkeypatch.setattr(decoding.Decoding, "__init__", eight_at_a_time)
    for native in ("1", "0"):
        monkeypatch.setenv("ACCORD_NATIVE", native)
        library.cache_clear()
        again = Engine(tiny, rows=5).sample(prompts, 2, SAMPLING)
        assert torch.equal(again.tokens, rollout.tokens)
        torch.testing.assert_close(again.engine_logprobs, rollout.engine_logprobs, rtol=0, atol=2e-5)
        assert torch.equal(again.finished, rollout.finished)
    library.cache_clear()


def test_progress_adds_up(tiny, prompts, rollout):
    done = []
    Engine(tiny, rows=5).sample(prompts, 2, SAMPLING, on_progress=lambda *count: done.append(count))
    assert sum(ended for ended, _ in done) == len(rollout)
    assert sum(tokens for _, tokens in done) == int(rollout.response_mask.sum())


def test_kept_trunk_is_what_the_frozen_layers_compute(tiny, prompts):
    policy = tiny.adapt("split", 2, 4, 8.0, 0)
    kept = Engine(policy, rows=3).sample(prompts, 2, SAMPLING, keep_trunk=True)
    again = trunk_of(policy.start, kept, policy.split)
    torch.testing.assert_close(kept.trunk[kept.token_mask], again[kept.token_mask], rtol=0, atol=2e-5)


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
def test_adapted_policy_starts_as_its_reference(tiny, prompts, adaptation):
    policy = tiny.adapt(adaptation, 2, 4, 8.0, 0)
    rollout = Engine(policy, rows=8).sample(prompts, 1, SAMPLING)
    kl = kl_between(policy.model, policy.start, rollout, 0, 0, 0.9, 256)
    assert kl.abs().max() < 1e-5
    assert policy.trainable()
    shared = {id(p) for p in tiny.model.parameters()}
    assert not shared & {id(p) for p in policy.trainable().values()}
    if adaptation == "full":
        assert len(policy.trainable()) == len(dict(tiny.model.named_parameters()))


def test_inverse_cdf_by_hand():
    logp = torch.log(torch.tensor([[0.2, 0.5, 0.0, 0.3]]).expand(5, 4))
    u = torch.tensor([0.0, 0.19, 0.21, 0.71, 1 - 1e-12], dtype=torch.float64)
    assert draw(logp, u).tolist() == [0, 0, 1, 3, 3]


def test_inverse_cdf_at_the_edges():
    """A number in [0, 1) picks the first token whose cumulative probability is above it: never one of no probability."""
    logprobs = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5]])).expand(3, -1)
    assert draw(logprobs, torch.tensor([0.0, 0.5, 0.49])).tolist() == [1, 3, 1]


def test_sampling_frequencies():
    logp = torch.log_softmax(torch.tensor([1.0, 0.0, -1.0, 2.0]), -1)
    u = uniforms(0, ["a"], 20000)[0]
    counts = np.bincount(draw(logp.expand(20000, 4), u), minlength=4) / 20000
    np.testing.assert_allclose(counts, logp.exp(), atol=0.012)


def test_luck_belongs_to_the_name():
    assert torch.equal(uniforms(1, ["a", "b"], 4)[1], uniforms(1, ["b"], 4)[0])
    assert not torch.equal(uniforms(1, ["a"], 4), uniforms(2, ["a"], 4))


def test_restrict_by_hand():
    logp = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    torch.testing.assert_close(restrict(logp, 2, 1.0).exp(), torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    torch.testing.assert_close(restrict(logp, 0, 0.65).exp(), torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_bad_sampling(bad):
    with pytest.raises(UserError, match="Sampling needs"):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [{"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}])
def test_training_refuses_unaccounted_sampling(bad):
    with pytest.raises(UserError, match="training"):
        Sampling(**bad).check_training()


def test_prompt_too_long(tiny):
    with pytest.raises(UserError, match=r"'long' has \d+ tokens.*context of 128"):
        Engine(tiny).sample([Prompt("long", "x" * 200)], 1, SAMPLING)


def test_micro_batches_hold_every_row_once_within_budget():
    lengths = [9, 3, 7, 7, 1, 5]
    for families in (range(6), [0, 0, 1, 1, 2, 2], [0] * 6):
        packs = micro_batches(lengths, families, 14)
        assert sorted(torch.cat(packs).tolist()) == list(range(6))
        assert all(len(pack) * max(lengths[i] for i in pack) <= 14 for pack in packs)
    assert [p.tolist() for p in micro_batches([20, 3], [0, 0], 14)] == [[0], [1]]  # longer than the budget: alone


def test_a_prompts_completions_are_packed_together(tiny, rollout):
    """By length alone 16 rows of 8 prompts would meet by luck; their prompt is then computed twice."""
    assert [p.tolist() for p in micro_batches([5, 9, 5, 8], [0, 1, 0, 1], 18)] == [[1, 3], [0, 2]]
    assert [p.tolist() for p in micro_batches([9, 5, 8, 5], [0, 0, 1, 1], 18)] == [[0, 1], [2, 3]]
    order = rollout.group[torch.cat(rollout.micro_batches(2 * int(rollout.lengths.max())))]
    assert len(order) == 16 and len(order.unique_consecutive()) == 8


def test_foreign_architecture(tmp_path, prompts):
    """GPT-2 goes through transformers: same contract, same luck."""
    policy = Policy.load(str(save_model(tmp_path, "gpt2")), "float32")
    rollout = Engine(policy, rows=4).sample(prompts, 2, SAMPLING)
    again = score(policy.model, rollout, 0, SAMPLING.temperature, 64)
    torch.testing.assert_close(again.logprobs, rollout.engine_logprobs, rtol=0, atol=2e-5)
    assert Engine(policy, rows=16).sample(prompts, 2, SAMPLING).texts == rollout.texts
    with pytest.raises(UserError, match="use --adaptation full"):
        policy.adapt("split", 1, 4, 8.0, 0)


def test_lora_opens_in_peft_with_the_same_logits(tmp_path, tiny_folder, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = tiny.adapt("lora", 2, 4, 8.0, 0)
    with torch.no_grad():
        for n, p in policy.trainable().items():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    policy.save(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokens = torch.arange(12)[None]
    before = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(adapted, policy.model(tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
