"""The code in docs/algorithms.md runs as it stands."""

import re
from pathlib import Path

import numpy as np

import accord
from accord.api import load_start, play_episodes
from accord.cli import main

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text(), re.S)


def test_the_example_of_an_algorithm(tiny, prompts, tmp_path, monkeypatch):
    from accord.rl.registry import ALGORITHMS

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "awr.py").write_text(BLOCKS[0])
    assert len(BLOCKS[0].splitlines()) <= 40
    import awr  # noqa: F401

    try:
        settings = dict(prompts_per_step=4, max_new_tokens=8, top_layers=2, max_steps=25, learning_rate=3e-3, dtype="float32", kl_coef=0.0)
        letters = lambda prompts, completions: [sum(c.isalpha() for c in text) for text in completions]
        outcome = accord.train_rl(tiny, prompts, letters, algorithm="awr", out="r", validation=[], completions_per_prompt=8, **settings)
    finally:
        del ALGORITHMS["awr"]
    scores = [accord.sample(p, prompts, per_prompt=8, max_new_tokens=8) for p in (tiny, outcome.policy)]
    before, after = (np.array(letters([], [c.text for c in s])) for s in scores)
    assert (after - before).mean() > 3 * (after - before).std() / len(before) ** 0.5


def test_the_example_of_an_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "guess.py").write_text(BLOCKS[1])
    words = "rl --environment guess:Guess --model scratch --kl-coef 0 --max-steps 1 --prompts-per-step 8 --out r"
    assert main(words.split()) == 0
    world = __import__("accord.rollout.environments", fromlist=["x"]).make_environment("guess:Guess")
    rollout = play_episodes(load_start("scratch", "float32", world), world, 50)
    assert set(rollout.step_rewards.sum(-1).tolist()) <= {-1.0, 0.0, 1.0}


def test_every_link_leads_somewhere():
    """Of the documents' links to each other, to pictures, code and benchmarks, and of their anchors."""
    root = Path(__file__).parent.parent
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("bench/*.md")]
    anchor = lambda title: re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
    lost = []
    for page in pages:
        text = re.sub(r"```.*?```|`[^`\n]*`|^    .*?$", "", page.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, part = link.partition("#")
            if re.match(r"https?:|mailto:", link):
                continue
            there = page.parent / path if path else page
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if there.suffix == ".md" and there.exists() else []
            if not there.exists() or (part and part not in map(anchor, titles)):
                lost.append(f"{page.relative_to(root)}: {link}")
    assert len(pages) > 10 and not lost, lost
