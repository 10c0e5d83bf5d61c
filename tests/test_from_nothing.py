"""The recipe from-nothing, far too small to write a story: what its stages make, stopped and gone on with; and with one's own text."""

import json

import pytest
import yaml
from conftest import stopped_at

from accord.beginning import rate, story_prompts
from accord.cli import main
from accord.config import Recipe, build, load_yaml, recipe_text
from accord.data.records import split_of
from accord.disk import write_lines
from accord.stories.stories import read_story, read_wish

SMALL = """
base:
  documents: 300
  vocabulary: 700
  pretrain: {size: 0.5m, context: 224, tokens_per_step: 2048, samples: 1, sample_tokens: 8, dtype: float32, checkpoint_every: 3}
  asked: 100
  sft: {examples_per_step: 25, dtype: float32, checkpoint_every: 1}
prompts: stories
sample: {per_prompt: 2, max_new_tokens: 16}
feedback: {panel: stories}
evaluation: {criterion: stories}
reward: {top_layers: 3}
gates: {entropy_ratio: 100, parses: 0, follows: 0}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))


def stages(folder):
    return {row["stage"]: row for name in ("stages", "gates") if (folder / f"{name}.jsonl").exists() for row in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())}  # fmt: skip


def test_the_shipped_recipe():
    recipe = build(Recipe, load_yaml(recipe_text("from-nothing"), "x"), "x")
    assert recipe.base.pretrain.size == "5m" and recipe.evaluation.criterion == recipe.feedback.panel == "stories"
    again = recipe.with_seed(3)
    assert again.base.pretrain.seed == again.base.sft.seed == again.rl.seed == 3 and again.base.pretrain.size == "5m"
    prompts = story_prompts()
    assert len({p.id for p in prompts}) == len(prompts) == 576 and all(read_wish(p.content).id == p.id for p in prompts)
    assert 0.1 < rate() < 0.25


def test_stopped_in_pretraining_and_in_tuning_it_ends_the_same(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    assert main("run small.yaml --out whole".split()) == 3  # what it writes is no story, so there are no pairs
    told = capsys.readouterr()
    assert "Stage 'feedback' missed its gate" in told.err
    found = stages(tmp_path / "whole")
    assert list(found) == ["prompts", "corpus", "tokenizer", "pretrain", "sft", "completions", "feedback"]
    assert found["corpus"]["gate"]["got"] == "1000 of 1000" and found["pretrain"]["facts"]["ratio"] == pytest.approx(
        found["pretrain"]["facts"]["bits_per_byte"] / rate()
    )
    corpus = [json.loads(line)["text"] for line in (tmp_path / "whole/corpus.jsonl").read_text().splitlines()]
    assert len(corpus) == 300 and all(read_story(text) for text in corpus)
    rows = [json.loads(line) for line in (tmp_path / "whole/examples.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and not any(split_of(read_wish(row["prompt"]).id) == "heldout" for row in rows)
    assert all(read_wish(row["prompt"]).fulfilled(read_story(row["completion"])) for row in rows)
    with stopped_at(4, 16):
        assert main("run small.yaml --out cut".split()) == 130
        assert "accord resume cut" in capsys.readouterr().out
        (tmp_path / "cut").rename(tmp_path / "moved")  # where it is is nothing of it
        assert main(["resume", str(tmp_path / "moved")]) == 130
        assert stages(tmp_path / "moved").keys() == {"prompts", "corpus", "tokenizer", "pretrain"}
        (tmp_path / "moved").rename(tmp_path / "cut")
        assert main("resume cut".split()) == 3
    for name in ("pretrain/policy/model.safetensors", "sft/policy/model.safetensors", "sft/metrics.jsonl", "corpus.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert (tmp_path / "whole/sampled.jsonl").read_bytes() == (tmp_path / "cut/sampled.jsonl").read_bytes()
    capsys.readouterr()
    assert main("plan small.yaml".split()) == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in ("pretrain: ", "sft: ", "completions: ", "reward model: ", "evaluation: "))


def test_texts_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 60)
    write_lines(tmp_path / "chats.jsonl", [{"prompt": f"Say gold {i % 7}", "completion": "gold is not lost"} for i in range(40)])
    write_lines(tmp_path / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"not gold {i}"} for i in range(60)])
    recipe = yaml.safe_load(SMALL)
    recipe["base"] |= {"text": ["mine.txt"], "examples": "chats.jsonl", "vocabulary": 280}
    recipe |= {"prompts": "prompts.jsonl", "feedback": {}, "evaluation": {}}
    recipe["base"]["pretrain"]["context"] = 64
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    assert main("run mine.yaml --out r".split()) == 3
    found = stages(tmp_path / "r")
    assert found["sft"]["gate"]["passed"] and found["pretrain"]["gate"]["expects"] == "what is held out is told better than before"
    assert found["corpus"]["facts"]["documents"] == 1
    capsys.readouterr()
    for change, message in (
        ({"prompts": "none.jsonl"}, "none.jsonl does not exist"),
        ({"base": {**recipe["base"], "examples": "none.jsonl"}}, "none.jsonl does not exist"),
        ({"base": {**recipe["base"], "text": ["none.txt"]}}, "none.txt does not exist"),
        ({"base": {**recipe["base"], "pretrain": {"size": "7m"}}}, "Unknown size '7m'"),
        ({"evaluation": {"criterion": "storys"}}, "criterion"),
        ({"feedback": {"panel": "hhhh"}}, "panel"),
    ):  # told at once, and no folder is left
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**recipe, **change}))
        assert main("run bad.yaml --out x".split()) == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    del recipe["base"]["examples"]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe))
    assert main("run bad.yaml --out x".split()) == 2 and "text and examples go together" in capsys.readouterr().err
