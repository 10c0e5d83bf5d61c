"""The transformer against transformers, on the same weights."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, peer_model, save_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from accord.data.records import Prompt
from accord.errors import UserError
from accord.nn.loading import load_model
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.text.tokenizer import Tokenizer

KINDS = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(theirs, ours, folder) of one architecture, fp32."""
    kind = request.param.split("-")[0].replace("llama3", "llama")
    folder = save_model(tmp_path_factory.mktemp(request.param), kind, **KINDS[request.param])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return theirs, load_model(str(folder), torch.float32).model, folder


def batch(pad_left):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 250, (3, 20), generator=generator)
    mask = torch.ones(3, 20, dtype=torch.bool)
    for row, pad in enumerate((0, 7, 12)):
        if pad:
            mask[row, :pad] = False if pad_left else mask[row, :pad]
            mask[row, -pad:] = mask[row, -pad:] if pad_left else False
    return tokens, mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_logits_equal_transformers(pair, padding):
    theirs, ours, _ = pair
    tokens, mask = batch(padding == "left")
    if padding == "none":
        mask[:] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), position_ids=positions).logits
    got = ours(tokens, mask)
    assert expected[mask].std() > 0.1  # not an accidental agreement of constants
    assert (got - expected)[mask].abs().max() < 1e-4


@torch.no_grad()
def test_greedy_generation_equals_transformers(pair):
    """Token for token, prompts of different lengths side by side in our cache."""
    theirs, _, folder = pair
    policy = Policy.load(str(folder), "float32")
    prompts = [Prompt(f"p{i}", text) for i, text in enumerate(["hello there", "a", "what is the time now?"])]
    got = Engine(policy, rows=2).sample(prompts, 1, Sampling(temperature=0, max_new_tokens=12)).completions()
    for prompt, completion in zip(prompts, got, strict=True):
        ids = torch.tensor([policy.tokenizer.encode_prompt(prompt.content)])
        full = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tuple(full[0, ids.shape[1] :].tolist()) == completion.tokens


def test_saved_model_opens_in_transformers(tmp_path, pair):
    theirs, _, folder = pair
    policy = Policy.load(str(folder), "float32")
    policy.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens, _ = batch(False)
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.bundled
@torch.no_grad()
def test_bundled_model_equals_transformers():
    folder = load_model("smollm2-135m-instruct", torch.float32).folder
    ours = load_model(str(folder), torch.float32).model
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "The sea was calm, and nobody on the boat said a word until the lamp went out."
    tokens = torch.tensor([Tokenizer.load(folder).encode_prompt(text)])
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_sliding_window_is_not_ignored(tmp_path):
    """The agreement above would be empty if the window never mattered."""
    wide = peer_model("mistral", sliding_window=None).model
    narrow = peer_model("mistral", sliding_window=5).model
    tokens, _ = batch(False)
    assert (wide(tokens)[0] - narrow(tokens)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nonsense"), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({**json.loads((f / "config.json").read_text()), "hidden_size": 64})),
            "has shape",
        ),
        (
            lambda f: (f / "config.json").write_text(json.dumps({**json.loads((f / "config.json").read_text()), "num_hidden_layers": 5})),
            "lacks",
        ),
    ],
)
def test_a_broken_folder_is_named(tmp_path, damage, message):
    save_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Policy.load(str(tmp_path), "float32")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("no/such/folder/here", "does not exist"), ("smollm2-135m-instuct", "Did you mean 'smollm2-135m-instruct'")]
)
def test_an_unknown_model(name, message):
    with pytest.raises(UserError, match=message):
        Policy.load(name)


def test_every_end_token_survives_saving(tmp_path):
    """Chat models often name a second one in generation_config.json only."""
    folder = save_model(tmp_path / "a")
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 10]}')
    policy = Policy.load(str(folder), "float32")
    policy.save(tmp_path / "b")
    assert policy.tokenizer.eos_ids == Policy.load(str(tmp_path / "b"), "float32").tokenizer.eos_ids == (256, 10)


def test_no_chat_template(tmp_path):
    policy = Policy.load(str(save_model(tmp_path, chat=False)), "float32")
    assert policy.tokenizer.encode_prompt("abc") == list(byte_tokenizer()("abc")["input_ids"])
    with pytest.raises(UserError, match="no chat template"):
        policy.tokenizer.encode_prompt([{"role": "user", "content": "x"}])


def test_a_tokenizer_class_that_is_none_is_a_sentence(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaForCausalLM"}))
    with pytest.raises(UserError, match="LlamaForCausalLM, which is no tokenizer"):
        Tokenizer.load(tmp_path / "m")
