"""A tokenizer of one's own: what it merges by hand, that nothing is lost, that transformers opens it, and mistakes."""

import json
import re
from collections import Counter

import pytest
from conftest import SHAPE, word_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from accord.cli import main
from accord.data.sources import read_texts
from accord.errors import UserError
from accord.rollout.policy import Policy
from accord.text.chats import encode_chat
from accord.text.tokenizer import Tokenizer
from accord.text.vocabulary import learn_tokenizer, statistics

TEXT = "low low low low low lower lower newest newest newest newest newest newest widest widest widest " * 3 + "naïve 😀\n\tend"


def merges_by_hand(text, count):
    """The greedy pairs of Sennrich et al. 2016 over the words of the text, a space before a word being its own."""
    pieces = Counter(tuple(p) for p in re.findall(r" ?[a-z]+", text))
    out = []
    for _ in range(count):
        pairs = Counter()
        for piece, n in pieces.items():
            for pair in zip(piece, piece[1:], strict=False):
                pairs[pair] += n
        best = max(pairs.values())
        out.append({a + b for (a, b), n in pairs.items() if n == best})  # any of those that are equally frequent
        chosen = yield out[-1]
        merged = Counter()
        for piece, n in pieces.items():
            new, i = [], 0
            while i < len(piece):
                if i + 1 < len(piece) and piece[i] + piece[i + 1] == chosen:
                    new.append(chosen)
                    i += 2
                else:
                    new.append(piece[i])
                    i += 1
            merged[tuple(new)] += n
        pieces = merged


def test_bpe_merges_the_most_frequent_pairs():
    text = "low lower newest widest " * 3 + "low low low newest newest newest "
    learned = learn_tokenizer([text], "bpe", 272)
    vocabulary = {i: t.replace("Ġ", " ") for t, i in learned.get_vocab().items()}
    assert len(learned) == 272 and [vocabulary[i] for i in range(4)] == ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    by_hand = merges_by_hand(text, 12)
    allowed = next(by_hand)
    for i in range(260, 272):
        assert vocabulary[i] in allowed, (i, vocabulary[i], allowed)
        if i < 271:
            allowed = by_hand.send(vocabulary[i])


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_nothing_is_lost(kind, tmp_path):
    learned = learn_tokenizer([TEXT], kind, 272 if kind == "bpe" else None)
    ids = learned(TEXT, add_special_tokens=False)["input_ids"]
    assert learned.decode(ids) == TEXT
    found = statistics(learned, [TEXT])
    assert (found.tokens, found.coverage) == (len(ids), 1.0) and found.bytes_per_token == len(TEXT.encode()) / len(ids)
    assert found.used == len(set(ids)) / (len(learned) - 4)
    learned.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT, add_special_tokens=False)["input_ids"] == ids and again.eos_token == again.pad_token == "<|end|>"
    if kind == "char":
        assert len(ids) == len(TEXT) and statistics(learned, ["low~~"]).coverage == 0.6
    else:
        assert again.decode(again("日本 ~")["input_ids"]) == "日本 ~"  # bytes can tell everything


def test_a_chat_with_it(tmp_path):
    """The roles are single tokens, what counts is the answer and its end, and a character it has not is told."""
    learn_tokenizer(["say hello"], "char").save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 12, "eos_token_id": 0, "pad_token_id": 0})).save_pretrained(tmp_path)
    tokenizer = Policy.load(str(tmp_path), "float32").tokenizer
    parts = encode_chat(tokenizer, [{"role": "user", "content": "say"}, {"role": "assistant", "content": "hello"}])
    spelled = [tokenizer.inner.convert_ids_to_tokens(part.tokens) for part in parts]
    assert spelled == [["<|user|>", "s", "a", "y", "<|end|>", "<|assistant|>"], ["h", "e", "l", "l", "o", "<|end|>"]]
    assert tokenizer.encode_prompt("say") == parts[0].tokens
    for wrong in ("say!", [{"role": "user", "content": "say!"}]):
        with pytest.raises(UserError, match="'!', for which this model has no token"):
            tokenizer.encode_prompt(wrong)


def test_a_tokenizer_of_words_has_a_token_for_the_unknown():
    """It has words of one letter too, which makes it no alphabet."""
    words = word_tokenizer()
    assert "a" in words.get_vocab() and "rhinoceros" not in words.get_vocab()
    assert words.unk_token_id in Tokenizer(words).encode_prompt("a rhinoceros")


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.md").write_text("two\n\nthree")
    (tmp_path / "rows.jsonl").write_text('{"text": "four"}\n{"text": "five"}\n')
    assert read_texts([tmp_path]) == ["one", "two\n\nthree"] and read_texts([tmp_path / "rows.jsonl"]) == ["four", "five"]
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "nul.txt").write_bytes(b"a\x00b")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "typo.jsonl").write_text('{"txet": "four"}\n')
    (tmp_path / "none").mkdir()
    for name, message in (
        ("binary.txt", "cannot be read as UTF-8"),
        ("nul.txt", "holds NUL characters"),
        ("empty.txt", "there is no text"),
        ("typo.jsonl", r"typo\.jsonl:1 has no field 'text'\. Did you mean 'text' by 'txet'"),
        ("none", "is a folder without .txt or .md files"),
        ("a.tx", r"unknown kind of file|does not exist"),
        ("b.txt", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read_texts([tmp_path / name])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "v.txt").write_text("lowest ~")
    for words, message in (
        ("--out x", "support a vocabulary of"),
        ("--size 100 --out x", "is too small: 256 bytes and 4 special tokens are 260"),
        ("--kind char --size 300 --out x", "leave out the size"),
        ("--kind word --out x", "invalid choice"),
        ("--out t.txt", "already exists"),
    ):
        assert main(["tokenizer", "--text", "t.txt", *words.split()]) == 2 and message in capsys.readouterr().err, words
    assert not (tmp_path / "x").exists()
    assert main("tokenizer --text t.txt --size 270 --validation v.txt --out tok".split()) == 0
    assert "270 tokens in tok. Of the validation text" in capsys.readouterr().out
    told = json.loads((tmp_path / "tok/statistics.json").read_text())
    assert told["coverage"] == 1.0 and told["tokens"] == len(AutoTokenizer.from_pretrained("tok")("lowest ~")["input_ids"])
