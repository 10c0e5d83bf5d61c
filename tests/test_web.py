"""The labeling server over HTTP: who may do what, what is refused, and that nothing a model writes can do anything."""

import json
import os
import re
import threading

import pytest

pytest.importorskip("fastapi")

import httpx

from accord.data.records import Completion, Prompt
from accord.errors import UserError
from accord.feedback.agreement import agreement
from accord.feedback.store import Label, QueueSettings, Store
from accord.feedback.web.render import markdown
from accord.feedback.web.security import BODY, UPLOAD, Limiter
from accord.feedback.web.serve import address, listen, serving
from accord.feedback.web.server import make_app
from accord.feedback.web.site import WebSettings

PASSWORD = "four small words here"
EXAMPLES = int(os.environ.get("ACCORD_EXAMPLES", "20"))  # requests of each kind that schemathesis makes up
NOBODY, LABELER, REVIEWER, OWNER = None, "labeler", "reviewer", "owner"
ORDER = [NOBODY, LABELER, REVIEWER, OWNER]
# The least that a route asks for. A new route must be put here, or the test below fails.
ROUTES = {
    ("GET", "/login"): NOBODY, ("POST", "/login"): NOBODY, ("POST", "/logout"): LABELER, ("GET", "/invite/{token}"): NOBODY,
    ("POST", "/invite/{token}"): NOBODY, ("GET", "/"): LABELER, ("GET", "/label"): LABELER, ("GET", "/instructions"): LABELER,
    ("POST", "/api/next"): LABELER, ("GET", "/api/items/{number}"): LABELER, ("PUT", "/api/items/{number}/draft"): LABELER,
    ("POST", "/api/items/{number}/label"): LABELER, ("GET", "/api/history"): LABELER, ("GET", "/overview"): REVIEWER,
    ("GET", "/overview/disputed"): REVIEWER, ("POST", "/overview/decide"): REVIEWER, ("GET", "/export/{name}.jsonl"): REVIEWER,
    ("POST", "/retrain"): OWNER, ("POST", "/people/invite"): OWNER, ("POST", "/people/{number}/active"): OWNER,
    ("POST", "/people/revoke"): OWNER, ("POST", "/people/{number}/password"): OWNER, ("POST", "/criterion"): OWNER, ("POST", "/import"): OWNER,
}  # fmt: skip


def completions(count, k=3, text="{letter} {i}"):
    return {
        f"p{i}": [Completion(Prompt(f"p{i}", f"say {i}", "t"), text.format(letter="abcdefghi"[j], i=i), True, j) for j in range(k)]
        for i in range(count)
    }


class Served:
    """A server that runs, and browsers without a screen."""

    def __init__(self, store, at):
        self.store, self.at = store, at
        self.cookie = f"accord_session_{store.id[:8]}"

    def client(self, name=None, password=PASSWORD):
        client = httpx.Client(base_url=self.at, headers={"Origin": self.at}, timeout=30)
        if name:
            assert client.post("/login", data={"name": name, "password": password}).status_code == 303
            client.headers["X-CSRF-Token"] = re.search('name="csrf" content="([^"]+)"', client.get("/label").text)[1]
        return client


@pytest.fixture
def serve(tmp_path):
    running, stores = [], []

    def serve(settings=None, items=5, url=None, retraining=None, **queue):
        store = Store.open(url or tmp_path / "labels.db", QueueSettings(**{"gold_share": 0.0, "repeat_share": 0.0, "overlap": 9, **queue}))
        stores.append(store)
        store.add_items(completions(items))
        store.set_criterion("Be *good*.")
        for role in (LABELER, REVIEWER, OWNER):
            store.people.add(f"some {role}", role, PASSWORD)
        settings = settings(store) if callable(settings) else settings or WebSettings()
        listening = listen("127.0.0.1", 0)
        running.append(serving(store, settings, listening, retraining(store) if retraining else None))
        running[-1].__enter__()
        return Served(store, address(listening))

    yield serve
    for one in running:
        one.__exit__(None, None, None)
    for store in stores:
        store.close()


def answer(item, **more):
    return {"request": f"request-{item['id']}", "ranks": [1, 2, "F"], **more}


def test_every_route_for_every_role(serve):
    served = serve(WebSettings(attempts=100))
    store = served.store
    app = make_app(store)
    assert {(method.upper(), path) for path, known in app.openapi()["paths"].items() for method in known} == set(ROUTES)
    victim = store.people.add("victim", "labeler", PASSWORD)
    theirs = store.next(victim)
    wrong, clients = [], {}
    for (method, path), least in ROUTES.items():
        for role in ORDER:
            in_or_out = path in ("/login", "/logout", "/invite/{token}")
            client = served.client(role and f"some {role}") if in_or_out or role not in clients else clients[role]
            if not in_or_out:
                clients[role] = client
            who = role and store.people.get(f"some {role}")
            own = store.next(who).id if role else theirs.id
            url = path.format(token=store.people.invite("labeler"), number=own if "items" in path else victim.id, name="rankings")
            body = {
                "/login": {"data": {"name": "x", "password": "y"}}, "/invite/{token}": {"data": {"name": f"n{role}", "password": PASSWORD}},
                "/api/items/{number}/draft": {"json": {"note": "n"}}, "/api/items/{number}/label": {"json": {"request": "r" * 9, "ranks": [1, 1, 1]}},
                "/overview/disputed": {"params": {"prompt": "p0"}}, "/overview/decide": {"data": {"prompt": "p0"}}, "/people/invite": {"data": {"role": "labeler"}},
                "/people/{number}/active": {"data": {"active": "true"}}, "/people/revoke": {"data": {"invitation": store.people.invitations()[0].digest}}, "/criterion": {"data": {"text": "Be better."}},
                "/import": {"files": {"file": ("f.jsonl", b'{"id":"q","prompt":"p","completion":"a"}\n{"id":"q","prompt":"p","completion":"b"}\n')}},
            }.get(path, {})  # fmt: skip
            response = client.request(method, url, **body)
            refused = response.status_code == 401 or (
                response.status_code == 303 and response.headers["location"] == "/login" and (role is None or path != "/logout")
            )
            refused |= response.status_code == 403 and path != "/login"
            if ORDER.index(role) < ORDER.index(least) and not refused:
                wrong.append((method, path, role, response.status_code))
            if path == "/retrain" and response.status_code == 404:  # this server trains nothing
                continue
            if ORDER.index(role) >= ORDER.index(least) and (refused or (response.status_code >= 400 and path != "/login")):
                wrong.append((method, path, role, response.status_code, response.text[:300]))
    assert not wrong
    for role in (LABELER, REVIEWER, OWNER):  # not even the owner works on what is somebody else's
        client = served.client(f"some {role}")
        for method, path, body in (("GET", "", None), ("PUT", "/draft", {"note": "mine"}), ("POST", "/label", answer({"id": 1}))):
            assert client.request(method, f"/api/items/{theirs.id}{path}", json=body).status_code == 400
    assert store.assignment(victim, theirs.id).draft is None and store.assignment(victim, theirs.id).label is None


def test_a_labeler_sees_no_more_than_they_need(serve):
    served = serve(gold_share=0.0)
    served.store.add_items({"g": completions(1)["p0"]}, "gold", {"g": [1, 2, None]})
    given = served.client("some labeler").post("/api/next").json()["item"]
    assert set(given) == {
        "id",
        "state",
        "decision",
        "calibration",
        "prompt",
        "completions",
        "draft",
        "label",
        "answers",
    }  # no prompt id, kind, order, known ranks
    assert all(set(c) == {"text", "html"} for c in given["completions"])


def test_what_is_submitted_is_of_the_completions_as_they_were_imported(serve):
    served = serve()
    client = served.client("some labeler")
    for number in range(5):
        item = client.post("/api/next").json()["item"]
        shown = [c["text"] for c in item["completions"]]
        ranks = {text: rank for text, rank in zip(shown, (2, "F", 1), strict=True)}
        said = {"ratings": [7, None, 1], "flags": [[], ["toxic", "toxic"], ["false"]], "note": f"note {number}", "seconds": 3.5}
        answered = client.post(f"/api/items/{item['id']}/label", json=answer(item, ranks=[2, "F", 1], **said)).json()
        assert (
            answered["new"]
            and answered["gold"] is None
            and answered["work"] == {"today": number + 1, "done": number + 1, "left": 4 - number}
        )
        assert not client.post(f"/api/items/{item['id']}/label", json=answer(item, ranks=[1, 1, 1])).json()["new"]  # the same request
        again = client.get(f"/api/items/{item['id']}").json()["item"]
        assert [c["text"] for c in again["completions"]] == shown
        assert again["label"] == {"ranks": [2, "F", 1], "ratings": [7, None, 1], "flags": [[], ["toxic"], ["false"]], "note": f"note {number}", "reason": ""}  # fmt: skip
        prompt = item["prompt"][0]["text"].replace("say ", "p")
        stored = next(r for r in served.store.rankings() if r.prompt_id == prompt)
        texts = [c.text for c in served.store.completions()[prompt]]
        assert {text: "F" if rank is None else rank for text, rank in zip(texts, stored.ranks, strict=True)} == ranks
    assert client.post("/api/next").json()["item"] is None
    assert len(client.get("/api/history").json()["items"]) == 5
    orders = {tuple(served.store.assignment(served.store.people.get("some labeler"), k).order) for k in range(1, 6)}
    assert len(orders) > 1


def test_a_page_of_another_store_changes_nothing_here(serve):
    served = serve()
    client = served.client("some labeler")
    item = client.post("/api/next", headers={"X-Accord-Store": served.store.id}).json()["item"]
    refused = client.post(f"/api/items/{item['id']}/label", json=answer(item), headers={"X-Accord-Store": "0" * 32})
    assert refused.status_code == 409 and list(served.store.rankings()) == []


def test_a_draft_that_was_overtaken_is_not_kept(serve):
    served = serve()
    client = served.client("some labeler")
    item = client.post("/api/next").json()["item"]
    path = f"/api/items/{item['id']}"
    assert item["answers"] == 0 and client.put(f"{path}/draft", json={"note": "new", "at": 2.0, "answers": 0}).json() == {"kept": True}
    assert client.put(f"{path}/draft", json={"note": "old", "at": 1.0, "answers": 0}).json() == {"kept": False}
    assert client.get(path).json()["item"]["draft"]["note"] == "new"
    client.post(f"{path}/label", json=answer(item))
    assert client.put(f"{path}/draft", json={"note": "late", "at": 3.0, "answers": 0}).json() == {"kept": False}
    again = client.get(path).json()["item"]
    assert again["draft"] is None and again["answers"] == 1
    assert client.put(f"{path}/draft", json={"note": "edit", "at": 4.0, "answers": 1}).json() == {"kept": True}


def test_calibration_shows_the_known_ranks_and_gold_does_not(serve):
    served = serve(items=1, gold_share=0.5)
    served.store.add_items(
        {"c": [Completion(Prompt("c", "calibrate"), t, True, k) for k, t in enumerate("xyz")]}, "calibration", {"c": [1, None, 2]}
    )
    served.store.add_items({"g": [Completion(Prompt("g", "known"), t, True, k) for k, t in enumerate("xyz")]}, "gold", {"g": [1, None, 2]})
    client = served.client("some labeler")
    item = client.post("/api/next").json()["item"]
    assert item["calibration"] and item["prompt"][0]["text"] == "calibrate"
    assert "gold" not in client.get(f"/api/items/{item['id']}").text  # not before the answer
    told = client.post(f"/api/items/{item['id']}/label", json=answer(item)).json()["gold"]
    assert dict(zip([c["text"] for c in item["completions"]], told, strict=True)) == {"x": 1, "y": "F", "z": 2}
    for _ in range(2):
        item = client.post("/api/next").json()["item"]
        if item is None:
            break
        assert not item["calibration"] and client.post(f"/api/items/{item['id']}/label", json=answer(item)).json()["gold"] is None


def test_changes_need_the_token_and_our_own_pages(serve):
    served = serve()
    client = served.client("some labeler")
    token = client.headers.pop("X-CSRF-Token")
    assert client.post("/api/next").status_code == 403
    assert client.post("/api/next", headers={"X-CSRF-Token": token[::-1]}).status_code == 403
    other = served.client("some owner").headers["X-CSRF-Token"]
    assert client.post("/api/next", headers={"X-CSRF-Token": other}).status_code == 403
    assert client.post("/logout").status_code == 403 and client.post("/logout", data={"csrf": "x"}).status_code == 403
    for origin in ("http://[evil", "http://evil.example", "null", "", served.at + "0", served.at.replace("http://", "http://evil@")):
        good = {"X-CSRF-Token": token, "Origin": origin}
        assert client.post("/api/next", headers=good).status_code == 403, origin
        assert (
            httpx.post(served.at + "/login", data={"name": "some owner", "password": PASSWORD}, headers={"Origin": origin}).status_code
            == 403
        )
    assert client.post("/api/next", headers={"X-CSRF-Token": token}).status_code == 200
    assert client.post("/logout", data={"csrf": token}).status_code == 303
    assert client.get("/api/history").status_code == 401


def test_a_login_is_a_new_session_and_ends_the_one_before(serve):
    served = serve()
    store = served.store
    planted = store.people.log_in(store.people.get("some labeler"))  # somebody else's session, put into the victim's browser
    client = served.client()
    client.cookies.set(served.cookie, planted)
    response = client.post("/login", data={"name": "some owner", "password": PASSWORD})
    given = response.cookies[served.cookie]
    assert given != planted and store.people.session(planted) is None and store.people.session(given).person.role == OWNER
    assert "HttpOnly" in response.headers["set-cookie"] and "SameSite=lax" in response.headers["set-cookie"]
    client = served.client("some reviewer")
    token = client.cookies[served.cookie]
    client.post("/logout", data={"csrf": client.headers["X-CSRF-Token"]})
    assert store.people.session(token) is None
    raw = store.database.engine.raw_connection()
    assert given not in str(raw.cursor().execute("select * from sessions").fetchall())  # its hash only
    raw.close()
    client = served.client("some labeler")
    store.people.set_active(store.people.get("some labeler").id, False, store.people.get("some owner"))
    assert client.get("/api/history").status_code == 401
    assert served.client().post("/login", data={"name": "some labeler", "password": PASSWORD}).status_code == 403


def test_guessing_passwords_ends_soon(serve):
    served = serve(WebSettings(attempts=3))
    client = served.client()
    codes = [client.post("/login", data={"name": "some owner", "password": f"guess {k}"}).status_code for k in range(5)]
    assert codes == [403, 403, 403, 429, 429]
    right = client.post("/login", data={"name": "some owner", "password": PASSWORD})
    assert right.status_code == 429 and int(right.headers["retry-after"]) > 0
    codes = [client.post("/login", data={"name": f"name {k}", "password": "guess"}).status_code for k in range(12)]
    assert codes[:9] == [403] * 9 and codes[9:] == [429] * 3  # four times as many from one address, whatever the name


def test_a_name_is_the_same_with_blanks_and_who_is_right_does_not_use_up_the_address(serve):
    served = serve(WebSettings(attempts=3))
    login = lambda name, password: served.client().post("/login", data={"name": name, "password": password}).status_code
    assert [login("some labeler", PASSWORD) for _ in range(14)] == [303] * 14
    assert [login(" " * k + "some owner", "guess") for k in range(5)] == [403] * 3 + [429] * 2


def test_many_guesses_at_once_are_not_more(serve):
    served = serve(WebSettings(attempts=3))
    codes = []
    guess = lambda: codes.append(served.client().post("/login", data={"name": "some owner", "password": "guess"}).status_code)
    threads = [threading.Thread(target=guess) for _ in range(12)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert codes.count(403) <= 3 and len(codes) == 12


def test_the_limiter_counts_by_hand():
    now = [0.0]
    limiter = Limiter(2, 10.0, names=2, clock=lambda: now[0])
    assert limiter.take("a") == 0
    now[0] = 4.0
    assert limiter.take("a") == 0 and limiter.take("a") == 6.0 and limiter.take("b") == 0
    now[0] = 10.0
    assert limiter.take("a") == 0 and limiter.take("a") == 4.0  # the first is ten seconds old
    limiter.give_back("a")
    assert limiter.take("a") == 0 and limiter.take("a") == 4.0
    limiter.forget("a")
    assert limiter.take("a") == 0
    limiter.take("b"), limiter.take("c")
    assert limiter.take("a") == 0 and limiter.take("a") == 0  # forgotten: two names are kept


def test_too_many_requests(serve):
    served = serve(WebSettings(requests=20))
    codes = [served.client().get("/login").status_code for _ in range(25)]
    assert codes == [200] * 20 + [429] * 5


def test_an_invitation_is_for_one_and_for_a_week(serve):
    served = serve(WebSettings(attempts=100))
    owner = served.client("some owner")
    page = owner.post("/people/invite", data={"role": "reviewer", "csrf": owner.headers["X-CSRF-Token"]}).text
    link = re.search(r'href="(http[^"]+/invite/[^"]+)"', page)[1]
    assert link.startswith(served.at)
    assert owner.post("/people/invite", data={"role": "king", "csrf": owner.headers["X-CSRF-Token"]}).status_code == 400
    guest = served.client()
    assert "reviewer" in guest.get(link).text
    short = guest.post(link, data={"name": "Rae", "password": "short"})
    assert short.status_code == 400 and "10 to 1000 characters" in short.text and 'value="Rae"' in short.text
    assert guest.post(link, data={"name": "some owner", "password": PASSWORD}).status_code == 400  # a name that is taken
    assert guest.post(link, data={"name": "Rae", "password": PASSWORD, "role": "owner"}).status_code == 303
    assert served.store.people.get("Rae").role == "reviewer" and guest.get("/overview").status_code == 200
    assert served.client().post(link, data={"name": "Sam", "password": PASSWORD}).status_code == 404
    assert served.client().get("/invite/guessed").status_code == 404
    old = served.store.people.invite("owner")
    served.store.database.clock = lambda: 10**10
    assert served.store.people.invited(old) is None


def test_alone_on_this_machine_nobody_logs_in_and_no_foreign_name_points_here(serve):
    served = serve(lambda store: WebSettings(alone=store.people.get("some owner")))
    client = httpx.Client(base_url=served.at, follow_redirects=True)
    assert "Rank the answers" in client.get("/").text
    rebound = httpx.get(served.at + "/label", headers={"Host": "evil.example"})
    assert rebound.status_code == 421 and "evil.example" in rebound.json()["error"]


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "![x](http://evil.example/x.png)", "<svg/onload=alert(1)>",
    "[x](data:text/html;base64,PHNjcmlwdD4=)", "<a href='JaVaScRiPt:alert(1)'>x</a>", "`</code><script>alert(1)</script>`", "<iframe src=//evil.example></iframe>",
    "[x](<javascript:alert(1)>)", "<https://evil.example/\"onmouseover=alert(1)>", "```\n</pre><script>alert(1)</script>\n```", "<style>*{display:none}</style>",
    "<form action=//evil.example><input name=password></form>", "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>", "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;//evil.example>", "&#60;script&#62;alert(1)&#60;/script&#62;", "| a |\n|---|\n| <b onclick=alert(1)>x</b> |", "[a]: javascript:alert(1)\n\n[a]",
]  # fmt: skip
ALLOWED = {("a", "href"), ("a", "rel"), ("a", "target"), ("ol", "start")}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_writes_does_anything(text):
    from html.parser import HTMLParser

    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "img", "svg", "iframe", "style", "form", "input", "math", "base", "meta", "object", "b"), text
            found.extend((tag, name) for name, _ in attributes)
            for name, value in attributes:
                if name == "href":
                    assert value.startswith(("http://", "https://", "mailto:")), value

    Reader().feed(markdown(text))
    assert set(found) <= ALLOWED


def test_markdown_is_shown():
    shown = markdown("**b** *i* ~~s~~ `c`\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[l](https://e.example)\nnext")
    for part in (
        "<strong>b</strong>",
        "<em>i</em>",
        "<s>s</s>",
        "<code>c</code>",
        "<li>one</li>",
        "<td>2</td>",
        'href="https://e.example"',
        "noopener",
        "<br>",
    ):
        assert part in shown, (part, shown)


def test_prompt_ids_and_notes_are_text_on_the_owners_pages(serve):
    served = serve(items=1, overlap=3)
    evil = '"><script>alert(1)</script>'
    served.store.add_items({evil: [Completion(Prompt(evil, evil), t, True, k) for k, t in enumerate((evil, "b"))]}, priority={evil: 1.0})
    for name, ranks in (("some labeler", (1, 2)), ("some reviewer", (2, 1))):
        person = served.store.people.get(name)
        given = served.store.next(person)
        served.store.submit(person, given.id, Label(ranks=ranks, note=evil), f"{name}-request".replace(" ", "-"))
    client = served.client("some owner")
    for page in (client.get("/overview"), client.get("/overview/disputed", params={"prompt": evil})):
        assert page.status_code == 200 and "<script>alert" not in page.text and "script&gt;" in page.text
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert not re.search(
        r"<script(?! type=\"module\" src=\"/static/)|style=|\son\w+=\"", client.get("/label").text
    )  # the policy would not let it run


def test_every_answer_has_the_headers(serve):
    served = serve()
    for url in ("/login", "/static/label.js", "/nothing", "/api/history", "/invite/x"):
        headers = httpx.get(served.at + url).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY" and "server" not in headers, url
        assert headers["content-security-policy"].startswith("default-src 'none'"), url
    assert httpx.get(served.at + "/api/history").headers["cache-control"] == "no-store"
    for url in ("/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/..%5cserver.py"):
        assert httpx.get(served.at + url).status_code == 404, url


def test_behind_https_the_cookie_stays_there(serve):
    served = serve(WebSettings(https=True))
    response = httpx.post(served.at + "/login", data={"name": "some owner", "password": PASSWORD}, headers={"Origin": served.at})
    assert response.headers["set-cookie"].startswith("__Host-accord_session_") and "Secure" in response.headers["set-cookie"]
    assert "max-age" in response.headers["strict-transport-security"]


def upload(client, name, content):
    return client.post("/import", files={"file": (name, content)}, data={"csrf": client.headers["X-CSRF-Token"]})


def test_imports(serve, tmp_path):
    served = serve()
    client = served.client("some owner")
    row = lambda k: json.dumps({"id": "new", "prompt": "q", "completion": f"c{k}", "index": k}) + "\n"
    before = set(tmp_path.rglob("*"))
    assert "1 prompts to rank, 1 of them new" in upload(client, "../../../../tmp/escaped.jsonl", row(0) + row(1)).text
    assert [c.text for c in served.store.completions()["new"]] == ["c0", "c1"]
    csv = 'id,prompt,completion,index\ncsv,"a, b\n""c""",007,1\ncsv,"a, b\n""c""",1e3,0\n'
    assert upload(client, "x.CSV", csv).status_code == 200
    group = served.store.completions()["csv"]
    assert [c.text for c in group] == ["1e3", "007"] and group[0].prompt.content == 'a, b\n"c"'  # texts stay as they are written
    for name, content, told in (
        ("x.exe", "x", "ends in"), ("x.jsonl", "{", "not valid"), ("x.jsonl", '{"prompt": 1}', "completion"), ("x.parquet", b"PAR1", ""), ("x.csv", "id,prompt\n1,2,3\n", "more cells"),
        ("x.jsonl", row(0), "1 completions"), ("x.jsonl", b"\xff\xfe", ""), ("", "x", ""), ("/etc/passwd", "x", "ends in"),
    ):  # fmt: skip
        response = upload(client, name, content)
        assert response.status_code in (400, 422) and told in response.text, (name, response.text)
    assert set(tmp_path.rglob("*")) <= before | {tmp_path / "labels.db-wal", tmp_path / "labels.db-shm"}


def test_what_is_too_large_is_refused_also_without_a_length(serve):
    served = serve()
    client = served.client("some owner")
    item = client.post("/api/next").json()["item"]
    path = f"/api/items/{item['id']}/draft"

    def body():
        yield b'{"note": "'
        for _ in range(BODY // 2**16 + 1):
            yield b"x" * 2**16
        yield b'"}'

    assert client.put(path, content=b"x" * (BODY + 1)).status_code == 413
    assert client.put(path, content=body(), headers={"Content-Type": "application/json"}).status_code == 413
    assert client.put(path, json={"note": "x" * 10_001}).status_code == 422
    assert client.put(path, json={"note": "\x00"}).status_code == 400 and client.put(path, content=b'{"note": "\\ud800"}').status_code in (
        400,
        422,
    )

    def file():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
        for _ in range(UPLOAD // 2**20 + 1):
            yield b"x" * 2**20

    response = client.post("/import", content=file(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {"request": "r" * 8, "ranks": [1, 2]}, {"request": "r" * 8, "ranks": [1, 2, 4]}, {"request": "r" * 8, "ranks": [1, 2, 0]}, {"request": "r" * 8, "ranks": [1, 2, "G"]},
        {"request": "r" * 8, "ranks": [1, 2, 1.5]}, {"request": "r" * 8, "ranks": [1, 2, True]}, {"request": "r" * 8, "ranks": [1, 2, None]}, {"request": "r" * 8},
        {"request": "short", "ranks": [1, 2, 3]}, {"request": "r' --!xx", "ranks": [1, 2, 3]}, {"ranks": [1, 2, 3]}, {"request": "r" * 8, "ranks": [1, 2, 3], "reason": "both"},
        {"request": "r" * 8, "ranks": [1, 2, 3], "ratings": [8, None, None]}, {"request": "r" * 8, "ranks": [1, 2, 3], "ratings": [1]}, {"request": "r" * 8, "ranks": [1, 2, 3], "extra": 1},
        {"request": "r" * 8, "ranks": [1, 2, 3], "flags": [["evil"], [], []]}, {"request": "r" * 8, "ranks": [1, 2, 3], "seconds": -1}, {"request": "r" * 8, "ranks": [1, 2, 3], "note": "\x00"},
        {"request": "r" * 8, "ranks": [1, 2, 3], "note": "\ud800"}, [], None, "x",
    ],
)  # fmt: skip
def test_answers_that_are_none(serve, body):
    served = serve()
    client = served.client("some labeler")
    item = client.post("/api/next").json()["item"]
    response = client.post(f"/api/items/{item['id']}/label", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422) and response.json()["error"]
    assert list(served.store.rankings()) == [] and served.store.progress()["skipped"] == 0


def test_exports_are_streams_of_what_is_there_and_a_decision_stands_for_all(serve):
    served = serve(items=3, overlap=2)
    store = served.store
    for name, ranks in (("some labeler", (1, 2, None)), ("some owner", (2, 1, None))):
        person = store.people.get(name)
        while given := store.next(person):
            store.submit(person, given.id, Label(ranks=ranks), f"{person.id}-{given.id}-request")
    client = served.client("some reviewer")
    rows = lambda name: [json.loads(line) for line in client.get(f"/export/{name}.jsonl").text.splitlines()]
    assert len(rows("rankings")) == 6 and {tuple(r["ranks"]) for r in rows("rankings")} == {(1, 2, "F"), (2, 1, "F")}
    assert [(r["id"], r["index"], r["completion"]) for r in rows("completions")][:2] == [("p0", 0, "a 0"), ("p0", 1, "b 0")]
    assert len([r for r in rows("pairs") if r["id"] == "p1"]) == 4  # a over b, b over a, both over c
    page = client.post("/overview/decide", data={"prompt": "p1", "csrf": client.headers["X-CSRF-Token"]})
    item = client.get(f"/api/items/{re.search('item=([0-9]+)', page.headers['location'])[1]}").json()["item"]
    ranks = [{"a": 1, "b": 2, "c": 3}[c["text"][0]] for c in item["completions"]]
    assert client.post(f"/api/items/{item['id']}/label", json=answer(item, ranks=ranks)).json()["new"]
    pairs = [(r["chosen"][0], r["rejected"][0]) for r in rows("pairs") if r["id"] == "p1"]
    assert sorted(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [r.get("decision", False) for r in rows("rankings") if r["prompt_id"] == "p1"] == [False, False, True]
    assert len(rows("rankings")) == 7 and len(rows("groups")) == 3
    assert sum(r["rankings"] == {store.criterion()[0]: 1} for r in rows("groups")) == 1
    assert {r["completion"]: r["label"] for r in rows("unpaired") if r["id"] == "p1"} == {"a 1": True, "c 1": False}
    assert "decided" in client.get("/overview").text and {e["what"] for e in rows("events")} >= {"submitted", "opened", "opened to decide"}
    assert client.get("/export/secrets.jsonl").status_code == 404


def test_a_new_criterion_leaves_labels_what_they_were(serve):
    served = serve(items=2)
    labeler, owner = served.client("some labeler"), served.client("some owner")
    first = served.store.criterion()[0]
    item = labeler.post("/api/next").json()["item"]
    labeler.post(f"/api/items/{item['id']}/label", json=answer(item))
    assert owner.post("/criterion", data={"text": "Be better.\r\n", "csrf": owner.headers["X-CSRF-Token"]}).status_code == 303
    assert "Be better." in labeler.get("/instructions").text
    item = labeler.post("/api/next").json()["item"]
    labeler.post(f"/api/items/{item['id']}/label", json=answer(item))
    assert [r.criterion for r in served.store.rankings()] == [first, served.store.criterion()[0]] and first != served.store.criterion()[0]
    assert served.store.criterion()[1] == "Be better.\n"


def test_no_request_that_the_interface_describes_breaks_the_server(serve, url):
    """schemathesis makes requests from the description, right and wrong ones; none ends in a 5xx."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    served = serve(WebSettings(attempts=10**6, requests=10**6), url=url)
    client = served.client("some owner")
    seen = []

    def hold_for(operation):
        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        def hold(case):
            headers = {"Origin": served.at, "X-CSRF-Token": client.headers["X-CSRF-Token"]}
            if operation.path == "/logout":
                headers.pop("X-CSRF-Token")
            response = case.call(
                base_url=served.at, headers=headers, cookies={served.cookie: client.cookies[served.cookie]}, allow_redirects=False
            )
            seen.append((operation.path, response.status_code))
            assert response.status_code < 500, (operation.method, operation.path, case.body, response.text[:500])

        hold()

    for operation in schemathesis.openapi.from_dict(make_app(served.store).openapi()).get_all_operations():
        hold_for(operation.ok())
    assert {path for path, _ in seen} == {path for _, path in ROUTES}
    assert {200, 303, 400, 403, 404, 422} <= {status for _, status in seen}  # it came further than the door
    assert client.get("/overview").status_code == 200  # and what it left behind can be shown


def test_a_reward_model_from_the_labels_so_far(serve, tmp_path, tiny_folder):
    from accord.feedback.web.retraining import Retraining

    trained = []

    def with_retraining(store):
        options = ("--top-layers", "1", "--epochs", "1", "--heldout", "0.3")
        trained.append(Retraining(store, tmp_path / "rewards", str(tiny_folder), options))
        return trained[0]

    served = serve(items=30, retraining=with_retraining)
    owner = served.client("some owner")
    press = lambda: owner.post("/retrain", data={"csrf": owner.headers["X-CSRF-Token"]})
    early = press()
    assert early.status_code == 400 and "Nobody has ranked anything" in early.text and not trained[0].running
    luck = iter([(1, 2, 3), (3, 1, 2), (2, 2, 1)] * 20)
    for name in ("some labeler", "some reviewer"):
        person = served.store.people.get(name)
        while given := served.store.next(person):
            served.store.submit(person, given.id, Label(ranks=next(luck)), f"{person.id}-{given.id}-request")
    assert press().status_code == 303 and trained[0].running
    assert press().status_code == 303  # one at a time
    assert "One is being trained" in owner.get("/overview").text
    while trained[0].running:
        served.client().get("/login")
    (row,) = trained[0].history()
    assert (
        row["error"] is None and row["rankings"] == 60 and row["prompts"] == 30 and 0 <= row["accuracy"]["low"] <= row["accuracy"]["value"]
    )
    assert row["ceiling"]["value"] == agreement(list(served.store.rankings())).without_ties.value
    assert f"{row['accuracy']['value']:.2f}" in owner.get("/overview").text and (tmp_path / "rewards/1/reward/config.json").exists()
    trained[0]._model = "no-such-model"
    press()
    while trained[0].running:
        served.client().get("/login")
    assert trained[0].history()[1]["error"].startswith("accord: ") and "no-such-model" in owner.get("/overview").text


def test_of_the_links_that_a_start_prints_the_last_one_counts(serve):
    people = serve().store.people
    first, last, invited = people.invite("owner"), people.invite("owner"), people.invite("owner", people.get("some owner"))
    assert people.invited(first) is None and people.invited(last).role == "owner" and people.invited(invited).role == "owner"


def test_an_invitation_is_ended_and_a_forgotten_password_replaced(serve):
    served = serve(WebSettings(attempts=100))
    owner, people = served.client("some owner"), served.store.people
    post = lambda path, **data: owner.post(path, data={**data, "csrf": owner.headers["X-CSRF-Token"]})
    link_in = lambda page: re.search(r'href="(http[^"]+/invite/[^"]+)"', page.text)[1]
    link = link_in(post("/people/invite", role="reviewer"))
    page = owner.get("/overview").text
    assert "somebody new, as reviewer" in page and link.rsplit("/", 1)[1] not in page  # the token itself is told once
    digest = re.search('name="invitation" value="([0-9a-f]{64})"', page)[1]
    assert post("/people/revoke", invitation=digest).status_code == 303 and served.client().get(link).status_code == 404
    assert post("/people/revoke", invitation=digest).status_code == 400 and "somebody new" not in owner.get("/overview").text

    labeler = served.client("some labeler")
    first, link = (link_in(post(f"/people/{people.get('some labeler').id}/password")) for _ in range(2))
    assert "some labeler, a new password" in owner.get("/overview").text
    assert served.client().get(first).status_code == 404  # the last one counts
    guest = served.client()
    assert "<b>some labeler</b>" in guest.get(link).text
    assert guest.post(link, data={"password": "short"}).status_code == 400
    assert (
        guest.post(link, data={"name": "some owner", "password": "another four small words"}).status_code == 303
    )  # the name is not theirs to say
    assert guest.get("/label").status_code == 200 and guest.get("/overview").status_code == 403
    assert labeler.get("/label").status_code == 303  # logged out
    assert served.client().post("/login", data={"name": "some labeler", "password": PASSWORD}).status_code == 403
    assert served.client("some labeler", "another four small words") and served.client("some owner")
    assert served.client().post(link, data={"password": PASSWORD}).status_code == 404
    waiting = people.new_password(people.get("some labeler").id)
    people.set_active(people.get("some labeler").id, False, people.get("some owner"))
    assert people.invited(waiting) is None
    # Who is shut out has made no links any more, and was not let in by a password that was replaced while it was looked at.
    mallory, alice = people.add("mallory", "owner", PASSWORD), people.get("some owner")
    links = [people.new_password(alice.id, mallory), people.invite("owner", mallory)]
    kept = people.invite("labeler", alice)
    found = people._verified("mallory", PASSWORD)
    people._verified = lambda *_: found
    assert people.enter("mallory", PASSWORD)
    people.set_active(mallory.id, False, alice)
    assert [people.invited(link) for link in links] == [None, None] and people.invited(kept)
    assert people.enter("mallory", PASSWORD) is None
    people.set_active(mallory.id, True, alice)
    people.accept(people.new_password(mallory.id), "", "another four small words")
    assert people.enter("mallory", PASSWORD) is None
    for number in (people.everyone()[0]["id"], 999):
        with pytest.raises(UserError, match="could log in"):
            people.new_password(number)


def test_an_upload_error_names_the_file_of_the_browser(serve):
    served = serve()
    response = upload(served.client("some owner"), "mine.csv", "id,prompt\n1,2\n")
    assert response.status_code == 400 and "mine.csv:2 has no text field" in response.text and "/tmp" not in response.text


def test_a_skip_keeps_what_was_said_besides(serve):
    served = serve()
    client = served.client("some labeler")
    item = client.post("/api/next").json()["item"]
    said = {"reason": "broken", "ratings": [1, None, 7], "flags": [[], ["leaks"], []], "note": "see"}
    client.post(f"/api/items/{item['id']}/label", json={"request": "request-1", **said}).raise_for_status()
    assert client.get(f"/api/items/{item['id']}").json()["item"]["label"] == {"ranks": [], **said}
    assert served.store.progress()["skipped"] == 1 and list(served.store.rankings()) == []
