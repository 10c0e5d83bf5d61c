"""Constitutions, and judges by them: a scripted service over real HTTP whose right answers are known, and a policy against its own logits."""

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

from accord import service as service_module
from accord.cli import main
from accord.constitution import revising
from accord.constitution.endpoint import Endpoint
from accord.constitution.judges import EndpointJudge, PolicyJudge, verdict_of
from accord.constitution.judging import Question, Verdict, ask, compare, firing, rankings, soft_pairs
from accord.constitution.principles import OURS, Constitution, Principle, check, problems, read_constitution
from accord.constitution.revising import curve, examples, revise, unwrapped
from accord.constitution.writers import Asked, EndpointWriter, PolicyWriter
from accord.data.records import Completion, Prompt
from accord.data.sources import read_examples, read_pairs, read_rankings
from accord.disk import write_lines
from accord.errors import UserError

GOOD = {"id": "kind", "critique": "Point out what is unkind.", "revision": "Be kind.", "comparison": "Which is kinder?"}
WHOLE = {
    "name": "mine",
    "version": 1,
    "principles": [GOOD, {**GOOD, "id": "brief", "comparison": "Which is briefer?", "weight": 3, "priority": -1}],
}


def sigma(x):
    return 1 / (1 + math.exp(-x))


def group(name, *texts):
    prompt = Prompt(name, f"Say something, {name}.")
    return [Completion(prompt, text, True, k) for k, text in enumerate(texts)]


def constitution(*principles):
    return Constitution("test", "1", principles or (Principle("kind", "c", "r", "Which is kinder?"),))


# Principles


def test_ours_is_whole():
    assert check(OURS) == []
    ours = read_constitution()
    assert len(ours.principles) >= 12 and len({p.id for p in ours.principles}) == len(ours.principles)
    for word in ("harm", "truthful", "helpful", "privacy", "refusal"):
        assert any(word in p.id for p in ours.principles), word


def test_yaml_and_markdown_say_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(WHOLE))
    parts = "\n".join(
        f"## {p['id']}\n\nFor readers only.\n\nCritique: {p['critique']}\n\nRevision: {p['revision'][:3]}\n{p['revision'][3:]}\n\n"
        f"**Comparison:** {p['comparison']}\n\nweight: {p.get('weight', 1)}\npriority: {p.get('priority', 0)}\n"
        for p in WHOLE["principles"]
    )
    (tmp_path / "a.md").write_text(f"---\nname: mine\nversion: 1\n---\n\n# Mine\n\n{parts}")
    one, other = read_constitution(tmp_path / "a.yaml"), read_constitution(tmp_path / "a.md")
    assert one == other and one.digest == other.digest and [p.weight for p in one.principles] == [1, 3]
    assert one.label == f"constitution mine 1 ({one.digest})"
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**WHOLE, "principles": [{**GOOD, "critique": "Another."}, WHOLE["principles"][1]]}))
    assert read_constitution(tmp_path / "b.yaml").digest != one.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "has no name"),
        ({"version": ""}, "has no version"),
        ({"principles": []}, "has no principles"),
        ({"principals": 1}, "Did you mean 'principles'"),
        ({"principles": ["be good"]}, "principle 1 is a str"),
        ({"principles": [{**GOOD, "id": " "}]}, "principle 1 has no id"),
        ({"principles": [GOOD, GOOD]}, "principle 2 ('kind') has the id of principle 1"),
        ({"principles": [{k: v for k, v in GOOD.items() if k != "comparison"}]}, "('kind') has no comparison; write a question"),
        ({"principles": [{**GOOD, "critique": ""}]}, "('kind') has no critique"),
        ({"principles": [{**GOOD, "comparison": "Choose."}]}, "is no question"),
        ({"principles": [{**GOOD, "weight": 0}]}, "its weight is 0"),
        ({"principles": [{**GOOD, "weight": float("nan")}]}, "its weight is nan"),
        ({"principles": [{**GOOD, "priority": "high"}]}, "its priority is 'high'"),
        ({"principles": [{**GOOD, "wieght": 2}]}, "Did you mean 'weight'"),
    ],
)
def test_what_is_missing_is_told(tmp_path, capsys, change, said):
    raw = {**WHOLE, **change}
    assert sum(said in problem for problem in problems(raw)) == 1 and problems(WHOLE) == []
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"c\.yaml"):
        read_constitution(tmp_path / "c.yaml")
    assert main(["constitution", "check", str(tmp_path / "c.yaml")]) == 2
    out, error = capsys.readouterr()
    assert said in " ".join((out + error).split())


def test_a_heading_is_missing(tmp_path):
    (tmp_path / "c.md").write_text("# Mine\n\n## kind\n")
    with pytest.raises(UserError, match="does not begin with name and version"):
        read_constitution(tmp_path / "c.md")
    with pytest.raises(UserError, match="does not exist"):
        read_constitution(tmp_path / "d.md")


def test_principles_are_drawn_by_weight_and_the_most_important_last():
    of = constitution(
        *(Principle(name, "c", "r", "q?", weight, priority) for name, weight, priority in (("a", 1, 5), ("b", 2, 0), ("c", 5, 9)))
    )
    first = Counter(of.draw(str(i), 1)[0].id for i in range(8000))
    for name, share in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
        assert first[name] / 8000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 8000))
    assert [p.id for p in of.draw("x", 3)] == ["b", "a", "c"] and of.draw("x", 2) == of.draw("x", 2)
    assert Counter(p.id for p in of.draw("x", 7)).most_common()[-1][1] == 2  # none a third time before all came twice
    assert any(of.draw(str(i), 1, seed=1) != of.draw(str(i), 1) for i in range(20))


# Judging


class Planted:
    """Prefers the longer answer by its length, likes the first place by ``bias``; of ``mute`` questions it says nothing."""

    name = "planted"

    def __init__(self, bias=0.0, scale=0.1, mute=""):
        self.bias, self.scale, self.mute = bias, scale, mute

    def answer(self, questions):
        out = []
        for q in questions:
            if self.mute and self.mute in q.text:
                out.append(Verdict(None, "no idea"))
                continue
            first, second = q.text.split("\n(A) ")[1].split("\n\nAnswer")[0].split("\n\n(B) ")
            sign = -1 if "briefer" in q.text else 1
            x = sign * self.scale * (len(first) - len(second)) + self.bias
            out.append(Verdict((math.log(sigma(x)), math.log(sigma(-x)))))
        return out


GROUPS = [group("p1", "aaaa", "aaaaaaaaaa", "aaaaaaa"), group("p2", "b" * 30, "b")]


@pytest.mark.parametrize("bias", [0.0, 0.7, -2.0])
def test_a_liking_for_a_position_is_measured_and_cancelled(bias):
    found = compare(Planted(bias), GROUPS, constitution())
    assert [(c.prompt_id, c.first, c.second) for c in found.compared] == [("p1", 0, 1), ("p1", 0, 2), ("p1", 1, 2), ("p2", 0, 1)]
    assert [c.probability for c in found.compared] == pytest.approx([sigma(-0.6), sigma(-0.3), sigma(0.3), sigma(2.9)])
    assert found.position_bias.value == pytest.approx(bias)


def test_an_ensemble_is_a_mean_and_a_clamp_a_clamp():
    both = constitution(Principle("kind", "c", "r", "Which is kinder?"), Principle("brief", "c", "r", "Which is briefer?", 1.0, 1))
    found = compare(Planted(0.4, 0.5), [group("p", "aaa", "a")], both, ensemble=2)
    assert found.compared[0].probability == pytest.approx((sigma(1.0) + sigma(-1.0)) / 2) and found.compared[0].principles == (
        "kind",
        "brief",
    )
    clamped = compare(Planted(0.0, 0.1), GROUPS, constitution(), clamp=0.4)
    assert [c.probability for c in clamped.compared] == pytest.approx([0.4, sigma(-0.3), sigma(0.3), 0.6])


def test_soft_labels_are_cross_entropy(tmp_path):
    found = compare(Planted(), GROUPS, constitution())
    groups = soft_pairs(GROUPS, found)
    r = {"p1": [0.3, -0.2, 0.5], "p2": [1.0, -1.0]}  # any rewards
    assert [len(pairs.pairs) for pairs in groups] == [6, 2]
    for pairs in groups:
        name = pairs.prompt.id
        by_pairs = -sum(p.weight * math.log(sigma(r[name][p.preferred] - r[name][p.other])) for p in pairs.pairs)
        d = [(c.probability, r[name][c.first] - r[name][c.second]) for c in found.compared if c.prompt_id == name]
        assert by_pairs == pytest.approx(-sum(p * math.log(sigma(x)) + (1 - p) * math.log(sigma(-x)) for p, x in d))
    given = rankings(GROUPS, found)
    assert (
        [r.ranks for r in given] == [(3, 1, 2), (1, 2)]
        and given[0].labeler == f"ai:planted/{constitution().digest[:6]}"
        and given[0].criterion == found.constitution
    )


def test_what_nothing_usable_was_said_of_costs_no_more_than_itself():
    found = compare(Planted(mute="aaaaaaaaaa"), GROUPS, constitution())
    assert [(c.first, c.second) for c in found.compared] == [(0, 2), (0, 1)] and len(found.problems) == 2 and "no idea" in found.problems[0]
    assert [r.prompt_id for r in rankings(GROUPS, found)] == ["p2"]
    with pytest.raises(UserError, match="said nothing usable of 4 comparisons, such as 'p1', kind: no idea"):
        compare(Planted(mute="Say"), GROUPS, constitution())


def test_how_often_a_principle_fires():
    class Finds:
        name = "finds"

        def answer(self, questions):
            out = []
            for q in questions:
                yes = "rude" in q.text.split("Assistant: ")[1].split("\n")[0] and "unkind" in q.text
                first = q.text.split("(A) ")[1].startswith("Yes")
                x = (2.0 if yes == first else -2.0) + 1.5  # likes (A)
                out.append(Verdict((math.log(sigma(x)), math.log(sigma(-x)))))
            return out

    of = constitution(Principle("kind", "Point out what is unkind.", "r", "q?"), Principle("brief", "What is too long?", "r", "q?"))
    shares, trouble = firing(Finds(), [*group("a", "rude words", "fine"), *group("b", "fine", "fine")], of)
    assert shares["kind"].value == 0.25 and shares["brief"].value == 0.0 and not trouble


# A policy as judge


def test_a_policy_judges_by_its_own_log_probabilities(tiny):
    question = ask(Prompt("p", [{"role": "user", "content": "hi"}]), "yes", "no", "Which?")
    long = Question("x" * 500)
    judge = PolicyJudge(tiny, "tiny")
    (a, b), none = judge.answer([question])[0].logprobs, judge.answer([long, question])
    t = tiny.tokenizer
    start = t.encode_prompt([{"role": "user", "content": question.text}])
    assert "(A) yes" in question.text and "(B) no" in question.text and question.text.index("hi") < question.text.index("Which?")
    by_hand = []
    for option in ("(A)", "(B)"):
        ids = t.encode_plain(option)
        logits = tiny.model(torch.tensor([[*start, *ids]]))[0].double().log_softmax(-1)
        by_hand.append(sum(float(logits[len(start) + k - 1, i]) for k, i in enumerate(ids)))
    total = torch.tensor(by_hand).logsumexp(0)
    assert (a, b) == pytest.approx([float(x - total) for x in by_hand], abs=1e-4)
    assert none[0].logprobs is None and "context of 128" in none[0].problem and none[1].logprobs == pytest.approx((a, b), abs=1e-5)


# A service as judge


class Service:
    """Serves ``/v1/chat/completions``: prefers the longer answer, likes (A). ``script``: what the next requests get instead."""

    def __init__(self, bias=0.5, logprobs=True):
        self.bias, self.logprobs, self.script, self.questions, self.headers, self.bodies = bias, logprobs, [], 0, {}, []
        self.now, self.most, self.poison = 0, 0, ""
        lock, service = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.headers, service.questions, service.now = dict(self.headers), service.questions + 1, service.now + 1
                    service.most = max(service.most, service.now)
                    service.bodies.append(body)
                    what = service.script.pop(0) if service.script else None
                time.sleep(0.01)
                if service.poison and service.poison in json.dumps(body):
                    what = (500, b"")
                status, data = what if isinstance(what, tuple) else (200, json.dumps(what or service.answer(body)).encode())
                with lock:
                    service.now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body):
        if body["max_tokens"] > 100:
            return said("The first is (A), the second is (B). Longer is better.")
        first, second = body["messages"][0]["content"].split("\n(A) ")[1].rsplit("\n\n", 1)[0].split("\n\n(B) ")
        x = 0.1 * (len(first) - len(second)) + self.bias
        letter = "A" if x > 0 else "B"
        top = [
            {"token": " A", "logprob": math.log(0.9 * sigma(x))},
            {"token": "B", "logprob": math.log(0.9 * sigma(-x))},
            {"token": "I", "logprob": -9.0},
        ]
        content = [
            {"token": "(", "logprob": 0.0, "top_logprobs": [{"token": "(", "logprob": 0.0}]},
            {"token": letter, "logprob": 0.0, "top_logprobs": top},
        ]
        return said(f"({letter})", {"content": content} if self.logprobs else None)


def said(text, logprobs=None, **message):
    return {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "logprobs": logprobs}],
        "usage": {"total_tokens": 50},
    }


@pytest.fixture
def service(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(service_module.Service, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(service_module.Service, "LONGEST_WAIT", 0.05)
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_the_whole_chain_gives_what_is_known(service, monkeypatch):
    monkeypatch.setenv("ACCORD_JUDGE_KEY", "secret")
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big")), GROUPS, constitution())
    assert [c.probability for c in found.compared] == pytest.approx([sigma(-0.6), sigma(-0.3), sigma(0.3), sigma(2.9)])
    assert found.position_bias.value == pytest.approx(0.5) and service.questions == 8
    assert service.headers["Authorization"] == "Bearer secret" and service.bodies[0]["model"] == "big"


def test_the_key_is_written_nowhere(service, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCORD_JUDGE_KEY", "secret-key")
    compare(EndpointJudge(Endpoint("Judge", service.url, "big")), GROUPS, constitution())
    assert not any(b"secret-key" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_no_more_requests_at_once_than_asked_for(service):
    many = [group(f"p{i}", "a" * (i + 2), "b") for i in range(20)]
    compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=3)), many, constitution())
    assert service.most == 3 and service.questions == 40


def test_a_cut_loses_and_repays_nothing(service, monkeypatch):
    monkeypatch.setattr(service_module.Service, "OUTAGE", 0.0)
    service.script = [None] * 5 + [(503, b"busy")] * 1000
    with pytest.raises(UserError, match=r"503.*Nothing is lost"):
        compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1)), GROUPS, constitution())
    service.script, service.bodies = [], []
    endpoint = Endpoint("Judge", service.url, "big", concurrency=1)
    found = compare(EndpointJudge(endpoint), GROUPS, constitution())
    assert len(service.bodies) == 3 and endpoint.used == 150
    assert [c.probability for c in found.compared] == pytest.approx([sigma(-0.6), sigma(-0.3), sigma(0.3), sigma(2.9)])
    compare(EndpointJudge(Endpoint("Judge", service.url, "big")), GROUPS, constitution())
    assert len(service.bodies) == 3
    compare(EndpointJudge(Endpoint("Judge", service.url, "other")), GROUPS, constitution())
    assert len(service.bodies) == 11  # another model is another judge


def test_a_budget_is_kept(service):
    with pytest.raises(UserError, match="budget of 150 tokens is used up, after 3 requests"):
        compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1, budget=150)), GROUPS, constitution())
    assert service.questions == 3
    compare(EndpointJudge(Endpoint("Judge", service.url, "big", budget=400)), GROUPS, constitution())
    assert service.questions == 8


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (said("Neither."), "neither (A) nor (B) alone, but 'Neither.'"),
        (said("(A) and (B) are alike"), "neither (A) nor (B) alone"),
        (said("A fine question"), "neither (A) nor (B) alone"),
        (said(None, refusal="I will not judge."), "refused: I will not judge."),
        (said(""), "without text"),
        ({"choices": []}, "no choice"),
        ({"error": "x"}, "no choice"),
        ((200, b"<html>"), "not JSON"),
        ((400, b"no such model"), "answered 400: no such model"),
    ],
)
def test_what_cannot_be_used_is_told_and_costs_itself(service, answer, cause):
    service.script = [answer]
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1)), GROUPS, constitution())
    assert len(found.compared) == 3 and len(found.problems) == 1 and cause in found.problems[0]


def test_a_service_that_is_busy_is_asked_again(service):
    service.script = [(503, b""), (429, b"")]
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1)), GROUPS, constitution())
    assert len(found.compared) == 4 and service.questions == 10


def test_an_outage_is_waited_for_by_all_requests_together(service, monkeypatch, capsys):
    monkeypatch.setattr(service_module.Service, "REST", 0.1)
    service.script = [(503, b"")] * 40
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=4)), GROUPS, constitution())
    assert len(found.compared) == 4 and service.questions == 48
    told = capsys.readouterr().out
    assert told.count("is down") == 1 and told.count("answers again") == 1


def test_a_wrong_key_is_a_sentence(service):
    service.script = [(401, b"no key")]
    with pytest.raises(UserError, match=r"answered 401: no key.*ACCORD_JUDGE_KEY"):
        compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1)), GROUPS, constitution())
    assert service.questions == 1


def test_a_service_without_log_probabilities_is_asked_for_letters(service):
    service.logprobs, service.script = False, [(400, b"logprobs are not supported")]
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1)), GROUPS, constitution())
    assert len(found.compared) == 4 and service.questions == 9 and "logprobs" not in service.bodies[1]


def test_a_question_that_is_never_answered_does_not_stop_the_others(service, monkeypatch):
    monkeypatch.setattr(service_module.Service, "REST", 0.05)
    service.poison = "poison"
    many = [group(f"p{i}", "a" * (i + 2), "b") for i in range(60)]
    many[3] = group("bad", "poison", "b")
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=3)), many, constitution())
    assert len(found.compared) == 59 and "while it answered other requests" in found.problems[0]


def test_completions_are_told_by_their_place_not_their_number():
    gaps = [[Completion(c.prompt, c.text, True, 2 * c.index + 1) for c in some] for some in GROUPS]
    found, plain = (compare(Planted(), some, constitution()) for some in (gaps, GROUPS))
    assert found.compared == plain.compared
    assert [p.pairs for p in soft_pairs(gaps, found)] == [p.pairs for p in soft_pairs(GROUPS, plain)]
    assert [r.ranks for r in rankings(gaps, found)] == [(3, 1, 2), (1, 2)]


def test_verdicts_by_hand():
    top = lambda *pairs: [{"token": t, "logprob": x} for t, x in pairs]
    choice = lambda text, token, listed: {
        "message": {"content": text},
        "logprobs": {"content": [{"token": token, "logprob": -0.1, "top_logprobs": listed}]},
    }
    a, b = verdict_of(choice("B", "B", top(("B", math.log(0.5)), (" B", math.log(0.1)), ("A", math.log(0.2)), ("x", -7.0)))).logprobs
    assert (math.exp(a), math.exp(b)) == pytest.approx((0.25, 0.75))
    a, b = verdict_of(choice("(A)", "A", top(("A", math.log(0.8)), ("x", math.log(0.1))))).logprobs  # B is not named: 0.1 at most
    assert (math.exp(a), math.exp(b)) == pytest.approx((8 / 9, 1 / 9))
    a, b = verdict_of(choice("(A)", "A", top(("A", math.log(0.75))))).logprobs  # nothing else is named: 0.25 at most
    assert (math.exp(a), math.exp(b)) == pytest.approx((0.75, 0.25))
    a, b = verdict_of({"message": {"content": "**(B)**"}}).logprobs  # no numbers
    assert (math.exp(a), math.exp(b)) == pytest.approx((0.001, 0.999))


def test_letters_without_numbers_cancel_where_they_contradict(service):
    service.logprobs, service.bias = False, 100.0  # always the first
    found = compare(EndpointJudge(Endpoint("Judge", service.url, "big")), GROUPS, constitution())
    assert [c.probability for c in found.compared] == pytest.approx([0.5] * 4) and found.position_bias.value == pytest.approx(math.log(999))


def test_thinking_comes_first(service):
    found = compare(
        EndpointJudge(Endpoint("Judge", service.url, "big", concurrency=1)),
        [group("p", "aaa", "a")],
        constitution(),
        thinking=True,
        clamp=0.46,
    )
    assert found.compared[0].probability == pytest.approx(0.54) and service.questions == 4
    thought, decided = service.bodies[:2]
    assert "logprobs" not in thought and [m["role"] for m in decided["messages"]] == ["user", "assistant", "user"]


def test_the_command(service, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "c.jsonl", [c.to_json() for some in GROUPS for c in some])
    words = ["constitution", "prefer", "--completions", "c.jsonl", "--judge", service.url, "--out", "ai.jsonl", "--rankings", "r.jsonl"]
    assert main(words) == 2 and "--judge-model" in capsys.readouterr().err
    assert main([*words, "--judge-model", "big", "--clamp", "0.5"]) == 2 and "--clamp is 0.5" in capsys.readouterr().err
    assert main([*words, "--judge-model", "big"]) == 0
    assert "4 comparisons in ai.jsonl; liking for the first position: 0.5" in " ".join(capsys.readouterr().out.split())
    back = read_pairs("ai.jsonl")
    assert [[p.weight for p in g.pairs] for g in back][1] == pytest.approx([sigma(2.9), sigma(-2.9)])
    assert [r.labeler for r in read_rankings("r.jsonl")] == [f"ai:big/{read_constitution().digest[:6]}"] * 2
    row = json.loads((tmp_path / "ai.jsonl").read_text().splitlines()[0])
    assert row["judge"] == "big" and list(row["rankings"]) == [read_constitution().label]
    assert main([*words, "--judge-model", "big"]) == 2 and "already exists" in capsys.readouterr().err
    assert main(["constitution", "prefer", "--jugde", "x"]) == 2 and "Did you mean '--judge'" in capsys.readouterr().err
    assert main(["constitution", "chek"]) == 2 and "Did you mean 'check'" in capsys.readouterr().err
    assert main(["constitution", "check", "--completions", "c.jsonl"]) == 2 and "give both" in capsys.readouterr().err
    assert main(["constitution", "check"]) == 0 and "nothing missing" in capsys.readouterr().out


# Critiques and revisions


class Scripted:
    """A service that writes what is known: its answers swear; a critique counts the user's messages; each revision takes one curse away."""

    def __init__(self, service):
        service.answer = self.answer
        self.asked = []

    def answer(self, body):
        chat = body["messages"]
        self.asked.append(chat)
        turns = [m["content"] for m in chat if m["role"] == "user" and m["content"] != "shot"]
        if turns[-1].startswith("Find"):
            return said(f"Critique {turns[-1]} of: {chat[-2]['content']}")
        if turns[-1].startswith("Mend"):
            before = chat[-4]["content"]
            return said(
                {"same": before, "none": " ", "other": "Bananas!"}.get(
                    turns[0].split()[-1], f'Here is the revised answer: "{before.replace("damn ", "", 1)}"'
                )
            )
        return {
            "choices": [
                {"message": {"content": f"A damn damn answer about {turns[0]}"}, "finish_reason": "length" if "cut" in turns[0] else "stop"}
            ]
        }


TWO = Constitution(
    "two", "1", (Principle("first", "Find one.", "Mend one.", "q?"), Principle("last", "Find two.", "Mend two.", "q?", 1.0, 1))
)


def endpoint_writer(service, **more):
    return EndpointWriter(Endpoint("Writer", service.url, "big", **more), 0.0, 150)


def test_chains_are_what_is_known(service, tmp_path):
    script = Scripted(service)
    prompts = [
        Prompt("a", "cakes"),
        Prompt("b", "the same"),
        Prompt("c", "of none"),
        Prompt("d", "or other"),
        Prompt("e", [{"role": "user", "content": "tea"}]),
    ]
    found = revise(tmp_path / "chains.jsonl", endpoint_writer(service), prompts, TWO, 2, shots=[{"role": "user", "content": "shot"}])
    a = found[0]
    assert a.first == "A damn damn answer about cakes" and [s.principle for s in a.steps] == ["first", "last"] and not a.dropped
    assert [s.revision for s in a.steps] == ["A damn answer about cakes", "A answer about cakes"]
    assert a.steps[1].critique == "Critique Find two. of: A damn answer about cakes" and a.toxicity > a.steps[1].toxicity
    assert [
        "copy of the first" in found[1].dropped,
        "without text" in found[2].dropped,
        "unanswered" in found[3].dropped,
        found[4].dropped,
    ] == [True, True, True, ""]
    critique = next(chat for chat in script.asked if chat[-1]["content"] == "Find two." and chat[1]["content"] == "cakes")
    assert [m["content"] for m in critique] == ["shot", "cakes", "A damn answer about cakes", "Find two."]
    assert [row["completion"] for row in examples(found)] == ["A answer about cakes", "A answer about tea"]
    means = [e.value for e in curve(found)]
    whole = [c for c in found if len(c.steps) == 2]
    scores = [[c.toxicity, *(step.toxicity for step in c.steps)] for c in whole]
    assert means == pytest.approx([sum(column) / len(whole) for column in zip(*scores, strict=True)]) and means[2] < means[1] < means[0]
    requests = [chat[-1]["content"] for chat in script.asked if any(m["content"] == "cakes" for m in chat)]
    assert requests == ["cakes", "Find one.", "Mend one.", "Find two.", "Mend two."]


def test_a_cut_chain_is_dropped_and_a_stop_repays_nothing(service, tmp_path, monkeypatch):
    Scripted(service)
    monkeypatch.setattr(revising, "TOGETHER", 2)
    monkeypatch.setattr(service_module.Service, "OUTAGE", 0.0)
    prompts = [Prompt(f"p{i}", f"topic {i}" + (" cut" if i == 0 else "")) for i in range(5)]
    service.script = [None] * 13 + [(503, b"")] * 1000
    with pytest.raises(UserError, match="Nothing is lost"):
        revise(tmp_path / "c.jsonl", endpoint_writer(service, concurrency=1), prompts, TWO, 1)
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 4
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"id": "torn')
    service.script, service.bodies = [], []
    found = revise(tmp_path / "c.jsonl", endpoint_writer(service), prompts, TWO, 1)
    assert len(service.bodies) == 2 and [c.id for c in found] == [p.id for p in prompts]  # the fifth's answer was there
    again = revise(tmp_path / "other.jsonl", endpoint_writer(service), prompts, TWO, 1)
    assert again == found and len(service.bodies) == 2
    plain = revise(tmp_path / "plain.jsonl", endpoint_writer(service), prompts, TWO, 0)
    assert "cut by the length limit" in plain[0].dropped and not plain[1].dropped
    with pytest.raises(UserError, match="another prompt 'p1'"):
        revise(tmp_path / "c.jsonl", endpoint_writer(service), [Prompt("p1", "another topic")], TWO, 1)
    with pytest.raises(UserError, match="another writer"):
        revise(tmp_path / "c.jsonl", EndpointWriter(Endpoint("Writer", service.url, "big"), 0.5, 150), prompts, TWO, 1)
    with pytest.raises(UserError, match="another shots"):
        revise(tmp_path / "c.jsonl", endpoint_writer(service), prompts, TWO, 1, shots=[{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="another constitution"):
        revise(tmp_path / "c.jsonl", endpoint_writer(service), prompts, constitution(), 1)
    with pytest.raises(UserError, match="another revisions"):
        revise(tmp_path / "c.jsonl", endpoint_writer(service), prompts, TWO, 2)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('Sure! Here is the revised response:\n\n"Do not."', "Do not."),
        ("Here's a kinder version: Do not.", "Do not."),
        ("Sure, the train leaves at 12:30.", "Sure, the train leaves at 12:30."),
        ("This is important: call 911.", "This is important: call 911."),
        ("Newton's laws are: inertia, force.", "Newton's laws are: inertia, force."),
        ("Revised answer: Do not.", "Do not."),
        ("Do this: wait.", "Do this: wait."),
        ('"Yes", she said, "no"', '"Yes", she said, "no"'),
    ],
)
def test_what_announces_a_revision_is_no_part_of_it(text, plain):
    assert unwrapped(text) == plain


def test_a_policy_writes_and_what_does_not_fit_is_told(tiny):
    chats = [Asked(f"{name} answer", [{"role": "user", "content": text}]) for name, text in (("a", "hi"), ("b", "x" * 200), ("c", "hi"))]
    writer = PolicyWriter(tiny, "tiny", 1.0, 8)
    a, b, c = writer.write(chats)
    assert "too long for a context of 128" in b.problem and not b.text
    assert writer.write(chats[2:]) == [c] and a.text != c.text  # the luck of a text is its own
    greedy = PolicyWriter(tiny, "tiny", 0.0, 8).write(chats[:1])[0]
    ids = tiny.tokenizer.encode_prompt(chats[0].chat)
    for _ in range(8):
        ids.append(int(tiny.model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in tiny.tokenizer.eos_ids:
            break
    assert greedy.text == tiny.tokenizer.decode(ids[len(tiny.tokenizer.encode_prompt(chats[0].chat)) :]).strip()


def test_the_command_that_revises(service, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Scripted(service)
    (tmp_path / "two.yaml").write_text(
        yaml.safe_dump(
            {"name": "two", "version": 1, "principles": [{"id": "a", "critique": "Find it.", "revision": "Mend it.", "comparison": "q?"}]}
        )
    )
    write_lines(tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": f"<b>topic</b> {i}"} for i in range(3)])
    write_lines(tmp_path / "h.jsonl", [{"id": f"h{i}", "prompt": f"help {i}"} for i in range(2)])
    words = [
        "constitution",
        "revise",
        "--prompts",
        "p.jsonl",
        "--helpful",
        "h.jsonl",
        "--writer",
        service.url,
        "--writer-model",
        "big",
        "--constitution",
        "two.yaml",
        "--out",
        "r",
    ]
    assert main(words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "after 0 revisions: toxic with" in told and "after 2 revisions" in told and "5 examples in r/examples.jsonl" in told
    rows = read_examples("r/examples.jsonl")
    assert [r.answer for r in rows] == [f"A answer about <b>topic</b> {i}" for i in range(3)] + [
        f"A damn damn answer about help {i}" for i in range(2)
    ]
    page = (tmp_path / "r/chains.html").read_text()
    assert "3 of 3" in page and "&lt;b&gt;topic" in page and "<b>topic" not in page and "http" not in page.replace("http://www.w3.org", "")
    asked = service.questions
    assert main(words) == 0 and service.questions == asked
    assert main([*words[:-1], "."]) == 2 and "is no folder of" in capsys.readouterr().err
    assert main([*words, "--revisions", "-1"]) == 2 and "--revisions is -1" in capsys.readouterr().err
    assert main([*words[:-1], "twice", "--helpful", "p.jsonl"]) == 0
    assert [r.id for r in read_examples("twice/examples.jsonl")] == ["p0", "p1", "p2", "helpful-p0", "helpful-p1", "helpful-p2"]
    for option, value, said_ in (
        ("--timeout", "0", "--timeout is 0"),
        ("--budget", "0", "--budget is 0"),
        ("--temperature", "nan", "--temperature is nan"),
    ):
        assert main([*words, option, value]) == 2 and said_ in capsys.readouterr().err
