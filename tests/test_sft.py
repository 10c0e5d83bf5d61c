"""Supervised fine-tuning: which tokens count, the gradient against transformers', the same bytes after a stop, and mistakes."""

import json
import math

import pytest
import torch
from conftest import byte_tokenizer, save_model, stopped_at
from transformers import AutoModelForCausalLM

import accord
from accord.cli import main
from accord.data.records import Example
from accord.data.sources import read_examples
from accord.disk import write_lines
from accord.errors import Interrupted, UserError
from accord.rollout.policy import Policy
from accord.supervised.examples import Encoded, encode_example
from accord.supervised.imitation import loss_of, sft_loss
from accord.supervised.settings import SFTSettings
from accord.supervised.training import State, rate_at
from accord.text.chats import encode_chat
from accord.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3 = (  # of what was thought only the last answer's stays, empty where nothing was
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
R1 = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
)
CHAT = [
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Hello.\n"},
    {"role": "user", "content": "assistant\nMore?"},
    {"role": "assistant", "content": "Yes & no"},
]


def tokenizer_of(template, end="<|im_end|>", begin=None):
    inner = byte_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
    inner.add_special_tokens({"additional_special_tokens": special})
    inner.eos_token, inner.chat_template = end, template
    if begin:
        inner.bos_token = begin
    return Tokenizer(inner)


def spelled(tokenizer, parts):
    """The whole text, and what of it counts."""
    read = lambda some: [tokenizer.inner.decode(part.tokens) for part in some]
    return "".join(read(parts)), read(part for part in parts if part.chosen)


@pytest.mark.parametrize(
    ("template", "end", "counts"),
    [
        (CHATML, "<|im_end|>", ["Hello.\n<|im_end|>", "Yes & no<|im_end|>"]),
        (LLAMA3, "<|eot_id|>", ["Hello.<|eot_id|>", "Yes & no<|eot_id|>"]),
        (QWEN3, "<|im_end|>", ["Hello.\n<|im_end|>", "<think>\n\n</think>\n\nYes & no<|im_end|>"]),
        (MISTRAL, "</s>", [" Hello.\n</s>", " Yes & no</s>"]),
        (PHI3, "<|end|>", ["Hello.\n<|end|>", "Yes & no<|end|>"]),
    ],
)
def test_what_counts_is_what_the_assistant_writes(template, end, counts):
    tokenizer = tokenizer_of(template, end)
    whole, chosen = spelled(tokenizer, encode_chat(tokenizer, CHAT))
    assert chosen == counts
    parts = encode_chat(tokenizer, CHAT)
    for k, turn in ((1, 0), (3, 2)):  # each answer is learned after what it would be sampled from
        assert [t for part in parts[: turn + 1] for t in part.tokens] == tokenizer.encode_prompt(CHAT[:k])
    rendered = tokenizer.inner.apply_chat_template(CHAT, tokenize=False)
    assert rendered.startswith(whole) and rendered[len(whole) :].strip() == ""  # nothing else is left out than what follows the end


def test_the_same_tokens_count_as_by_transformers_marks():
    """Its templates may say themselves what the assistant generates; ours asks no template for that."""
    ours, theirs = tokenizer_of(CHATML), tokenizer_of(MARKED)
    parts = encode_chat(ours, CHAT)
    tokens, mask = [t for p in parts for t in p.tokens], [int(p.chosen) for p in parts for _ in p.tokens]
    told = theirs.inner.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    count = len(tokens)
    assert told["input_ids"][:count] == tokens and told["assistant_masks"] == mask + [0] * (len(told["assistant_masks"]) - count)


@pytest.mark.bundled
def test_the_bundled_models_own_template():
    policy = accord.load()
    whole, chosen = spelled(policy.tokenizer, encode_chat(policy.tokenizer, CHAT))
    assert (
        chosen == ["Hello.\n<|im_end|>", "Yes & no<|im_end|>"]
        and whole.startswith("<|im_start|>system\n")
        and whole.count("<|im_start|>") == 5
    )
    prompt = policy.tokenizer.encode_prompt(CHAT[:1])
    assert [t for p in encode_chat(policy.tokenizer, CHAT[:2]) for t in p.tokens][: len(prompt)] == prompt  # as it is sampled from


def test_thoughts_are_learned_where_the_template_keeps_them():
    empty = "{% if m.role == 'assistant' and loop.last %}"
    tokenizer = tokenizer_of(QWEN3.replace(empty, empty.replace(" %}", " and '<think>' not in m.content %}")))
    thought = [CHAT[0], {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"}]
    assert spelled(tokenizer, encode_chat(tokenizer, thought))[1] == ["<think>\nadd\n</think>\n\n4<|im_end|>"]


def test_the_users_words_end_no_answer():
    """An end token that the user writes is none of the assistant's."""
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "<|eot_id|>"))
    with pytest.raises(UserError, match="does not end what the assistant says"):
        encode_chat(tokenizer, [*CHAT[:2], {"role": "user", "content": "what is <|im_end|>?"}, CHAT[3]])


def test_a_sentencepiece_begins_no_word_in_the_middle():
    """Where a tokenizer marks the beginning of a text, an answer in the middle of it has no such mark."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "\u2581", *sorted(set("Hello.INSTYs&nb<>amr?ti[]/\n"))])}
    raw = Raw(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Replace("\u2581", " ")
    raw.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
    tokenizer.inner.chat_template = MISTRAL
    parts = encode_chat(tokenizer, CHAT[:2])
    whole = tokenizer.encode_plain(tokenizer.render(CHAT[:2], False))
    assert [t for part in parts for t in part.tokens] == whole and parts[0].tokens == tokenizer.encode_prompt(CHAT[:1])
    assert tokenizer.inner.convert_ids_to_tokens(parts[1].tokens)[:3] == ["\u2581", "H", "e"]


def test_texts_without_a_template(tmp_path):
    tokenizer = Tokenizer(byte_tokenizer(chat=False))
    row = encode_example(tokenizer, Example("e", "say", " a"))
    assert [tokenizer.inner.decode([t]) for t in row.tokens] == ["s", "a", "y", " ", "a", "<|end|>"] and list(row.counted) == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    assert list(encode_example(tokenizer, Example("e", "", "ab")).counted) == [0, 1, 1]  # before a first token stands nothing
    with pytest.raises(UserError, match=r"Example 'e'.*no chat template"):
        encode_example(tokenizer, Example("e", CHAT[:1], "x"))


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (CHATML, CHAT[:3], "ends with the user"),
        (CHATML, [], "ends with the user"),
        (CHATML.replace("m.content }}", "m.content | upper }}"), CHAT, "changes what the assistant says"),
        (CHATML.replace("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"), CHAT, "leaves out some of it"),
        (R1, CHAT, "writes the answer otherwise than it asks for one"),
        (CHATML.replace("<|im_end|>", ""), CHAT, r"does not end what the assistant says.*<\|im_end\|>"),
        (CHATML.replace("{% endfor %}", "{{ raise_exception('no') }}{% endfor %}"), CHAT, "chat template refuses"),
        ("<|begin_of_text|><|begin_of_text|>" + CHATML, CHAT, "two beginning-of-sequence"),
    ],
)
def test_templates_that_do_not_serve(template, chat, message):
    with pytest.raises(UserError, match=message):
        encode_chat(tokenizer_of(template, begin="<|begin_of_text|>"), chat)


EXAMPLES = [Example(f"e{i}", "say " + "abcdefghij"[i] * (1 + i % 4), "xyz"[i % 3] * (2 + 3 * (i % 3))) for i in range(10)]
SMALL = dict(examples_per_step=4, epochs=2, learning_rate=1e-3, checkpoint_every=2, validate_every=2, dtype="float32")


def peer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.embed_tokens.padding_idx = None  # else the end token, which also pads here, would never learn as an input
    return model


def peer_loss(model, rows, pad=0):
    """transformers' own: padded rows, labels of -100 where a token does not count; the sum over tokens."""
    width = max(len(r.tokens) for r in rows)
    pick = lambda values, fill: torch.tensor([v + [fill] * (width - len(v)) for v in values])
    tokens, mask = pick([list(r.tokens) for r in rows], pad), pick([[1] * len(r.tokens) for r in rows], 0)
    labels = pick([[t if c else -100 for t, c in zip(r.tokens, r.counted, strict=True)] for r in rows], -100)
    logits = model(tokens, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def test_the_gradient_is_transformers_and_packing_changes_nothing(tiny_folder):
    """Rows of very different lengths, in one micro-batch, in several, and each alone: fp32, 1e-5 of the largest."""
    rows = [*EXAMPLES, Example("long", "tell " * 8, "on and on " * 4)]
    grads = {}
    for budget in (10_000, 120, 1):
        state = State(Policy.load(str(tiny_folder), "float32").adapt("full", 1, 1, 1.0, 0), SFTSettings(micro_batch_tokens=budget))
        encoded = Encoded(state.policy, rows, None)
        rollout = encoded.rollout(range(len(rows)))
        assert (len(rollout.micro_batches(budget)) == 1) == (budget == 10_000)
        for part in rollout.micro_batches(budget):
            sft_loss(state.policy, rollout.select(part), encoded.counted).backward()
        grads[budget] = {n: p.grad.clone() for n, p in state.policy.trainable().items()}
    model = peer(tiny_folder)
    loss = peer_loss(model, encoded.rows) / encoded.counted
    loss.backward()
    theirs = dict(model.named_parameters())
    for name, grad in grads[10_000].items():
        for other in (theirs[name].grad, grads[120][name], grads[1][name]):
            assert (grad - other).abs().max() <= 1e-5 * max(1.0, float(grad.abs().max())), name
    assert loss_of(state.policy, encoded, state.budget) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_row_sees_no_other(tiny):
    """What stands in the other rows of its micro-batch changes no number of it."""
    of = lambda *examples: sft_rows(tiny, Encoded(tiny, examples, None))
    alone, among = of(EXAMPLES[0]), of(EXAMPLES[0], *EXAMPLES[4:])
    width = alone.shape[1]
    torch.testing.assert_close(among[0, :width], alone[0], rtol=1e-5, atol=1e-6)


def sft_rows(policy, encoded):
    from accord.rollout.scoring import score_rows

    with torch.no_grad():
        return score_rows(policy.model, encoded.rollout(range(len(encoded))), 0, 1.0).logprobs


def test_three_steps_are_adamws(tiny_folder, tmp_path):
    """The same weights as transformers' model and torch's AdamW give with the same examples, rates and clipping."""
    start = Policy.load(str(tiny_folder), "float32")
    tuned = accord.train_sft(start, EXAMPLES, out=tmp_path / "r", validation=EXAMPLES[:2], **{**SMALL, "epochs": 1.2}, schedule="linear", weight_decay=0.1, max_grad_norm=0.5)  # fmt: skip
    assert tuned.steps == 3
    model = peer(tiny_folder)
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    encoded = Encoded(start, EXAMPLES, None)
    from accord.data.batching import in_turn

    for step, share in enumerate((0.5, 1.0, 0.1)):  # a step up, then from 1 to a tenth
        rows = [encoded.rows[i] for i in in_turn(10, step, 4, 0)]
        adam.zero_grad()
        (peer_loss(model, rows) / sum(sum(r.counted) for r in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.param_groups[0]["lr"] = 1e-3 * share
        adam.step()
    theirs = dict(model.named_parameters())
    for name, p in tuned.policy.trainable().items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-4, atol=2e-6)
    # What was saved opens in transformers, with these weights.
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "r/policy").named_parameters())
    assert all(torch.equal(saved[name], p) for name, p in tuned.policy.trainable().items())


def test_rates_by_hand():
    s = lambda **more: SFTSettings(warmup=0.2, **more)
    assert [round(rate_at(k, 10, s(schedule="linear")), 4) for k in (0, 1, 2, 9)] == [0.3333, 0.6667, 1.0, 0.1]
    assert rate_at(2 + 7 // 2, 10, s(schedule="cosine")) == pytest.approx(
        0.1 + 0.45 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 7)).item())
    )
    assert [rate_at(k, 10, s(schedule="linear", final_rate=0.0)) for k in (2, 9)] == [1.0, 0.0]
    assert rate_at(2 + 7 // 2, 10, s(schedule="cosine", final_rate=0.2)) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 3 / 7)))
    assert [rate_at(k, 10, s(schedule="constant")) for k in (2, 9)] == [1.0, 1.0] and rate_at(0, 1, s()) == 0.5
    assert SFTSettings().rate == 2e-5 and SFTSettings(adaptation="lora").rate == 2e-4 and SFTSettings(learning_rate=1.0).rate == 1.0


@pytest.mark.parametrize("adaptation", ["full", "split", "lora"])
def test_a_stop_changes_no_byte(tiny_folder, tmp_path, adaptation):
    def go(name, resume=False):
        tuned = accord.train_sft(
            Policy.load(str(tiny_folder), "float32"), EXAMPLES, out=tmp_path / name, validation=EXAMPLES[:3], resume=resume,
            **SMALL, adaptation=adaptation, top_layers=2, lora_rank=2,
        )  # fmt: skip
        return tuned, {n: p.detach().clone() for n, p in tuned.policy.trainable().items()}

    whole, weights = go("whole")
    assert whole.steps == 5 and whole.after["loss"] < whole.before["loss"]
    with stopped_at(3), pytest.raises(Interrupted, match="Training is saved"):
        go("cut")
    again, others = go("cut", resume=True)
    assert (again.before, again.after, again.steps) == (whole.before, whole.after, 5)
    assert all(torch.equal(weights[n], others[n]) for n in weights)
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert go("whole", resume=True)[0].after == whole.after  # it is done: nothing is trained again
    with pytest.raises(UserError, match="examples"):
        accord.train_sft(Policy.load(str(tiny_folder), "float32"), EXAMPLES[:-1], out=tmp_path / "cut", validation=EXAMPLES[:3], resume=True, **SMALL, adaptation=adaptation, top_layers=2, lora_rank=2)  # fmt: skip


ROWS = [
    {"messages": [*CHAT[:2]]},
    {"id": "b", "prompt": "q", "completion": "a"},
    {"question": "q", "answer": "a"},
    {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": "a"}]},
    {"id": "s", "prompt": "q", "completion": "", "finished": False},
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"},
    {"prompt": CHAT[:1], "completion": [*CHAT[1:3], {"role": "assistant", "content": "42"}]},
]


def test_forms_of_examples(tmp_path, capsys):
    write_lines(tmp_path / "e.jsonl", ROWS)
    assert read_examples(tmp_path / "e.jsonl") == [
        Example("row-00001", CHAT[:1], "Hello.\n"), Example("b", "q", "a"), Example("row-00003", "q", "a"), Example("row-00004", CHAT[:1], "a"),
        Example("row-00006", "Translate.\n\nBonjour", "Hello"), Example("row-00007", CHAT[:3], "42"),
    ]  # fmt: skip
    assert "1 completion in" in capsys.readouterr().out
    for row, message in (
        ({"messages": CHAT[:3]}, "does not end with the assistant"),
        ({"messages": []}, "does not end with the assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "is empty"),
        ({"prompt": "q"}, "needs 'messages'"),
        ({"prompt": "q", "completion": "a", "tools": [{}]}, "has 'tools'"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "a message has 'tool_calls'"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]}, "a message has 'weight'"),
        ({"prompt": "q", "completion": [{"role": "user", "content": "a"}]}, "does not end with the assistant"),
        ({"prompt": "q", "completion": " "}, "needs 'messages'"),
        ({"prompt": "q", "completon": "a"}, "Did you mean 'completion' by 'completon'"),
        ({"prompt": "q", "completion": "\ud800"}, "half of a surrogate"),
        ({"messages": ["x", "y"]}, "does not end with the assistant"),
    ):
        write_lines(tmp_path / "bad.jsonl", [row])
        with pytest.raises(UserError, match=rf"bad\.jsonl:1.*{message}"):
            read_examples(tmp_path / "bad.jsonl")


def test_a_tables_answers_are_texts(tmp_path):
    (tmp_path / "e.csv").write_text('question,answer\n2+2?,4\nIs it?,true\n"Say ""x""","""x"""\n')
    assert [e.answer for e in read_examples(tmp_path / "e.csv")] == ["4", "true", '"x"']


def test_what_is_held_out(tiny, tmp_path):
    """A tenth by id, 500 at most; none where that would be too long, or too little would be left."""
    from accord.supervised.settings import HELD_OUT
    from accord.tuning import imitation

    many = [Example(f"row-{i:05d}", "q", "abcdefgh"[i % 8]) for i in range(6000)]
    of = lambda some, **more: imitation(tiny, some, None, SFTSettings(**more))
    found = of(many)
    assert len(found.heldout) == HELD_OUT and len(found.train) == 5500
    assert not {row.id for row in found.heldout.rows} & {row.id for row in found.train.rows}
    assert of(many[:10]).heldout is None and len(of(many[:10]).train) == 10
    long = [Example(e.id, e.content, "x" * 60) if e.id in {r.id for r in found.heldout.rows} else e for e in many[:40]]
    assert of(long, max_tokens=20).heldout is None
    with pytest.raises(UserError, match="epochs"):
        accord.train_sft(tiny, many, out=tmp_path / "x", epochs=float("inf"))
    with pytest.raises(UserError, match="another dtype than bfloat16"):
        accord.train_sft(tiny, many, out=tmp_path / "x", dtype="bfloat16")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_lines(
        tmp_path / "e.jsonl",
        ({"id": e.id, "prompt": e.content, "completion": e.answer} for e in [*EXAMPLES, Example("long", "x" * 100, "y" * 60)]),
    )
    words = "sft --model model --examples e.jsonl --examples-per-step 4 --learning-rate 1e-3".split()
    assert (
        main([*words, "--out", "r"]) == 2
        and "1 of" in (told := capsys.readouterr().err)
        and "'long'" in told
        and "--max-tokens 128" in told
    )
    assert not (tmp_path / "r").exists()
    assert main([*words, "--max-tokens", "50", "--out", "r"]) == 0
    told = capsys.readouterr().out
    assert "longer than 50 tokens" in told and "Held-out loss" in told and "r/policy" in told
    assert "supervised fine-tuning" in (tmp_path / "r/report.html").read_text()
    assert main([*words, "--out", "r"]) == 2 and "accord resume r" in capsys.readouterr().err
    assert main(["resume", "r"]) == 0  # done already
    config = (tmp_path / "r/config.yaml").read_text()
    (tmp_path / "r/config.yaml").write_text(config.replace("learning_rate: 0.001", "learning_rate: 0.002"))
    assert main(["resume", "r"]) == 2 and "learning_rate" in capsys.readouterr().err
    (tmp_path / "r/config.yaml").write_text(config)
    assert main([*words[:-4], "--max-tokens", "50", "--config", "r/config.yaml", "--out", "again"]) == 0  # a run's settings serve another
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (tmp_path / "r/metrics.jsonl").read_bytes()
    assert main([*words[:-2], "--schedule", "cosinus", "--out", "x"]) == 2 and "schedule" in capsys.readouterr().err
    assert json.loads((tmp_path / "r/metrics.jsonl").read_text().split("\n")[0])["step"] == -1
