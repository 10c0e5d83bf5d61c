"""Rewards over HTTP, against a real server that behaves badly."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from accord import progress
from accord import service as service_module
from accord.errors import Interrupted, UserError
from accord.reward.remote import RemoteSource
from accord.reward.sources import build_reward
from accord.rl.settings import RLSettings
from accord.rl.trainer import train
from accord.rollout.engine import Engine
from accord.rollout.sampling import Sampling
from accord.runs import Run


class Service:
    """Scores a completion by its length. ``script``: what the next requests with completions get instead, in their order."""

    def __init__(self):
        self.script, self.requests, self.asked, self.headers = [], 0, [], {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.headers = dict(self.headers)
                answer = {"scores": [len(c) / 10 for c in question["completions"]]}
                what = None
                if question["completions"]:
                    service.requests += 1
                    service.asked += zip(question["prompts"], question["completions"], strict=True)
                    what = service.script.pop(0) if service.script else None
                self.answer(what, answer)

            def answer(self, what, answer):
                status, headers, body = 200, {}, json.dumps(answer).encode()
                if isinstance(what, tuple):
                    (status, headers), body = what, b""
                elif what == "half":
                    self.wfile.write(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\nzz")
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                elif isinstance(what, int):
                    status, body = what, b"come back later\nor not"
                elif isinstance(what, dict):
                    status, headers, body = 503, what, b""
                elif isinstance(what, bytes):
                    body = what
                elif what == "hang":
                    time.sleep(2)
                elif what == "drop":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(service_module.Service, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(service_module.Service, "LONGEST_WAIT", 0.1)
    service = Service()
    yield service
    service.close()


@pytest.fixture
def rollout(tiny, prompts):
    return Engine(tiny).sample(prompts, 2, Sampling(max_new_tokens=8))


def lengths(rollout):
    return [len(text) / 10 for text in rollout.texts]


@pytest.mark.parametrize(
    "trouble",
    [[503], [429, 500, 502], ["drop"], ["half"], [{"Retry-After": "0.05"}], [{"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}], [503] * 5],
)
def test_what_passes_is_tried_again(service, rollout, trouble):
    service.script = list(trouble)
    source = RemoteSource(service.url)
    assert source.score(rollout) == lengths(rollout) and not source.rejects
    assert service.requests == 1 + len(trouble)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (400, "answered 400: come back later"),
        (404, "answered 404"),
        (b"<html>", "not JSON"),
        (b'{"score": 1}', "no list of scores"),
        (b'{"scores": [1]}', r"1 .*16"),
        (b"[" * 100_000, "not JSON"),
        (b'{"scores": "abcdefghijklmnop"}', "no list of scores"),
    ],
)
def test_what_does_not_pass_costs_its_completions_and_is_told(service, rollout, answer, cause):
    import re

    service.script = [answer]
    source = RemoteSource(service.url)
    assert source.score(rollout) == [None] * 16 and len(source.rejects) == 16
    assert re.search(cause, source.rejects[0].cause), source.rejects[0].cause
    assert service.requests == 1
    assert source.score(rollout) == lengths(rollout)  # nothing wrong was kept


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(service, rollout, status, monkeypatch):
    """It would take the token, and the texts, to whoever it names."""
    monkeypatch.setenv("ACCORD_REWARD_TOKEN", "secret")
    other = Service()
    try:
        source = RemoteSource(service.url)
        service.script = [(status, {"Location": other.url})]
        assert source.score(rollout) == [None] * 16 and f"answered {status}" in source.rejects[0].cause
        assert other.requests == 0 and not other.headers
    finally:
        other.close()


def test_the_same_text_twice_in_a_rollout_is_asked_once(service, rollout):
    twice = rollout.select(torch.tensor([0, 1, 0, 2, 1]))
    assert RemoteSource(service.url).score(twice) == lengths(twice) and len(service.asked) == 3


@pytest.mark.parametrize("url", ["http://[::1/score", "http://a..b/", "http://h/\u00fc", "http://h:port/"])
def test_what_is_no_url_is_a_sentence(url):
    with pytest.raises(UserError, match="is no URL"):
        RemoteSource(url)


def test_a_token_that_is_none_is_a_sentence_without_it(service, monkeypatch):
    monkeypatch.setenv("ACCORD_REWARD_TOKEN", "secret\r")
    with pytest.raises(UserError, match="ACCORD_REWARD_TOKEN") as caught:
        RemoteSource(service.url)
    assert "secret" not in str(caught.value)


def test_one_odd_score_costs_one_completion(service, rollout):
    values = [*lengths(rollout)[:14], None]
    service.script = [json.dumps({"scores": [*values, "good"]}).encode(), json.dumps({"scores": [float("nan")]}).encode()]
    source = RemoteSource(service.url)
    assert source.score(rollout) == [*values, None] and [r.row for r in source.rejects] == [15]
    assert source.score(rollout) == [*values, None] and "nan" in source.rejects[0].cause  # asked again, about that one alone
    assert [len(service.asked), service.requests] == [17, 2]


def test_a_hang_ends(service, rollout):
    service.script = ["hang"]
    assert RemoteSource(service.url, timeout=0.3).score(rollout) == lengths(rollout)


def test_answers_are_kept_over_processes_and_by_service(service, rollout):
    assert RemoteSource(service.url).score(rollout) == lengths(rollout)
    again = RemoteSource(service.url)
    assert again.score(rollout) == lengths(rollout) and again.asked == 0 and service.requests == 1
    other = RemoteSource(service.url + "?judge=2")
    other.score(rollout)
    assert service.requests == 2


def test_an_outage_is_waited_for_and_rejects_nothing(service, rollout, monkeypatch, capsys):
    """Three requests fail with all their attempts; then the service is left alone, and asked once after each rest."""
    monkeypatch.setattr(service_module.Service, "REST", 0.3)
    service.script = [503] * (3 * service_module.Service.ATTEMPTS + 2)
    source, clock = RemoteSource(service.url), time.monotonic()
    assert source.score(rollout) == lengths(rollout) and not source.rejects
    assert service.requests == 3 * service_module.Service.ATTEMPTS + 3 and time.monotonic() - clock > 3 * 0.3
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("is down") == 1 and "answered 503" in out and "answers again" in out


def test_an_outage_that_does_not_end_is_a_sentence(service, rollout, monkeypatch):
    monkeypatch.setattr(service_module.Service, "OUTAGE", 0.5)
    monkeypatch.setattr(service_module.Service, "REST", 0.2)
    service.script = [503] * 10**3
    with pytest.raises(UserError, match=r"answered 503.*Nothing is lost"):
        RemoteSource(service.url).score(rollout)


def test_a_wrong_address_is_told_before_anything_starts(service, tiny):
    with pytest.raises(UserError, match=r"cannot be reached.*scores"):
        build_reward("http://127.0.0.1:1/score", tiny)
    with pytest.raises(UserError, match="names no host"):
        build_reward("http:///x", tiny)


def test_a_token_is_sent_and_not_written(service, rollout, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCORD_REWARD_TOKEN", "secret-token")
    RemoteSource(service.url).score(rollout)
    assert service.headers["Authorization"] == "Bearer secret-token"
    assert not any(b"secret-token" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_cache_that_cannot_be_written_is_said_once(service, rollout, tmp_path, capsys):
    (tmp_path / "cache").write_text("")
    source = RemoteSource(service.url)
    assert source.score(rollout) == lengths(rollout)
    assert capsys.readouterr().out.count("cannot be kept") == 1


def test_a_damaged_cache_is_said_and_not_believed(service, rollout, tmp_path, capsys):
    RemoteSource(service.url).score(rollout)
    for path in (tmp_path / "cache").glob("rewards.sqlite*"):
        path.write_bytes(b"not a database " * 1000)
    assert RemoteSource(service.url).score(rollout) == lengths(rollout)
    assert "cannot be kept" in capsys.readouterr().out


def test_a_stop_does_not_wait_for_a_service(service, rollout, monkeypatch):
    monkeypatch.setattr(service_module.Service, "FIRST_WAIT", 60.0)
    monkeypatch.setattr(service_module.Service, "LONGEST_WAIT", 60.0)
    source = RemoteSource(service.url)
    service.script = [{"Retry-After": "60"}]
    threading.Timer(0.3, lambda: setattr(progress._Stop, "requested", True)).start()
    try:
        clock = time.monotonic()
        with pytest.raises(Interrupted):
            source.score(rollout)
        assert time.monotonic() - clock < 30
    finally:
        progress._Stop.requested = False


def test_a_resumed_run_pays_nothing_twice(service, tiny, prompts, tmp_path, monkeypatch):
    """The service goes down in the third step; what it has answered by then is not asked again."""
    monkeypatch.setattr(service_module.Service, "OUTAGE", 0.0)
    settings = RLSettings(
        top_layers=2, prompts_per_step=4, completions_per_prompt=8, max_new_tokens=6, max_steps=4, checkpoint_every=10, dtype="float32"
    )
    run = Run.create(tmp_path / "r", {"command": "rl"})
    service.script = [None] * 5 + [503] * 10**3
    with pytest.raises(UserError, match=r"503.*Nothing is lost"):
        train(tiny, prompts, build_reward(service.url, tiny), settings, run)
    service.script, before = [], len(service.asked)
    assert run.saved.newest().step == 2  # what was learned before it went down is kept
    train(tiny, prompts, build_reward(service.url, tiny), settings, run)
    answered = service.asked[: 5 * 16] + service.asked[before:]
    assert len(set(answered)) == len(answered) and [m["step"] for m in run.read("metrics.jsonl")] == [-1, 0, 1, 2, 3]
