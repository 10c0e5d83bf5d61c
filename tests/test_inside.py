"""The look inside a model: its numbers are the model's, on the page too; and two models compared."""

import base64
import json
import math

import numpy as np
import pytest
import torch
from conftest import save_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import accord
from accord.cli import main
from accord.errors import UserError
from accord.inside.comparison import compare
from accord.inside.page import WHOLE, as_json, as_page, contents, packed
from accord.inside.tables import habits
from accord.inside.trace import trace
from accord.rollout.policy import Policy

TEXT = "see the sea"


@pytest.fixture
def peer(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")


def test_numbers_are_transformers(tiny_folder, peer):
    """Attention of every head, the residual stream after every layer, and the logits."""
    policy = Policy.load(str(tiny_folder), "float32")
    found = trace(policy, TEXT)
    out = peer(torch.tensor([found.ids]), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, out.logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, policy.model(torch.tensor([found.ids]))[0], rtol=1e-4, atol=1e-4)
    assert len(found.layers) == len(out.attentions) == 4 and "".join(found.pieces) == TEXT
    for layer, attention in zip(found.layers, out.attentions, strict=True):
        torch.testing.assert_close(layer.attention, attention[0], rtol=1e-4, atol=1e-5)
    for layer, after in zip(found.layers[:-1], out.hidden_states[1:-1], strict=True):  # the last one is after the norm
        torch.testing.assert_close(layer.after, after[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.final, out.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
    assert found.layers[0].shapes["Q"] == [4, 11, 8] and found.layers[0].shapes["K"] == [2, 11, 8]


def test_models_that_transformers_computes(tmp_path):
    from conftest import byte_tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=256, bos_token_id=256)).save_pretrained(tmp_path)  # fmt: skip
    byte_tokenizer().save_pretrained(tmp_path)
    policy = Policy.load(str(tmp_path), "float32")
    found = trace(policy, TEXT)
    theirs = policy.model.inner(torch.tensor([found.ids])).logits[0]
    torch.testing.assert_close(found.logits, theirs, rtol=1e-4, atol=1e-4)
    seen = []
    handle = policy.model.inner.transformer.h[0].register_forward_hook(
        lambda *of: seen.append(of[2][0] if isinstance(of[2], tuple) else of[2])
    )
    policy.model.inner(torch.tensor([found.ids]))
    handle.remove()
    torch.testing.assert_close(found.layers[0].after, seen[0].reshape(11, -1), rtol=1e-4, atol=1e-4)
    assert found.layers[1].after is None  # what transformers tells of the last layer is after the final norm
    assert found.layers[0].attention.shape == (4, 11, 11) and found.layers[0].attention.sum(-1).allclose(torch.ones(4, 11))
    assert "by transformers" in as_page(found)


def test_packed_rows_add_up_exactly():
    attention = torch.softmax(4 * torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0)) + torch.full((9, 9), -1e30).triu(1), -1)
    shares = np.frombuffer(base64.b64decode(packed(attention)), dtype="<u2").reshape(3, -1).astype(int)
    at = 0
    for i in range(9):
        row = shares[:, at : at + i + 1]
        assert (row.sum(1) == WHOLE).all() and np.abs(row / WHOLE - attention[:, i, : i + 1].numpy()).max() < 1 / WHOLE
        at += i + 1


def test_habits_by_hand():
    attention = torch.zeros(2, 3, 3)
    attention[0] = torch.tensor([[1, 0, 0], [1, 0, 0], [0.5, 0.25, 0.25]])
    attention[1] = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]])
    first, second = habits(attention)
    assert (first["on_first"], first["on_previous"], first["on_itself"]) == (0.75, 0.625, 0.125) and first[
        "words"
    ] == "the first token (75%)"
    assert first["distance"] == pytest.approx((1 + (2 * 0.5 + 0.25)) / 2)
    assert first["entropy"] == pytest.approx((0 + 0.5 * math.log(2) + 0.5 * math.log(4)) / 2)
    assert second["on_previous"] == 0.75 and second["words"].startswith("the token before")
    assert habits(torch.ones(1, 1, 1))[0]["on_itself"] == 1.0  # a single token has no choice


def test_json_and_temperatures(tiny_folder, peer):
    found = json.loads(as_json(trace(Policy.load(str(tiny_folder), "float32"), TEXT)))
    logits = peer(torch.tensor([[t["id"] for t in found["tokens"]]])).logits[0].detach()
    for k, temperature in enumerate(found["output"]["temperatures"]):
        p = (logits / temperature).softmax(-1)
        for place, told in enumerate(found["output"]["next"]):
            assert told["entropy"][k] == pytest.approx(float(torch.distributions.Categorical(p[place]).entropy()), abs=1e-3)
            for token, _, logit in told["top"][:3]:
                assert math.exp(logit / temperature - told["normaliser"][k]) == pytest.approx(float(p[place, token]), abs=1e-4)
    assert np.allclose(np.array(found["layers"][1]["attention"]).sum(-1), 1, atol=1e-5)
    table = peer.get_input_embeddings().weight.detach()
    near = found["embedding"]["nearest"][0][0]
    cosines = torch.nn.functional.cosine_similarity(table[found["tokens"][0]["id"]], table)
    cosines[found["tokens"][0]["id"]] = -2
    assert near[0] == int(cosines.argmax()) and near[2] == pytest.approx(float(cosines.max()), abs=1e-5)


def test_no_text_ends_the_page(tiny_folder):
    page = as_page(trace(Policy.load(str(tiny_folder), "float32"), "</script><b>&"))
    assert page.count("</script>") == 2 and "\\u003c/script>" not in page.split('id="data">')[0]
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_mistakes(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(tiny_folder)
    assert main(["look-inside", model, ""]) == 2 and "no tokens" in capsys.readouterr().err
    assert main(["look-inside", model, "x" * 300]) == 2 and "300 tokens" in capsys.readouterr().err
    (tmp_path / "mine.html").write_text("my own page")
    assert main(["look-inside", model, "x", "--out", "mine.html"]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["look-inside", model, "ab", "--json", "numbers.json"]) == 0 and "inside.html" in capsys.readouterr().out
    assert main(["look-inside", model, "cd"]) == 0 and json.loads((tmp_path / "numbers.json").read_text())["text"] == "ab"
    with pytest.raises(UserError, match="chat template"):
        save_model(tmp_path / "plain", chat=False)
        trace(Policy.load(str(tmp_path / "plain"), "float32"), "x", chat=True)


@pytest.mark.browser
def test_the_page_in_a_browser(tiny_folder, tmp_path):
    pytest.importorskip("playwright")
    _look(trace(Policy.load(str(tiny_folder), "float32"), TEXT), tmp_path)


@pytest.mark.browser
@pytest.mark.bundled
def test_the_bundled_model_in_a_browser(tmp_path):
    """64 tokens of a real model: under 5 MB."""
    pytest.importorskip("playwright")
    policy = accord.load(dtype="float32")
    text = (
        "The road the field teaches has three steps: pretraining on much text, supervised tuning on examples, and reinforcement from feedback. "
        * 3
    )
    ids = policy.tokenizer.encode_texts([text])[0][:64]
    found = trace(policy, policy.tokenizer.inner.decode(ids))
    assert 60 <= len(found.ids) <= 64
    torch.testing.assert_close(found.logits, policy.model(torch.tensor([found.ids]))[0], rtol=1e-3, atol=2e-3)
    _look(found, tmp_path)


def _look(found, tmp_path):
    """The page's own numbers are the model's, whatever is clicked."""
    from playwright.sync_api import sync_playwright

    (tmp_path / "inside.html").write_text(as_page(found))
    assert (tmp_path / "inside.html").stat().st_size < 5e6
    want, wrong = contents(found), []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(f"file://{tmp_path}/inside.html")
        T, last = len(found.ids), found.logits[-1].softmax(-1)
        shown = page.evaluate("inside.probabilities(inside.data.tokens.length - 1, inside.data.output.temperatures.indexOf(1))")
        assert [row["id"] for row in shown] == last.topk(len(shown)).indices.tolist()
        assert [row["p"] for row in shown] == pytest.approx(last.topk(len(shown)).values.tolist(), rel=1e-4, abs=1e-5)
        cells = page.locator("#next tr:nth-child(2) td").all_inner_texts()
        assert float(cells[3].rstrip("%")) == pytest.approx(100 * float(last.max()), abs=0.06)
        for layer in (0, len(found.layers) - 1):
            rows = page.evaluate(f"inside.attention({layer}, 1).map((row) => [...row])")
            np.testing.assert_allclose(rows, found.layers[layer].attention[1].numpy(), atol=2e-5)
            assert np.allclose(np.sum(rows, 1), 1, atol=1e-12)
        page.locator("#temperature").evaluate("(s) => { s.value = 4; s.dispatchEvent(new Event('input')); }")  # T = 0.5
        cool = (found.logits[-1] / 0.5).softmax(-1)
        assert page.locator("#degree").inner_text() == "0.5"
        assert float(page.locator("#next tr:nth-child(2) td").all_inner_texts()[3].rstrip("%")) == pytest.approx(
            100 * float(cool.max()), abs=0.06
        )
        assert float(page.locator("#entropy").inner_text()) == pytest.approx(
            float(torch.distributions.Categorical(cool).entropy()), abs=2e-3
        )
        page.locator("#tokens button").nth(2).click()
        assert f"token 3 of {T}" in page.locator("#chosen").inner_text() and page.locator("#tokens button[aria-pressed=true]").count() == 1
        page.locator("#tokens button").nth(2).press("ArrowRight")
        assert f"token 4 of {T}" in page.locator("#chosen").inner_text()
        page.locator("#layer").evaluate("(s) => { s.value = 2; s.dispatchEvent(new Event('input')); }")
        page.locator("#heads button").nth(1).click()
        box = page.locator("#map").bounding_box()
        page.mouse.move(box["x"] + 1.5 * box["width"] / T, box["y"] + 3.5 * box["height"] / T)  # the fourth token looks at the second
        value = float(found.layers[1].attention[1, 3, 1])
        said = page.locator("#reading").inner_text()
        assert "(4) looks at" in said and f"(2): {value:.4f}"[:-1] in said and "adds up to 1.0000" in said
        assert page.locator("#stream tr").count() == len(found.layers) + 1 and len(want["lens"]) == len(found.layers)
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        faults = [v for v in axe.Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert not faults, [(f["id"], [n["html"][:120] for n in f["nodes"][:3]]) for f in faults]
        browser.close()
    assert not wrong


# ---- two models


TEXTS = ["the first document of three", "a second one, and longer than the first", "x"]


def moved(folder, by):
    policy = Policy.load(str(folder), "float32")
    generator = torch.Generator().manual_seed(5)
    for p in policy.model.parameters():
        p.data.add_(by * torch.randn(p.shape, generator=generator))
    return policy


def test_two_models_against_plain_sums(tiny_folder):
    """Perplexity, agreement and KL of all places, from the logits of each window alone; windows share a token."""
    a, b = (moved(tiny_folder, by) for by in (0.0, 0.01))
    found = compare(a, b, TEXTS, window=16, samples=2, max_new_tokens=5)
    nats, same, kl, back, count, by_place = [0.0, 0.0], 0, 0.0, 0.0, 0, {}
    for ids in a.tokenizer.encode_texts(TEXTS):
        for start in range(0, len(ids) - 1, 15):
            piece = torch.tensor([ids[start : start + 16]])
            p, q = (policy.model(piece).log_softmax(-1)[0, :-1] for policy in (a, b))
            for side, logp in enumerate((p, q)):
                nats[side] -= float(logp.gather(1, piece[0, 1:, None]).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergence = (p.exp() * (p - q)).sum(-1)
            kl, back, count = kl + float(divergence.sum()), back + float((q.exp() * (q - p)).sum()), count + len(p)
            for place, value in enumerate(divergence.tolist(), 1):
                by_place.setdefault(place, []).append(value)
    assert found.a.tokens == found.b.tokens == count
    assert found.a.perplexity.value == pytest.approx(math.exp(nats[0] / count), rel=1e-4)
    assert found.b.perplexity.value == pytest.approx(math.exp(nats[1] / count), rel=1e-4)
    assert found.agreement.value == pytest.approx(same / count) and 0.05 < same / count < 0.999
    assert found.kl.value == pytest.approx(kl / count, rel=1e-3) and found.kl_back.value == pytest.approx(back / count, rel=1e-3)
    assert [place for place, _, _ in found.kl_by_position] == sorted(by_place) and [n for _, _, n in found.kl_by_position] == [
        len(by_place[k]) for k in sorted(by_place)
    ]
    assert [mean for _, mean, _ in found.kl_by_position] == pytest.approx(
        [np.mean(by_place[k]) for k in sorted(by_place)], rel=1e-3, abs=1e-6
    )
    assert count == sum(len(text) - 1 for text in TEXTS)  # a byte a token here, and all but a document's first are told
    assert found.a.bits_per_byte.value == pytest.approx(nats[0] / math.log(2) / count, rel=1e-4)
    assert len(found.samples) == 2 and found.samples[0][0] == TEXTS[0][:24]
    itself = compare(a, a, TEXTS, window=16)
    assert itself.agreement.value == 1 and itself.kl.value == pytest.approx(0, abs=1e-6) and all(x == y for _, x, y in itself.samples)


def test_parts_of_characters_and_other_templates(tiny_folder, tmp_path):
    a = Policy.load(str(tiny_folder), "float32")
    text = "é" * 21
    found = compare(a, a, [text], window=5)
    assert found.a.tokens == 41 and found.a.bits_per_byte.value == pytest.approx(math.log(found.a.perplexity.value) / math.log(2))
    save_model(tmp_path / "plain", chat=False)
    other = compare(a, Policy.load(str(tmp_path / "plain"), "float32"), ["see the sea"])
    assert other.agreement is not None and other.kl.value == pytest.approx(0, abs=1e-6)  # the template is in no text


def test_the_compare_command(tiny_folder, tmp_path, capsys, monkeypatch):
    from conftest import word_tokenizer

    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "words", tokenizer=word_tokenizer())
    (tmp_path / "a.txt").write_text("something about you and me. " * 20)
    assert main(["compare", str(tiny_folder), str(tiny_folder), "--text", "a.txt", "--json", "c.json"]) == 0
    told = capsys.readouterr().out
    assert "perplexity" in told and "next token: 1 [1, 1]" in told and "How far apart" in (tmp_path / "compared.html").read_text()
    assert json.loads((tmp_path / "c.json").read_text())["agreement"]["value"] == 1
    assert main(["compare", str(tiny_folder), "words", "--text", "a.txt"]) == 0
    assert "different tokens" in (tmp_path / "compared.html").read_text()
    assert main(["compare", str(tiny_folder), "words", "--text", "a.txt", "--window", "1"]) == 2 and "--window" in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("x")
    assert main(["compare", str(tiny_folder), str(tiny_folder), "--text", "one.txt"]) == 2 and "two tokens" in capsys.readouterr().err
