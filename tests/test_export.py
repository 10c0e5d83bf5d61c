"""What is exported is read again: by accord to the same groups, by datasets and by TRL's own checks."""

import json
import weakref

import pytest

from accord.cli import main
from accord.data.pairs import group_pairs
from accord.data.records import Completion, Prompt, RankedCompletions, Ranking
from accord.data.sources import read_completions, read_pairs, read_rankings
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
    assert export([RankedCompletions(completions, rankings)], "groups", tmp_path / "g.jsonl", 0.5, weights) == 40
    assert read_pairs(tmp_path / "g.jsonl") == group_pairs(completions, rankings, 0.5, weights)
    row = json.loads((tmp_path / "g.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert row["rankings"] == {"v1": 1, "v2": 1} and [c["fails"] for c in row["completions"]] == [0, 0, 0, 2]


def test_pairs_are_trls_and_ours(tmp_path):
    from trl.data_utils import is_conversational

    for chat in (False, True):
        completions, rankings = home(chat)
        path = tmp_path / f"{chat}.jsonl"
        count = export([RankedCompletions(completions, rankings)], "pairs", path)
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
    export([RankedCompletions(completions, rankings)], "unpaired", tmp_path / "u.jsonl")
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
    export([RankedCompletions(completions, rankings)], "unpaired", tmp_path / "u.jsonl", labeler_weights={"bob": 0.0, "cy": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [(r["label"], r["weight"]) for r in rows] == [
        (True, pytest.approx(1 / 3)), (True, pytest.approx(1 / 9)), (False, pytest.approx(1 / 9)), (False, pytest.approx(1 / 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
def test_a_dataset_loads(tmp_path, monkeypatch, chat):
    from datasets import get_dataset_config_names, load_dataset

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    completions, rankings = home(chat)
    count = export([RankedCompletions(completions, rankings)], "dataset", tmp_path / "d")
    folder = str(tmp_path / "d")
    assert get_dataset_config_names(folder) == ["pairs", "unpaired", "rankings", "completions"]
    load = lambda *name: load_dataset(folder, *name, cache_dir=str(tmp_path / "cache"))
    pairs = load()
    assert sum(len(part) for part in pairs.values()) == count and set(pairs) == {"train", "validation", "test"}
    assert set(pairs["train"].column_names) == {"id", "theme", "prompt", "chosen", "rejected", "weight", "distance"}
    assert isinstance(pairs["train"][0]["prompt"], list) == chat
    raw = load("rankings")["train"]
    assert raw[0]["ranks"] == ["1", "2", "2", "F"] and read_rankings(tmp_path / "d/rankings/train.parquet") == rankings
    assert read_completions(tmp_path / "d/completions/train.parquet") == completions
    assert len(load("completions")["train"]) == 160 and len(load("unpaired")["train"]) > 0
    card = (tmp_path / "d" / "README.md").read_text()
    assert "60 rankings of 40 prompts by 2 labelers, 20 of them simulated, given by criterion v1 (40), v2 (20)" in card and "alpha" in card


def test_what_is_read_a_few_prompts_at_a_time_is_written_the_same(tmp_path):
    """Never more than one part is held, weights are of all of them, and a decision stands for its prompt."""
    completions, rankings = home()
    rankings.append(Ranking("p3", "rae", (None, 1, 1, 2), flags=(("toxic",), (), (), ()), note="no", decision=True))
    held, most = 0, 0

    def parts():
        nonlocal held, most
        for i in range(0, 44, 4):  # the last ones have no prompts
            names = {f"p{k}" for k in range(i, i + 4)}
            part = RankedCompletions(
                {k: v for k, v in completions.items() if k in names}, [r for r in rankings if r.prompt_id in names and i != 8]
            )
            held += 1
            weakref.finalize(part, let_go)
            most = max(most, held)
            yield part
            del part

    def let_go():
        nonlocal held
        held -= 1

    kept = [r for r in rankings if r.prompt_id not in {"p8", "p9", "p10", "p11"}]
    for kind in ("rankings", "completions", "groups", "pairs", "unpaired"):
        export(parts(), kind, tmp_path / f"{kind}-parts.jsonl", 0.5, {"bob": 2.0})
        export([RankedCompletions(completions, kept)], kind, tmp_path / f"{kind}.jsonl", 0.5, {"bob": 2.0})
        lines = [sorted((tmp_path / f"{kind}{part}.jsonl").read_text().split("\n")) for part in ("", "-parts")]
        assert lines[0] == lines[1] and most <= 2, kind  # the one that is made while the last one is let go
    assert read_rankings(tmp_path / "rankings.jsonl") == kept
    (decided,) = (g for g in read_pairs(tmp_path / "groups.jsonl") if g.prompt.id == "p3")
    assert sorted(pair[:2] for pair in decided.pairs) == [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)]
    (weightless,) = group_pairs(completions, [*rankings[3:4], rankings[-1]], labeler_weights={"rae": 0.0, "ann": 0.0})
    assert {p[:2]: p.weight for p in weightless.pairs} == dict.fromkeys([(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)], 1.0)  # whoever decided
    export(parts(), "dataset", tmp_path / "d")
    assert sorted(read_rankings(tmp_path / "d/rankings/train.parquet"), key=str) == sorted(kept, key=str)
    told = (tmp_path / "d/README.md").read_text()
    assert "54 rankings of 36 prompts by 2 labelers, 18 of them simulated, and 1 decisions of reviewers" in told
    export([RankedCompletions(completions, rankings[-1:])], "dataset", tmp_path / "only")  # a decision and nothing else
    assert "0 rankings of 0 prompts by 0 labelers, and 1 decisions" in (tmp_path / "only/README.md").read_text()
    with pytest.raises(UserError, match="'rae' decided the prompt 'p3' twice"):
        export([RankedCompletions(completions, [rankings[-1]] * 2)], "rankings", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="names the prompt 'zz', which has no completions"):
        export([RankedCompletions(completions, [Ranking("zz", "ann", (1, 2))])], "rankings", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"weight for 'bo', who ranked nothing\. Did you mean 'bob'"):
        export(parts(), "pairs", tmp_path / "x.jsonl", labeler_weights={"bo": 1.0})
    assert not list(tmp_path.glob("*x.jsonl*"))


def test_mistakes(tmp_path):
    completions, rankings = home()
    with pytest.raises(UserError, match=r"does not end in .jsonl"):
        export([RankedCompletions(completions, rankings)], "pairs", tmp_path / "x")
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(UserError, match="already exists"):
        export([RankedCompletions(completions, rankings)], "pairs", tmp_path / "there.jsonl")
    with pytest.raises(UserError, match="nothing to write"):
        export([RankedCompletions(completions, [Ranking("p0", "ann", (None,) * 4)])], "pairs", tmp_path / "x.jsonl")
    for kind in ("pairs", "unpaired"):
        with pytest.raises(UserError, match="ties only"):
            export([RankedCompletions(completions, [Ranking("p0", "ann", (1,) * 4)])], kind, tmp_path / "x.jsonl")
    chats, _ = home(chat=True)
    with pytest.raises(UserError, match="Some prompts are chats"):
        export([RankedCompletions({**completions, "p1": chats["p1"]}, rankings)], "dataset", tmp_path / "d")
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
    formats = (("groups", "40 prompts"), ("pairs", "240 pairs"), ("unpaired", "120 completions"), ("rankings", "60 rankings"), ("completions", "160 completions"))  # fmt: skip
    for kind, told in formats:
        assert main([*command, "--as", kind, "--out", f"{kind}.jsonl"]) == 0 and f"{told} in {kind}.jsonl" in capsys.readouterr().out
    assert main([*command, "--as", "dataset", "--out", "d"]) == 0 and "240 pairs in d" in capsys.readouterr().out
    assert main([*command, "--as", "rows", "--out", "x.jsonl"]) == 2 and "groups" in capsys.readouterr().err
