"""What is exported is read again: by accord to the same groups, by datasets and by TRL's own checks."""

import json

import pytest

from accord.cli import main
from accord.data.pairs import group_pairs
from accord.data.records import Completion, Prompt, Ranking
from accord.data.sources import read_pairs
from accord.disk import write_lines
from accord.errors import UserError
from accord.feedback.export import export


def home(chat=False, prompts=40):
    """(completions, rankings): four completions a prompt; ann and bob differ, and there are ties and fails."""
    content = (
        (lambda i: [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"say {i}"}]) if chat else (lambda i: f"say {i}")
    )
    completions = {}
    for i in range(prompts):
        prompt = Prompt(f"p{i}", content(i), "numbers")
        completions[f"p{i}"] = [
            Completion(prompt, f"{word} {i}", word != "cut", k) for k, word in enumerate(("one", "two", "cut", "é\u2028x"))
        ]
    rankings = [Ranking(f"p{i}", "ann", (1, 2, 2, None), "v1") for i in range(prompts)]
    rankings += [Ranking(f"p{i}", "bob", (2, 1, 4, None), "v2", simulated=True) for i in range(0, prompts, 2)]
    return completions, rankings


@pytest.mark.parametrize("chat", [False, True])
def test_groups_are_read_again_as_they_were(tmp_path, chat):
    completions, rankings = home(chat)
    weights = {"bob": 0.25}
    assert export(completions, rankings, "groups", tmp_path / "g.jsonl", 0.5, weights) == 40
    assert read_pairs(tmp_path / "g.jsonl") == group_pairs(completions, rankings, 0.5, weights)
    row = json.loads((tmp_path / "g.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert row["rankings"] == {"v1": 1, "v2": 1} and [c["fails"] for c in row["completions"]] == [0, 0, 0, 2]


def test_pairs_are_trls_and_ours(tmp_path):
    from trl.data_utils import is_conversational

    for chat in (False, True):
        completions, rankings = home(chat)
        path = tmp_path / f"{chat}.jsonl"
        count = export(completions, rankings, "pairs", path)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        assert count == len(rows) == 20 * 7 + 20 * 5  # ann has five pairs; bob adds (1, 0) and (1, 2)
        assert all(is_conversational(row) == chat for row in rows)
        again = {
            g.prompt.id: {(g.completions[p.preferred].text, g.completions[p.other].text): p[2:] for p in g.pairs} for g in read_pairs(path)
        }
        ours = group_pairs(completions, rankings)
        assert again == {
            g.prompt.id: {(g.completions[p.preferred].text, g.completions[p.other].text): p[2:] for p in g.pairs} for g in ours
        }
        assert {row["split"] for row in rows} == {"train", "validation", "test"}
        assert len({(row["id"], row["split"]) for row in rows}) == 40  # a prompt is in one split


def test_unpaired_rows_by_hand(tmp_path):
    """p1, ann alone, ranks 1 2 2 F: Borda 3/3, (1-1)/3, (1-1)/3, -3/3. Those in the middle are neither good nor bad."""
    completions, rankings = home()
    export(completions, rankings, "unpaired", tmp_path / "u.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text(encoding="utf-8").split("\n") if line]
    of = lambda name: [(r["completion"], r["label"], r["weight"]) for r in rows if r["id"] == name]
    assert of("p1") == [("one 1", True, 1.0), ("é\u2028x 1", False, 1.0)]
    # p0, bob too: 2 1 4 F -> 1/3, 1, -1/3, -1; means 2/3, 1/2, -1/6, -1.
    assert of("p0") == [
        ("one 0", True, pytest.approx(2 / 3)),
        ("two 0", True, 0.5),
        ("cut 0", False, pytest.approx(1 / 6)),
        ("é\u2028x 0", False, 1.0),
    ]


def test_who_counts_for_nothing_does_not_decide_what_is_good(tmp_path):
    completions, _ = home(prompts=1)
    rankings = [Ranking("p0", "ann", (1, 2, 3, 4)), Ranking("p0", "bob", (4, 3, 2, 1)), Ranking("p0", "cy", (4, 3, 2, 1))]
    export(completions, rankings, "unpaired", tmp_path / "u.jsonl", labeler_weights={"bob": 0.0, "cy": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [(r["label"], r["weight"]) for r in rows] == [
        (True, pytest.approx(1 / 3)), (True, pytest.approx(1 / 9)), (False, pytest.approx(1 / 9)), (False, pytest.approx(1 / 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
def test_a_dataset_loads(tmp_path, monkeypatch, chat):
    from datasets import get_dataset_config_names, load_dataset

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    completions, rankings = home(chat)
    count = export(completions, rankings, "dataset", tmp_path / "d")
    folder = str(tmp_path / "d")
    assert get_dataset_config_names(folder) == ["pairs", "unpaired", "rankings", "completions"]
    load = lambda *name: load_dataset(folder, *name, cache_dir=str(tmp_path / "cache"))
    pairs = load()
    assert sum(len(part) for part in pairs.values()) == count and set(pairs) == {"train", "validation", "test"}
    assert set(pairs["train"].column_names) == {"id", "theme", "prompt", "chosen", "rejected", "weight", "distance"}
    assert isinstance(pairs["train"][0]["prompt"], list) == chat
    raw = load("rankings")["train"]
    again = [
        Ranking(r["prompt_id"], r["labeler"], tuple(None if x == "F" else int(x) for x in r["ranks"]), r["criterion"], r["simulated"])
        for r in raw
    ]
    assert again == rankings and len(load("completions")["train"]) == 160 and len(load("unpaired")["train"]) > 0
    card = (tmp_path / "d" / "README.md").read_text()
    assert "60 rankings of 40 prompts by 2 labelers, 20 of them simulated, given by criterion v1 (40), v2 (20)" in card and "alpha" in card


def test_mistakes(tmp_path):
    completions, rankings = home()
    with pytest.raises(UserError, match=r"does not end in .jsonl"):
        export(completions, rankings, "pairs", tmp_path / "x")
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(UserError, match="already exists"):
        export(completions, rankings, "pairs", tmp_path / "there.jsonl")
    with pytest.raises(UserError, match="nothing to write"):
        export(completions, [Ranking("p0", "ann", (None,) * 4)], "pairs", tmp_path / "x.jsonl")
    for kind in ("pairs", "unpaired"):
        with pytest.raises(UserError, match="ties only"):
            export(completions, [Ranking("p0", "ann", (1,) * 4)], kind, tmp_path / "x.jsonl")
    chats, _ = home(chat=True)
    with pytest.raises(UserError, match="Some prompts are chats"):
        export({**completions, "p1": chats["p1"]}, rankings, "dataset", tmp_path / "d")
    assert not (tmp_path / "d").exists()


GROUP = {"id": "p", "prompt": "q", "completions": [{"text": "a"}, {"text": "b"}], "pairs": [{"preferred": 0, "other": 1}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "field 'prompt' is empty"),
        ({"completions": [{"text": "a"}, {}]}, "completion 1 has no field 'text'"),
        ({"completions": "ab"}, "field 'completions' must be a list"),
        ({"pairs": [{"preferred": 0, "other": 2}]}, "two different completions from 0 to 1"),
        ({"pairs": [{"preferred": 1, "other": 1}]}, "two different completions"),
        ({"pairs": [[0, 1]]}, "two different completions"),
        ({"pairs": [{"preferred": 0, "other": 1, "weight": 0}]}, "'weight' and 'distance' must be numbers above 0"),
        ({"pairs": []}, "neither pairs nor ties"),
    ],
)
def test_groups_that_are_wrong(tmp_path, change, message):
    write_lines(tmp_path / "g.jsonl", [{**GROUP, **change}])
    with pytest.raises(UserError, match=rf"g\.jsonl:1.*{message}"):
        read_pairs(tmp_path / "g.jsonl")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    completions, rankings = home()
    write_lines(tmp_path / "c.jsonl", (c.to_json() for group in completions.values() for c in group))
    write_lines(tmp_path / "r.jsonl", (r.to_json() for r in rankings))
    command = ["export", "--completions", "c.jsonl", "--rankings", "r.jsonl"]
    for kind, told in (("groups", "40 prompts"), ("pairs", "240 pairs"), ("unpaired", "120 completions")):
        assert main([*command, "--as", kind, "--out", f"{kind}.jsonl"]) == 0 and f"{told} in {kind}.jsonl" in capsys.readouterr().out
    assert main([*command, "--as", "dataset", "--out", "d"]) == 0 and "240 pairs in d" in capsys.readouterr().out
    assert main([*command, "--as", "rows", "--out", "x.jsonl"]) == 2 and "groups" in capsys.readouterr().err
