"""Files in: every error names file, row and field. Rankings to pairs: the documented table."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accord.data.pairs import group_pairs, pairs_of, scored_by_rank
from accord.data.records import Completion, Pair, Prompt, Ranking, split_of
from accord.data.sources import read_completions, read_pairs, read_prompts, read_rankings
from accord.data.statistics import bootstrap_mean, bootstrap_ratio
from accord.disk import write_lines
from accord.errors import UserError


def write(tmp_path, *rows, name="p.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_prompts_of_every_kind(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path, {"prompt": "a", "id": "x", "theme": "t"}, {"messages": chat}, {"prompt": "line\u2028inside"})
    got = read_prompts(path)
    assert [(p.id, p.theme) for p in got] == [("x", "t"), ("row-00002", ""), ("row-00003", "")]
    assert got[1].content == chat and got[1].text == "u"
    table = pa.table({"prompt": ["a", "b"]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [p.content for p in read_prompts(tmp_path / "p.parquet")] == ["a", "b"]
    assert [p.content for p in read_prompts(write(tmp_path, "one", "", "two", name="p.txt"))] == ["one", "two"]
    (tmp_path / "p.json").write_text('[{"question": "q"}]')
    assert read_prompts(tmp_path / "p.json")[0].content == "q"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a"}', "{broken"], r"p\.jsonl:2 is not valid JSON"),
        (['{"prompt": "  "}'], r"p\.jsonl:1: field 'prompt' is empty"),
        (['{"promt": "a"}'], r"p\.jsonl:1 has no field 'prompt'.*Did you mean 'prompt'"),
        (["[1]"], r"p\.jsonl:1 must be an object"),
        (['{"prompt": 3}'], r"field 'prompt' must be text or a list"),
        (['{"messages": [{"role": "usr", "content": "a"}]}'], r"message 1 has the unknown role 'usr'.*Did you mean 'user'"),
        (['{"messages": [{"role": "user"}]}'], r"message 1 must have a 'role' and a text 'content'"),
        (['{"messages": [{"role": "assistant", "content": "a"}]}'], r"a prompt ends with the user"),
        (['{"messages": [{"role": "user", "content": " "}]}'], r"ends with an empty message"),
        (['{"prompt": "a", "id": "x"}', '{"prompt": "b", "id": "x"}'], r"p\.jsonl:2: the id 'x' is used already at .*:1"),
        (['{"prompt": "\\ud83d"}'], "half of a surrogate pair"),
        ([""], "holds no prompts"),
    ],
)
def test_bad_prompts(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path, *rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("x.tsv", b"a\tb", "unknown kind of file"),
        ("x.csv", b"a,b", "holds no prompts"),
        ("x.csv", b"a,b\n1,2", "has no field .prompt."),
        ("x.csv", b'prompt\n"x', "is no row of a CSV file"),
        ("x.jsonl", b"\xff\xfe\x00", "UTF-8"),
        ("x.parquet", b"nonsense", "not a readable Parquet"),
        ("x.json", b"{}", "must hold a JSON list"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_pairs_of_one_prompt_are_grouped(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "c"},
        {"prompt": "r", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
    )
    first, second = read_pairs(path)
    assert [c.text for c in first.completions] == ["a", "b", "c"] and first.pairs == (Pair(0, 1), Pair(0, 2))
    assert [c.text for c in second.completions] == ["x", "y"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"prompt": "q", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejectd": "b"}, "Did you mean 'rejected' by 'rejectd'"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "field 'chosen' must be a non-empty text"),
    ],
)
def test_bad_pairs(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        read_pairs(write(tmp_path, row))
    assert "p.jsonl:1" in str(caught.value)


def test_conversion_table():
    """Ranks 1, 2, 2, F, F: better beats worse, ties give nothing, ranked beats F, F and F give nothing."""
    pairs, ties = pairs_of(Ranking("p", "l", (4, 1, 4, None, None)), fail_weight=0.5)
    assert sorted(p[:3] for p in pairs) == sorted(
        [(1, 0, 1.0), (1, 2, 1.0), (0, 3, 0.5), (0, 4, 0.5), (1, 3, 0.5), (1, 4, 0.5), (2, 3, 0.5), (2, 4, 0.5)]
    )
    assert ties == [Pair(0, 2)]  # equal ranks; two F are nothing
    # Ranks 1, 4, 4, F, F stand as 1, 2, 2, 3, 3: what counts is how many are between.
    assert {p[:2]: p.distance for p in pairs} == {(1, 0): 1, (1, 2): 1, (0, 3): 1, (0, 4): 1, (2, 3): 1, (2, 4): 1, (1, 3): 2, (1, 4): 2}


def completions(texts):
    prompt = Prompt("p", "q")
    return {"p": [Completion(prompt, t, True, i) for i, t in enumerate(texts)]}


def test_labelers_add_up_and_contradict():
    rankings = [Ranking("p", "a", (1, 2)), Ranking("p", "b", (1, 2)), Ranking("p", "c", (2, 1))]
    (group,) = group_pairs(completions(["x", "y"]), rankings)
    assert {p[:2]: p.weight for p in group.pairs} == {(0, 1): 2.0, (1, 0): 1.0}
    assert group_pairs(completions(["x", "x"]), rankings) == []  # equal texts are no pair


def test_labelers_count_for_what_they_are_worth():
    """Distances are means by weight: of 1 and 2 with weights 1 and 0.5, 4/3."""
    given = completions(["x", "y", "z"])
    rankings = [Ranking("p", "a", (1, 2, 2)), Ranking("p", "b", (1, 3, 2)), Ranking("p", "c", (1, 1, 1))]
    (group,) = group_pairs(given, rankings, labeler_weights={"b": 0.5, "c": 0.0})
    assert {p[:2]: p[2:] for p in group.pairs} == {(0, 1): (1.5, pytest.approx(4 / 3)), (0, 2): (1.5, 1.0), (2, 1): (0.5, 1.0)}
    assert group.ties == (Pair(1, 2),) and group.weight == pytest.approx(0.5)
    (tied,) = group_pairs(given, [Ranking("p", "a", (1, 1, None))], fail_weight=0.0)
    assert tied.pairs == () and tied.ties == (Pair(0, 1),)
    with pytest.raises(UserError, match=r"weight for 'bb', who ranked nothing\. Did you mean 'b'"):
        group_pairs(given, rankings, labeler_weights={"bb": 0.5})


def test_rankings_must_fit_their_completions():
    with pytest.raises(UserError, match="ranked 3 completions of 'p'; it has 2"):
        group_pairs(completions(["x", "y"]), [Ranking("p", "a", (1, 2, 3))])
    with pytest.raises(UserError, match="'a' ranked the prompt 'p' twice"):
        group_pairs(completions(["x", "y"]), [Ranking("p", "a", (1, 2)), Ranking("p", "a", (2, 1))])
    with pytest.raises(UserError, match="names the prompt 'z'"):
        group_pairs(completions(["x", "y"]), [Ranking("z", "a", (1, 2))])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_id": "p", "ranks": []}, "a list of whole numbers from 1"),
        ({"prompt_id": "p", "ranks": [True, 2]}, "a list of whole numbers from 1"),
        ({"prompt_id": "p", "ranks": [10**400]}, "from 1 to 1000"),
        ({"prompt_id": "p", "ranks": [1], "simulated": "false"}, "must be true or false"),
        ({"prompt_id": "p", "ranks": [1], "labeler": "\ud800"}, "half of a surrogate"),
        ({"prompt_id": "p", "rank": [1, 2]}, "Did you mean 'ranks' by 'rank'"),
    ],
)
def test_bad_rankings(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_rankings(write(tmp_path, row))


def test_rankings_and_completions_round_trip(tmp_path):
    rankings = [Ranking("p", "a", (1, None, 1), "v1", True)]
    write_lines(tmp_path / "r.jsonl", (r.to_json() for r in rankings))
    assert read_rankings(tmp_path / "r.jsonl") == rankings
    group = completions(["x", "y"])
    write_lines(tmp_path / "c.jsonl", (c.to_json() for c in group["p"]))
    assert read_completions(tmp_path / "c.jsonl") == group
    with pytest.raises(UserError, match="whole numbers"):
        read_rankings(write(tmp_path, {"prompt_id": "p", "ranks": [0, 1]}))
    good = {"prompt_id": "p", "ranks": [1, "F"]}
    for more, told in (
        ({"flags": ["toxic", "other"]}, "'flags' must be a list of texts for each completion"),
        ({"flags": [[]]}, "'flags' must be a list with a value for each of the 2"),
        ({"ratings": [1, "7"]}, "'ratings' must be whole numbers from 1 to 7"),
        ({"ratings": [10**30, 1]}, "'ratings' must be whole numbers from 1 to 7"),
        ({"note": {"a": 1}}, "'note' must be a text"),
        ({"note": "a\0"}, "'note' must be a text"),
        ({"decision": 1}, "'decision' is 1; it must be true or false"),
    ):
        with pytest.raises(UserError, match=rf"p.jsonl:1: {told}"):
            read_rankings(write(tmp_path, {**good, **more}))


def test_notes_of_a_table_are_texts(tmp_path):
    (tmp_path / "r.csv").write_text('prompt_id,labeler,ranks,note\np,a,"[1, 2]",0\np,b,"[1, 2]",1.10\np,c,"[1, 2]",null\n')
    assert [r.note for r in read_rankings(tmp_path / "r.csv")] == ["0", "1.10", "null"]


@pytest.mark.parametrize("bad", [{"index": "a"}, {"index": 10**30}, {"tokens": 5}, {"tokens": ["x"]}])
def test_bad_completions(tmp_path, bad):
    with pytest.raises(UserError, match=r"p\.jsonl:1: 'index' must be"):
        read_completions(write(tmp_path, {"id": "p", "prompt": "q", "completion": "c", **bad}))


def test_scores_by_rank():
    """Three completions: a first place is +1, a middle 0, a last -1; ties share; F is last; labelers are averaged."""
    answers = {"p": [Completion(Prompt("p", "x"), t, True, i) for i, t in enumerate("abc")]}
    scores = lambda *ranks: [one.score for one in scored_by_rank(answers, [Ranking("p", f"l{n}", r) for n, r in enumerate(ranks)])]
    assert scores((1, 2, 3)) == [1, 0, -1] and scores((2, 2, None)) == [0.5, 0.5, -1] and scores((None, 1, None)) == [-0.5, 1, -0.5]
    assert scores((5, 6, None)) == [1, 0, -1]  # F is below a rank that is larger than the number of completions
    assert scores((1, 2, 3), (3, 2, 1)) == [0, 0, 0] and scores((1, 2, 3), (1, 3, 2)) == [1, -0.5, -0.5]
    assert scored_by_rank({"p": answers["p"][:1]}, [Ranking("p", "l", (1,))]) == []  # nothing was compared


def test_weightless_fails_leave_no_empty_groups():
    assert group_pairs(completions(["x", "y"]), [Ranking("p", "a", (1, None))], fail_weight=0.0) == []


def test_splits_are_stable_and_have_their_shares():
    ids = [f"id-{i}" for i in range(4000)]
    shares = {name: np.mean([split_of(i) == name for i in ids]) for name in ("train", "validation", "heldout")}
    assert shares["heldout"] == pytest.approx(0.25, abs=0.02) and shares["validation"] == pytest.approx(0.1, abs=0.02)
    assert [split_of(i) for i in ("help-001", "honest-001", "harm-003")] == [split_of(i) for i in ("help-001", "honest-001", "harm-003")]


def test_bootstrap_against_scipy():
    """One value a cluster is the plain percentile bootstrap."""
    from scipy.stats import bootstrap

    x = np.random.default_rng(0).exponential(size=80)
    mine = bootstrap_mean(x.tolist(), [str(i) for i in range(80)], draws=20000)
    theirs = bootstrap((x,), np.mean, n_resamples=20000, method="percentile", random_state=0).confidence_interval
    assert mine.value == pytest.approx(x.mean())
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_bootstrap_resamples_clusters():
    """Ten equal values in each of five clusters say no more than five values."""
    five = [0.0, 1.0, 2.0, 3.0, 4.0]
    many = bootstrap_mean(np.repeat(five, 10).tolist(), np.repeat(list("abcde"), 10).tolist())
    few = bootstrap_mean(five, list("abcde"))
    assert (many.low, many.high) == pytest.approx((few.low, few.high))
    ratio = bootstrap_ratio([1.0, 3.0], [2.0, 4.0], ["a", "b"])
    assert ratio.value == pytest.approx(4 / 6) and ratio.low == 0.5 and ratio.high == 0.75


def test_the_shipped_prompts():
    from importlib.resources import files

    prompts = read_prompts(str(files("accord.recipes") / "prompts.jsonl"))
    assert len(prompts) >= 600
    assert {p.theme for p in prompts} == {"helpfulness", "honesty", "harmlessness"}
    assert len({p.text.lower() for p in prompts}) == len(prompts)


def test_csv_cells_are_texts_numbers_and_lists(tmp_path):
    (tmp_path / "c.csv").write_text(
        '\ufeffid,prompt,completion,index,finished\n'
        'a,"[{""role"": ""user"", ""content"": ""hi""}]","[{""k"": 1}]",1,FALSE\n'
        'a,"[{""role"": ""user"", ""content"": ""hi""}]",,0,True\n'
        '007,1e3,12,0,\n'
    )  # fmt: skip
    found = read_completions(tmp_path / "c.csv")
    assert [(c.text, c.finished) for c in found["a"]] == [("", True), ('[{"k": 1}]', False)]
    assert found["a"][0].prompt.content == [{"role": "user", "content": "hi"}]
    assert found["007"][0].prompt.content == "1e3" and found["007"][0].text == "12"
    (tmp_path / "d.csv").write_text("id,prompt,completion\na,one,x\na,two,y\n")
    with pytest.raises(UserError, match=r"d.csv:3: the id 'a' is of another prompt already"):
        read_completions(tmp_path / "d.csv")
