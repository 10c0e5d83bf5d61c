"""Pretraining: no document sees another, gradients and steps as transformers and torch have them, the same bytes after a stop."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import accord
from accord.cli import main
from accord.disk import write_lines
from accord.errors import Interrupted, UserError
from accord.nn.budget import TokenBudget
from accord.nn.layout import Layout
from accord.nn.weights import merged_state
from accord.optimizer import Optimizer
from accord.pretraining import tokens as module
from accord.pretraining.language import Language, in_micro_batches, loss_sum, new_policy
from accord.pretraining.settings import PretrainSettings
from accord.pretraining.sizes import SIZES, config_of
from accord.pretraining.tokens import LINES, ROWS, Tokens, filling
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.text.tokenizer import Tokenizer

TEXTS = [f"{word} " * (1 + 3 * k) + "end." for k, word in enumerate(("one", "two", "three", "four", "five", "six", "seven"))]
SETTINGS = dict(size="0.5m", context=16, tokens_per_step=64, micro_batch_tokens=64, dtype="float32", samples=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(byte_tokenizer())


@pytest.fixture
def tokens(tokenizer, tmp_path):
    return Tokens.of(TEXTS, tokenizer, tmp_path / "tokens", "k")


def test_documents_on_the_disk(tokenizer, tokens, tmp_path):
    end = tokenizer.eos_ids[0]
    want = [[end, *ids, end] for ids in tokenizer.encode_texts(TEXTS)]
    assert tokens.ids.tolist() == [i for row in want for i in row] and len(tokens) == 7
    assert np.diff(tokens.starts).tolist() == list(map(len, want)) and tokens.sizes.tolist() == [len(t.encode()) for t in TEXTS]
    assert isinstance(tokens.ids, np.memmap)
    again = Tokens.of(iter(()), tokenizer, tmp_path / "tokens", "k")  # it is there already
    assert again.digest == tokens.digest
    with pytest.raises(UserError, match="something else"):
        Tokens.of(TEXTS, tokenizer, tmp_path / "tokens", "other")
    with pytest.raises(UserError, match="no text"):
        Tokens.of(["", "  "], tokenizer, tmp_path / "none", "k")


def test_every_token_is_told_once_after_its_own_document(tokens):
    """Each token but a document's first is told once, in a row of that document alone, at most the context after its beginning."""
    for context in (4, 16, 1000):
        parts = tokens.whole().cut(context)
        told = np.zeros(len(tokens.ids), dtype=int)
        for begin, size in zip(parts.begins, parts.sizes, strict=True):
            assert 1 <= size <= context
            told[begin + 1 : begin + size + 1] += 1
            document = np.searchsorted(tokens.starts, begin, "right") - 1
            assert begin + size < tokens.starts[document + 1]
        first = np.zeros(len(told), dtype=bool)
        first[tokens.starts[:-1]] = True
        assert (told == ~first).all() and tokens.whole().told == told.sum()


def test_what_is_held_out(tokenizer, tokens, tmp_path):
    """Of few documents the end of the last; of many whole ones, which are in no row of training; a twentieth at most, about."""
    train, held = tokens.split()
    assert train.spans[-1, 1] == held.spans[0, 0] and held.spans[-1, 1] == len(tokens.ids)
    assert 2 <= held.told + len(held.spans) <= max(2, len(tokens.ids) // 20)
    many = Tokens.of([f"document {i} " * (i % 5 + 1) for i in range(200)], tokenizer, tmp_path / "many", "k")
    train, held = many.split()
    both = sorted(map(tuple, [*train.spans.tolist(), *held.spans.tolist()]))
    assert both == list(zip(many.starts[:-1].tolist(), many.starts[1:].tolist(), strict=True)) and 2 <= len(held.spans) <= 11
    assert held.told + len(held.spans) <= len(many.ids) // 20
    assert held.bytes == sum(many.sizes[np.searchsorted(many.starts, a)] for a, _ in held.spans.tolist())


@pytest.mark.parametrize("long", [0, 10, 24])
def test_a_long_document_is_not_all_held_out(tokenizer, tmp_path, long):
    """Whichever of them it is; a twentieth of the tokens is the most."""
    some = Tokens.of(["x y z " * (2000 if i == long else 2) for i in range(25)], tokenizer, tmp_path / "uneven", "k")
    train, held = some.split()
    assert 0 < held.told <= len(some.ids) // 20 and train.told > 18 * held.told
    told = np.zeros(len(some.ids), dtype=int)
    for rows in (train, held):
        for a, b in rows.spans:
            told[a:b] += 1
    assert (told == 1).all()


def test_what_a_text_spells_ends_no_document(tokenizer, tmp_path):
    """Only the two end tokens around a document are end tokens."""
    some = Tokens.of(["one <|end|> two <|user|> three"], tokenizer, tmp_path / "spelled", "k")
    assert (np.asarray(some.ids) == tokenizer.eos_ids[0]).sum() == 2
    assert tokenizer.inner.decode(some.ids[1:-1].tolist()) == "one <|end|> two <|user|> three"


def test_two_that_write_the_same_tokens(tokenizer, tmp_path, monkeypatch):
    """One ends while the other is still at it: what is there is whole, and nothing else is left."""
    write, first = module._write, []

    def slow(texts, *rest):
        if not first:
            first.append(1)
            Tokens.of(TEXTS, tokenizer, tmp_path / "tokens", "k")
        write(texts, *rest)

    monkeypatch.setattr(module, "_write", slow)
    mine = Tokens.of(TEXTS, tokenizer, tmp_path / "tokens", "k")
    assert mine.ids[-1] == tokenizer.eos_ids[0] and [p.name for p in tmp_path.iterdir()] == ["tokens"]
    (tmp_path / "tokens/ids.bin").write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match="damaged"):
        Tokens.of(TEXTS, tokenizer, tmp_path / "tokens", "k")


def test_what_decides_the_tokens_decides_where_they_are_kept(tokenizer):
    inner = byte_tokenizer()
    inner.eos_token = "<|user|>"
    other = Tokenizer(inner)
    assert other.fingerprint == tokenizer.fingerprint and other.digest != tokenizer.digest == Tokenizer(byte_tokenizer()).digest


def test_the_held_out_part_is_known_by_what_it_says(tokenizer, tmp_path):
    of = lambda name, *texts: Tokens.of(texts, tokenizer, tmp_path / name, name).whole().digest
    assert len({of("a", "good morning"), of("b", "12345 678910"), of("c", "good", "morning")}) == 3


def test_a_layout_of_rows_apart():
    """As the one that compares beginnings, where no two rows have one in common."""
    rows = [[5, 6, 7], [1], [2, 2]]
    apart = Layout.apart(torch.tensor([i for row in rows for i in row]), torch.tensor([3, 1, 2]), 3)
    padded = torch.tensor([row + [0] * (3 - len(row)) for row in rows])
    other = Layout.of(padded, torch.tensor([3, 1, 2]))
    grid = lambda layout, values: layout.rows(values)
    assert torch.equal(grid(apart, apart.tokens), grid(other, other.tokens)) and torch.equal(
        grid(apart, apart.positions), grid(other, other.positions)
    )
    assert torch.equal(apart.home.places, apart.everywhere.places)


def test_batches_are_filled_up_to_few_shapes(tokens):
    """With rows of their own, which are behind the documents' and in no loss; nothing of the documents' is changed."""
    for rows, count, widest in ((1, 1, 16), (8, 256, 32), (7, 255, 48), (9, 250, 32), (3, 100, 16), (80, 8191, 112), (5, 512, 128)):
        lengths = filling(rows, count, widest)
        assert (rows + len(lengths)) % ROWS == 0 and (count + lengths.sum()) % LINES == 0 and all(1 <= n <= widest for n in lengths)
        assert lengths.sum() < 2 * LINES + ROWS
    assert len(filling(8, 256, 32)) == 0
    parts = tokens.whole().cut(16)
    batch = parts.batch([2, 0], torch.device("cpu"))
    row = lambda i, by: tokens.ids[parts.begins[i] + by : parts.begins[i] + by + parts.sizes[i]].tolist()
    assert batch.layout.tokens[: batch.own].tolist() == row(2, 0) + row(0, 0) and batch.told[: batch.own].tolist() == row(2, 1) + row(0, 1)
    assert int(batch.layout.positions.max()) < max(parts.sizes[[2, 0]])  # learned positions have no more
    assert len(batch.told) % LINES == 0 and batch.layout.everywhere.token.shape[0] % ROWS == 0


def peer_of(policy):
    """transformers' Llama with the same weights."""
    config = LlamaConfig(**{k: v for k, v in policy.raw.items() if k not in ("architectures", "model_type")})
    model = LlamaForCausalLM(config)
    model.load_state_dict(merged_state(policy.model), strict=False)
    model.tie_weights()
    model.model.embed_tokens.padding_idx = None
    return model


def peer_loss(model, tokens, parts, numbers):
    """Row by row, each alone: transformers' logits, summed -log p."""
    total = 0.0
    for begin, size in zip(parts.begins[numbers], parts.sizes[numbers], strict=True):
        row = torch.from_numpy(tokens.ids[begin : begin + size + 1].astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum")
    return total


@pytest.mark.parametrize("grouped", ["multi-head", "grouped"])
def test_packed_gradients_are_transformers_of_each_row_alone(tokenizer, tokens, grouped):
    s = PretrainSettings(**SETTINGS, attention=grouped)
    policy = new_policy(tokenizer, s)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.mul_(3)  # far from uniform
    task, model = Language(tokens.whole(), tokens.whole(), s), peer_of(policy)
    numbers = task.parts_of(0)
    want = peer_loss(model, tokens, task.train, numbers) / int(task.train.sizes[numbers].sum())
    want.backward()
    theirs = dict(model.named_parameters())
    for budget in (10_000, 40, 1):
        for p in policy.trainable().values():
            p.grad = None
        assert (len(in_micro_batches(task.train, numbers, budget)) == 1) == (budget == 10_000)
        assert task.accumulate(policy, 0, budget)["loss"] == pytest.approx(float(want.detach()), rel=1e-5)
        for name, p in policy.trainable().items():
            assert (p.grad - theirs[name].grad).abs().max() <= 1e-5 * max(1.0, float(p.grad.abs().max())), name
    measured = task.measure(policy, TokenBudget(40))
    every = np.arange(len(task.heldout))
    total = float(peer_loss(model, tokens, task.heldout, every).detach())
    assert measured["loss"] == pytest.approx(total / int(task.heldout.sizes.sum()), rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(len(t.encode()) for t in TEXTS), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))


def test_a_document_sees_no_other(tokenizer, tokens):
    """What stands in the other rows of its micro-batch changes nothing of it."""
    s = PretrainSettings(**SETTINGS)
    policy, parts = new_policy(tokenizer, s), tokens.whole().cut(16)
    alone = [float(loss_sum(policy.model, parts.batch([i], policy.device)).detach()) for i in range(len(parts))]
    together = float(loss_sum(policy.model, parts.batch(list(range(len(parts))), policy.device)).detach())
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_each_epoch_has_every_row_once_in_another_order(tokens):
    s = PretrainSettings(**{**SETTINGS, "tokens_per_step": 30}, epochs=3)
    task = Language(tokens.whole(), tokens.whole(), s)
    taken = [task.parts_of(step).tolist() for step in range(task.steps)]
    flat, n = [i for some in taken for i in some], len(task.train)
    assert len(flat) == 3 * n and all(sorted(flat[k * n : (k + 1) * n]) == list(range(n)) for k in range(3))
    assert flat[:n] != flat[n : 2 * n] and flat[:n] != sorted(flat[:n])
    counts = [int(task.train.sizes[some].sum()) for some in taken]
    assert sum(counts) == 3 * task.each and max(counts) < 30 + 16  # a row that begins within a step is whole in it
    for context, size in ((16, 16), (8, 30), (4, 7)):  # no step is without rows, and none is lost
        every = Language(
            tokens.whole(), tokens.whole(), PretrainSettings(**{**SETTINGS, "tokens_per_step": size, "context": context}, epochs=2)
        )
        each = [len(every.parts_of(step)) for step in range(every.steps)]
        assert min(each) > 0 and sum(each) == 2 * len(every.train)
    with pytest.raises(UserError, match="it must be the context"):
        accord.pretrain("none", ["none"], context=32, tokens_per_step=8)
    few = Language(tokens.whole(), tokens.whole(), PretrainSettings(**{**SETTINGS, "tokens_per_step": 30}, tokens=100))
    assert few.steps == 4 and [few.parts_of(k).tolist() for k in range(3)] == taken[:3]


def test_muon_is_torchs_for_the_layers_matrices_and_adamw_for_the_rest():
    """Two steps against torch's optimizers over the same parameters, with a checkpoint between."""
    torch.manual_seed(0)
    shapes = {"model.layers.0.a": (6, 4), "model.embed": (5, 4), "model.layers.0.norm": (4,)}
    values = {n: torch.randn(s) for n, s in shapes.items()}
    make = lambda: {n: v.clone().requires_grad_() for n, v in values.items()}
    mine, theirs = make(), make()
    build = lambda named: Optimizer({"policy": (named, 0.1)}, 1e9, 3, TokenBudget(8), "", 0.2, (0.9, 0.95), "muon")
    ours = build(mine)
    turned = torch.optim.Muon([theirs["model.layers.0.a"]], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([theirs["model.embed"], theirs["model.layers.0.norm"]], lr=0.1, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(2):
        grads = {n: torch.randn(s, generator=torch.Generator().manual_seed(step)) for n, s in shapes.items()}
        ours.set_rate(1.0)

        def gradient(tokens, grads=grads, mine=mine):
            for n, p in mine.items():
                p.grad = grads[n].clone()
            return {}

        ours.take(gradient)
        for n, p in theirs.items():
            p.grad = grads[n].clone()
        turned.step()
        rest.step()
        state = {n: t.clone() for n, t in ours.state().items()}
        ours = build(mine)
        ours.load_state(state)
    for n in shapes:
        torch.testing.assert_close(mine[n], theirs[n])


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_positions_in_training_sampling_and_a_saved_folder(tokenizer, tmp_path, positions):
    """What is sampled has the probabilities that scoring gives; what is saved is what is opened."""
    s = PretrainSettings(**SETTINGS, positions=positions)
    policy = new_policy(tokenizer, s)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.mul_(4)
    policy.save(tmp_path / "m")
    again = Policy.load(str(tmp_path / "m"), "float32")
    ids = [256, 65, 66, 67, 65, 66]
    logits = policy.model(torch.tensor([ids])).detach()
    assert torch.equal(again.model(torch.tensor([ids])), logits)
    swapped = policy.model(torch.tensor([[256, 66, 65, 67, 65, 66]])).detach()
    assert (swapped[0, -1] - logits[0, -1]).abs().max() > 1e-3  # the order counts
    ((tokens, logprobs, _),) = Engine(again, 1).go_on([ids], ["x"], Sampling(1.0, max_new_tokens=8, seed=1))
    whole = again.model(torch.tensor([ids + tokens])).log_softmax(-1)[0]
    want = [float(whole[len(ids) - 1 + k, token]) for k, token in enumerate(tokens)]
    assert logprobs == pytest.approx(want, abs=1e-4)
    adapted = again.adapt("split", 2, 4, 8.0, 0)  # what others build on
    assert torch.equal(adapted.model(torch.tensor([ids])).detach(), logits)
    if positions == "rotary":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, logits, rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(tmp_path / "m").eos_token_id == tokenizer.eos_ids[0]
    elif positions == "sinusoidal":
        added = again.model.model.embed(torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, 7]), torch.float32)
        added = added - again.model.model.embed_tokens.weight[0]
        D = added.shape[1]
        want = [[(math.sin, math.cos)[c % 2](m / 10000 ** ((c - c % 2) / D)) for c in range(D)] for m in (0, 1, 7)]
        torch.testing.assert_close(added, torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_sizes_are_what_they_say(tokenizer):
    for name, size in SIZES.items():
        count = size.weights(len(tokenizer.inner))
        own = count - len(tokenizer.inner) * size.width
        assert 0.8 < own / (1e6 * float(name.removesuffix("m"))) < 1.15, name
        for grouped in (False, True):
            with torch.device("meta"):
                model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config_of(size, 260, 64, 256, grouped).items() if k not in ("architectures", "model_type")}))  # fmt: skip
            assert sum(p.numel() for p in model.parameters()) == size.weights(260, grouped)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stop_changes_no_byte(tmp_path, monkeypatch, optimizer):
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    byte_tokenizer().save_pretrained(tmp_path / "tok")
    write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS * 4])

    def go(name, resume=False, text="t.jsonl"):
        return accord.pretrain(
            tmp_path / "tok", [tmp_path / text], out=tmp_path / name, resume=resume,
            **{**SETTINGS, "samples": 2, "sample_tokens": 5}, epochs=2, checkpoint_every=2, validate_every=3, optimizer=optimizer,
        )  # fmt: skip

    whole = go("whole")
    assert not any(p.requires_grad for p in whole.policy.model.parameters())  # what others start from
    assert len(whole.policy.frozen().adapt("split", 1, 4, 8.0, 0).trainable()) == 10
    with stopped_at(5), pytest.raises(Interrupted, match="Training is saved"):
        go("cut")
    again = go("cut", resume=True)
    assert (again.before, again.after, again.steps) == (whole.before, whole.after, whole.steps)
    for name in ("metrics.jsonl", "completions.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole/completions.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {"sample-1", "sample-2"} and "What it writes" in (tmp_path / "whole/report.html").read_text()
    write_lines(tmp_path / "other.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(UserError, match="text"):
        go("cut", resume=True, text="other.jsonl")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("It was a day like any other. " * 60)
    assert main("tokenizer --text a.txt --size 270 --out tok".split()) == 0
    words = (
        "pretrain --tokenizer tok --text a.txt --size 0.5m --context 32 --tokens-per-step 256 --validate-every 2 --sample-tokens 8".split()
    )
    assert main([*words, "--out", "r"]) == 0
    told = capsys.readouterr().out
    assert "0.5 M weights" in told and "Bits a byte" in told and "look-inside r/policy" in told
    assert main([*words, "--out", "r"]) == 2 and "accord resume r" in capsys.readouterr().err
    assert main(["resume", "r"]) == 0
    assert main(["pretrain", "--sizes"]) == 0 and "350m" in capsys.readouterr().out
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00\xfe")
    for more, message in (
        (["--text", "none.txt"], "none.txt does not exist"),
        (["--text", "binary.txt"], "binary.txt"),
        (["--size", "7m"], "Unknown size '7m'"),
        (["--positions", "rotery"], "positions"),
        (["--most", "0"], "--most is 0"),
    ):
        assert main([*words, *more, "--out", "x"]) == 2, more
        assert message in capsys.readouterr().err
    assert main("pretrain --tokenizer tok --text empty.txt --out x".split()) == 2 and "no text" in capsys.readouterr().err
    (tmp_path / "x.txt").write_text("x")
    assert main("pretrain --tokenizer tok --text x.txt --out x".split()) == 2 and "too little text" in capsys.readouterr().err
    assert main("pretrain --tokenizer none --text a.txt --out x".split()) == 2 and "none" in capsys.readouterr().err
    assert main("pretrain --text a.txt --out x".split()) == 2 and "--tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
