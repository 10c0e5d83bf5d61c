"""``accord run --labelers web``: the run waits for people, is stopped while it waits, and goes on."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx
from conftest import save_model

RECIPE = """
model: model
prompts: p.jsonl
sample: {per_prompt: 3, max_new_tokens: 12, temperature: 1.0}
feedback: {labelers: web, port: 0, enough: 0.8}
reward: {top_layers: 1, epochs: 1, learning_rate: 5.0e-4}
rl: {top_layers: 1, prompts_per_step: 8, completions_per_prompt: 1, max_new_tokens: 12, epochs: 1, minibatches: 1, max_steps: 1, validate_every: 1}
evaluation: {per_prompt: 1, max_new_tokens: 12, temperature: 1.0}
gates: {min_pairs: 1, reward_accuracy: 0.0, win_rate: 0.0, max_kl: 1000}
"""


def wait_for_page(command, folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "accord", *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Rank at"):
            return process, line.split()[2]
    raise AssertionError("".join(printed))


class Person:
    def __init__(self, at):
        self.client = httpx.Client(base_url=at, headers={"Origin": at}, follow_redirects=True)
        self.client.headers["X-CSRF-Token"] = re.search('name="csrf" content="([^"]+)"', self.client.get("/").text)[1]

    def label(self, count=None):
        """Rank by length, the shortest first; until there is nothing, or the server has enough."""
        said = {}
        while count is None or len(said) < count:
            try:
                item = self.client.post("/api/next").json()["item"]
                if item is None:
                    break
                lengths = [len(c["text"]) for c in item["completions"]]
                ranks = [1 + sorted(lengths).index(n) for n in lengths]
                self.client.post(
                    f"/api/items/{item['id']}/label", json={"request": f"request-{item['id']}", "ranks": ranks}
                ).raise_for_status()
                said[item["prompt"][0]["text"]] = ranks
            except httpx.TransportError:
                break
        return said


@pytest.mark.bundled
def test_a_run_waits_for_people_and_goes_on(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"say {i}"}) + "\n" for i in range(60)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    process, at = wait_for_page(["run", "r.yaml", "--out", "out"], tmp_path)
    said = Person(at).label(10)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "accord resume out" in rest and "Traceback" not in rest
    process, at = wait_for_page(["resume", "out"], tmp_path)
    said |= Person(at).label()
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "All gates passed" in rest, rest
    rankings = [json.loads(line) for line in (tmp_path / "out/rankings.jsonl").read_text().splitlines()]
    sampled = {}
    for line in (tmp_path / "out/sampled.jsonl").read_text().splitlines():
        row = json.loads(line)
        sampled.setdefault(row["id"], []).append(row["completion"])
    assert 0.8 * len(sampled) <= len(rankings) <= len(said) and len({r["prompt_id"] for r in rankings}) == len(rankings)
    for row in rankings:
        lengths = [len(text) for text in sampled[row["prompt_id"]]]
        assert row["ranks"] == [1 + sorted(lengths).index(n) for n in lengths] and not row["simulated"] and row["criterion"]


def test_what_is_refused_leaves_no_store_and_a_forgotten_password_needs_no_server(tmp_path, capsys, monkeypatch):
    from accord.cli import main
    from accord.feedback.store import Store

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"promt": "q", "completion": "c"}\n')
    rows = [{"id": "p", "prompt": "q", "completion": c, "index": k} for k, c in enumerate("ab")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "typo.jsonl").write_text('{"prompt_id": "p", "labeler": "l", "ranks": [1, 2], "rating": [1, 2]}\n')
    for words, told in (
        ("label --completions nope.jsonl", "nope.jsonl does not exist"),
        ("label --completions bad.jsonl", "bad.jsonl:1 has no field 'prompt'. Did you mean 'prompt' by 'promt'"),
        ("label --completions c.jsonl --rankings typo.jsonl", "typo.jsonl:1: Did you mean 'ratings' by 'rating'"),
        ("label --accounts --new-password bob", "There is no label store x.db"),
        ("restore c.jsonl", "c.jsonl is no backup"),
    ):
        assert main([*words.split(), "--store", "x.db"]) == 2 and told in capsys.readouterr().err and not Path("x.db").exists(), words
    store = Store.open("x.db")
    store.people.add("bob", "owner", "four small words here")
    assert main("label --store x.db --accounts --new-password bo".split()) == 2
    assert "There is no 'bo' here. Did you mean 'bob'?" in capsys.readouterr().err
    options = "--port 9 --https --name labels.example.org".split()
    assert main(["label", "--store", "x.db", "--accounts", "--new-password", "bob", *options]) == 0  # and it has ended
    link = re.search(r"bob chooses a new password: https://labels\.example\.org/invite/(\S+)", capsys.readouterr().out)[1]
    assert store.people.accept(link, "", "another four small words").name == "bob"
    store.close()
