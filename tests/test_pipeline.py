"""A whole recipe, small: every stage, gates met and missed, resume, and the report in a browser."""

import json

import pytest
from conftest import save_model

from accord.cli import main
from accord.config import Recipe, build, load_yaml, recipe_text
from accord.data.sources import read_prompts

SMALL = """
prompts: {prompts}
sample: {{per_prompt: 2, max_new_tokens: 16, temperature: 0.8}}
reward: {{top_layers: 1, epochs: 1, learning_rate: 5.0e-4}}
rl: {{top_layers: 1, prompts_per_step: 8, completions_per_prompt: 1, max_new_tokens: 16, temperature: 0.8, epochs: 1, minibatches: 1, max_steps: 2, validate_every: 1}}
evaluation: {{per_prompt: 1, max_new_tokens: 16, temperature: 0.8}}
gates: {{min_pairs: 1, reward_accuracy: 0.0, win_rate: {win_rate}}}
"""


def test_every_shipped_recipe_is_valid():
    recipe = build(Recipe, load_yaml(recipe_text("demo"), "demo"), "demo")
    assert recipe.rl.algorithm == "ppo" and recipe.gates.max_kl == 25
    seeded = recipe.with_seed(3)
    assert (seeded.sample.seed, seeded.rl.seed, seeded.evaluation.seed) == (3, 3, recipe.evaluation.seed)


@pytest.mark.bundled
def test_a_missed_gate_names_its_stage_and_keeps_the_files(tmp_path, monkeypatch, capsys):  # the criterion's lexicon is the bundled one
    """A randomly initialised model only babbles: everything is F, so there are no pairs."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(80)))
    (tmp_path / "r.yaml").write_text("model: model\n" + SMALL.format(prompts="p.jsonl", win_rate=0.0))
    assert main(["run", "r.yaml", "--out", "out"]) == 3
    printed = capsys.readouterr()
    assert "Stage 'feedback' missed its gate: expected at least 1 pairs, got 0. Sample more" in " ".join(printed.err.split())
    assert (tmp_path / "out" / "rankings.jsonl").exists() and not (tmp_path / "out" / "reward").exists()
    assert main(["resume", "out"]) == 3  # the same gate again, without sampling again


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of the bundled model over every stage."""
    from importlib.resources import files

    folder = tmp_path_factory.mktemp("pipeline")
    prompts = read_prompts(str(files("accord.recipes") / "prompts.jsonl"))[::8]
    (folder / "p.jsonl").write_text("".join(json.dumps(p.to_json()) + "\n" for p in prompts))
    (folder / "r.yaml").write_text(SMALL.format(prompts=folder / "p.jsonl", win_rate=0.0))
    assert main(["run", str(folder / "r.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.mark.bundled
def test_all_stages(finished):
    stages = [json.loads(line) for line in (finished / "stages.jsonl").read_text().splitlines()]
    assert [s["stage"] for s in stages] == ["prompts", "completions", "feedback", "reward", "rl", "evaluation"]
    assert all(s["gate"]["passed"] for s in stages)
    facts = json.loads((finished / "evaluation.json").read_text())
    assert {"score", "gold", "toxicity", "entropy", "length", "finished", "distinct_2"} <= set(facts["before"])
    assert [pair[0]["id"] for pair in facts["samples"]] == sorted(pair[0]["id"] for pair in facts["samples"])
    trained = {json.loads(line)["id"] for line in (finished / "sampled.jsonl").read_text().splitlines()}
    evaluated = {json.loads(line)["id"] for line in (finished / "evaluated.jsonl").read_text().splitlines()}
    assert evaluated and not trained & evaluated
    # Gold is for measuring: nothing that training reads holds it.
    for name in ("sampled.jsonl", "rankings.jsonl", "completions.jsonl"):
        assert '"gold"' not in (finished / name).read_text()


@pytest.mark.bundled
def test_resume_of_a_finished_run_repeats_nothing(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    assert main(["resume", str(finished)]) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 6 and "All gates passed" in out
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}


@pytest.mark.bundled
def test_a_stage_that_is_lost_is_done_again_the_same(finished):
    """Without its last stage's line the run evaluates again, to the same numbers."""
    stages = finished / "stages.jsonl"
    before = (finished / "evaluation.json").read_text()
    stages.write_text("".join(stages.read_text().splitlines(keepends=True)[:-1]))
    assert main(["resume", str(finished)]) == 0
    assert (finished / "evaluation.json").read_text() == before


@pytest.mark.bundled
@pytest.mark.browser
def test_the_report_in_a_browser(finished, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        asked, problems = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(f"file://{finished / 'report.html'}")
        assert all(url.startswith("file://") for url in asked) and len(asked) == 1 and not problems
        titles = page.locator("figure h3").all_inner_texts()
        for curve in ("Reward", "Gold", "KL to the reference", "Entropy", "Value loss", "Clip fraction", "Explained variance"):
            assert any(t.startswith(curve) for t in titles), (curve, titles)
        facts = json.loads((finished / "evaluation.json").read_text())
        assert page.locator(".pair").count() == len(facts["samples"])
        assert f"{facts['win_rate']['value']:.3f}" in page.locator(".cards").first.inner_text()
        assert page.locator("table").count() >= 2
        for width in (1200, 390):  # nothing sticks out sideways, on a phone either
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
