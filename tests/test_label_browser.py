"""People label in a real browser against the real server: nothing is lost or doubled, whatever happens to tabs and networks."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from accord.feedback.store import Store

pytestmark = pytest.mark.browser
PASSWORD = "four small words here"
ITEMS = 12
ANSWERS = ("A **bold** answer to {i}.", "Another answer to {i}, at greater length than the first, and with more words.", "no idea", "{i} {i} {i} <script>document.title='owned'</script>")  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        launched = play.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield launched
        launched.close()


class Server:
    """``accord label`` as its own process."""

    def __init__(self, folder, *options, port=0):
        self.folder, self.options = folder, options
        self.start(port)

    def start(self, port=0):
        command = [sys.executable, "-m", "accord", "label", "--store", "labels.db", "--port", str(port), *self.options]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        self.owner = None
        for line in self.process.stdout:
            if line.startswith("Become the owner: "):
                self.owner = line.split(": ")[1].strip()
            if line.startswith("Rank at "):
                self.at = line.split()[2]
                self.port = int(self.at.rsplit(":", 1)[1])
                return
        raise AssertionError("the server did not start")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(20) == 0


@pytest.fixture
def server(tmp_path):
    rows = [
        {"id": f"p{i}", "theme": "t", "prompt": [{"role": "user", "content": f"Question {i}?"}], "index": k, "completion": text.format(i=i)}
        for i in range(ITEMS)
        for k, text in enumerate(ANSWERS)
    ]
    (tmp_path / "sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = []

    def server(*options):
        started.append(Server(tmp_path, "--completions", "sampled.jsonl", "--gold-share", "0", "--repeat-share", "0", *options))
        return started[-1]

    yield server
    for one in started:
        if one.process.poll() is None:
            one.kill()


def new_page(browser, problems, **more):
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **more).new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" and "ERR_" not in m.text else None)
    page.on("request", lambda r: problems.append(r.url) if not re.match(r"http://(127\.0\.0\.1|localhost)[:/]", r.url) else None)
    return page


def accessible(page, where):
    """No serious fault that axe finds."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    bad = [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]
    assert not bad, (where, bad)


class Labeler:
    """Somebody with a keyboard. Remembers what they said, by the texts that they saw."""

    def __init__(self, page):
        self.page, self.said = page, {}

    def item(self):
        self.page.wait_for_selector("#work:not([hidden]) .answer")
        return self.page.locator("#prompt .text").first.inner_text().strip()

    def texts(self):
        self.page.keyboard.press("m")  # as they are written
        texts = self.page.locator("#completions .text").all_inner_texts()
        self.page.keyboard.press("m")
        return [text.strip() for text in texts]

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def remember(self, keys):
        prompt = self.item()
        self.said[prompt] = dict(zip(self.texts(), keys, strict=True))
        return prompt

    def rank(self, *keys):
        """Rank every answer in the order in which they stand, and submit."""
        prompt = self.remember(keys)
        self.press(*keys, "Enter")
        self.page.wait_for_function("text => document.querySelector('#empty').hidden === false || document.querySelector('#prompt .text')?.innerText.trim() !== text", arg=prompt)  # fmt: skip
        return prompt


def stored(folder):
    """What the store has: {labeler: {prompt: {text: rank}}}, and the rankings themselves."""
    store = Store.open(folder / "labels.db")
    texts = {key: [c.text for c in group] for key, group in store.completions().items()}
    rankings, progress = list(store.rankings()), store.progress()
    store.close()
    out = {}
    for r in rankings:
        told = {text: "F" if rank is None else str(rank) for text, rank in zip(texts[r.prompt_id], r.ranks, strict=True)}
        out.setdefault(r.labeler, {})[f"Question {r.prompt_id[1:]}?"] = told
    return out, rankings, progress


KEYS = [("1", "2", "3", "F"), ("2", "1", "1", "F"), ("1", "1", "2", "3"), ("4", "3", "2", "1"), ("F", "1", "F", "2")]


def test_three_people_label_twelve_items(browser, server, tmp_path):
    served = server("--accounts", "--overlap", "3")
    problems = []
    owner = new_page(browser, problems)
    owner.goto(served.owner)
    accessible(owner, "invitation")
    owner.fill("[name=name]", "Olga")
    owner.fill("[name=password]", PASSWORD)
    owner.press("[name=password]", "Enter")
    owner.wait_for_url("**/label")
    people = {}
    for name in ("Ann", "Bob", "Chen"):
        owner.goto(f"{served.at}/overview")
        owner.select_option("select[name=role]", "labeler")
        owner.click("text=Make a link")
        link = owner.locator(".banner a").get_attribute("href")
        page = new_page(browser, problems)
        page.goto(link)
        page.fill("[name=name]", name)
        page.fill("[name=password]", PASSWORD)
        page.press("[name=password]", "Enter")
        people[name] = Labeler(page)
    ann, bob, chen = people.values()

    # Ann: ties, F, undo and redo, a rating, a flag, a note, a skip, an earlier answer changed, all by keys.
    ann.item()
    accessible(ann.page, "label")
    assert ann.page.title() == "Rank · accord" and ann.page.locator("#completions script").count() == 0
    first = ann.remember(("1", "2", "2", "F"))
    ann.press("1", "2", "3", "z", "2", "F")  # the third rank is taken back and given anew
    assert ann.page.locator(".badge").all_inner_texts() == ["Rank 1", "Rank 2", "Rank 2", "F"]
    ann.press("z", "y", "r", "6", "x", "2", "d")
    accessible(ann.page, "differences")
    assert ann.page.locator("#differ-text ins").count() and ann.page.locator("#differ-text del").count()
    ann.press("Escape", "?")
    accessible(ann.page, "keys")
    ann.press("Escape", "n")
    ann.page.keyboard.type("1 2 f: digits in a note rank nothing")
    ann.press("Escape", "Backspace", "z", "Enter")  # undo leaves the note
    second = ann.item()
    assert second != first
    ann.press("s")
    accessible(ann.page, "skip")
    ann.press("2")  # a reason
    ann.page.wait_for_function("text => document.querySelector('#prompt .text').innerText.trim() !== text", arg=second)
    third = ann.rank(*KEYS[1])
    ann.press("z")  # back to the one before
    ann.page.wait_for_selector("#mode:not([hidden])")
    assert ann.item() == third and ann.page.locator(".badge").all_inner_texts() == ["Rank 2", "Rank 1", "Rank 1", "F"]
    ann.rank(*KEYS[3])
    ann.press("e")
    ann.page.wait_for_selector("#earlier-dialog[open] button b")
    accessible(ann.page, "earlier")
    assert ann.page.locator("#earlier-list button").count() == 3
    ann.press("Escape")
    ann.press("e")
    ann.page.click("#earlier-list button:last-child")  # one of these, and then another
    ann.page.wait_for_selector("#mode:not([hidden])")
    ann.press("e")
    ann.page.wait_for_selector("#earlier-dialog[open] button b")
    ann.page.click("#earlier-list button:first-child")
    ann.page.wait_for_function("text => document.querySelector('#prompt .text').innerText.trim() === text", arg=third)
    assert ann.page.locator("#mode").is_visible()
    ann.press("Backspace", "e")  # a change that is thought better of
    ann.page.wait_for_selector("#earlier-dialog[open] button b")
    ann.press("Escape")
    ann.page.wait_for_selector("#mode", state="hidden")
    while len(ann.said) < ITEMS - 1:
        ann.rank(*KEYS[len(ann.said) % 5])
    ann.page.wait_for_selector("#empty:not([hidden])")

    # Bob loses the network while he submits; what he said waits in his browser, also over a reload.
    for k in range(5):
        bob.rank(*KEYS[k])
    lost = bob.remember(KEYS[2])
    bob.page.context.set_offline(True)
    bob.press(*KEYS[2], "Enter")
    bob.page.wait_for_selector("#banner:not([hidden])")
    assert "1 answer is kept in this browser" in bob.page.locator("#banner").inner_text()
    assert lost not in stored(tmp_path)[0]["Bob"]
    bob.page.context.set_offline(False)
    bob.page.wait_for_selector("#work:not([hidden])")
    assert bob.page.locator("#banner").is_hidden() and stored(tmp_path)[0]["Bob"][lost] == bob.said[lost]
    # The server dies as he submits, and comes back.
    lost = bob.remember(KEYS[3])
    served.kill()
    bob.press(*KEYS[3], "Enter")
    bob.page.wait_for_selector("#banner:not([hidden])")
    bob.page.close()
    served.start(served.port)
    bob.page = bob.page.context.new_page()
    bob.page.goto(f"{served.at}/label")
    assert bob.item() != lost and stored(tmp_path)[0]["Bob"][lost] == bob.said[lost]
    while len(bob.said) < ITEMS:
        bob.rank(*KEYS[len(bob.said) % 5])

    # Chen closes the tab in the middle of an item and goes on where he was.
    chen.rank(*KEYS[0])
    half = chen.remember(("2", "3", "1", "F"))
    chen.press("2", "3")
    chen.page.close()
    chen.page = chen.page.context.new_page()
    chen.page.goto(f"{served.at}/label")
    assert chen.item() == half and chen.page.locator(".badge").all_inner_texts() == ["Rank 2", "Rank 3", "", ""]
    chen.press("1", "F", "Enter")  # he is where he was
    chen.page.wait_for_function("text => document.querySelector('#prompt .text').innerText.trim() !== text", arg=half)
    while len(chen.said) < ITEMS:
        chen.rank(*KEYS[len(chen.said) % 5])

    # All of it, once.
    found, rankings, progress = stored(tmp_path)
    for name, person in people.items():
        assert set(found[name]) == set(person.said)
        for prompt, told in person.said.items():
            assert found[name][prompt] == told, (name, prompt)
    assert len(rankings) == 3 * ITEMS - 1 and progress == {"items": ITEMS, "complete": ITEMS - 1, "rankings": 35, "skipped": 1}
    store = Store.open(tmp_path / "labels.db")
    label = next(a.label for a in store.history(store.people.get("Ann")) if a.prompt.text == first)
    assert label.note == "1 2 f: digits in a note rank nothing" and 6 in label.ratings and ("false",) in label.flags
    assert sum(a["seconds"] is not None for a in store.effort()) == 36
    changed = [e for e in store.log(limit=10_000) if e["what"] == "changed"]
    assert len(changed) == 1 and changed[0]["who"] == "Ann" and changed[0]["before"] != changed[0]["after"]
    store.close()

    # The owner sees agreement, and takes it out.
    owner.goto(f"{served.at}/overview")
    accessible(owner, "overview")
    text = owner.locator("main").inner_text()
    assert f"{ITEMS - 1} of {ITEMS}" in text and "Krippendorff" in text and all(name in text for name in people)
    owner.click("#disputed a >> nth=0")
    accessible(owner, "disputed")
    owner.goto(f"{served.at}/instructions")
    accessible(owner, "instructions")
    owner.goto(f"{served.at}/overview")
    with owner.expect_download() as download:
        owner.click("text=groups")
    groups = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert len(groups) == ITEMS and sum(sum(g["rankings"].values()) for g in groups) == 35

    # And decides what is disputed: then she is back among what is.
    owner.click("#disputed a >> nth=0")
    owner.click("text=Decide it")
    for key in ("1", "2", "3", "4", "Enter"):
        owner.wait_for_selector("#work:not([hidden])")
        owner.keyboard.press(key)
    owner.wait_for_url("**/overview#disputed")
    assert "decided" in owner.locator("#disputed").inner_text()
    # The list of one's own answers goes by arrows, too.
    owner.goto(f"{served.at}/label")
    owner.wait_for_selector("#empty:not([hidden]), #work:not([hidden])")
    for key in ("e", "ArrowDown", "Enter"):
        owner.keyboard.press(key)
        owner.wait_for_selector("#earlier-dialog[open]" if key != "Enter" else "#mode:not([hidden])")
    assert not problems
    served.stop()


def test_what_a_browser_kept_of_one_store_is_not_sent_to_another(browser, server, tmp_path):
    """Alone everybody is person 1 and items count from 1, at the same address."""
    served = server()
    page = new_page(browser, [])
    page.goto(served.at)
    labeler = Labeler(page)
    labeler.item()
    page.context.set_offline(True)
    labeler.press("1", "2", "3", "4", "Enter")
    page.wait_for_selector("#banner:not([hidden])")
    served.stop()
    (tmp_path / "labels.db").rename(tmp_path / "first.db")
    for rest in tmp_path.glob("labels.db-*"):
        rest.unlink()
    served.start(served.port)
    context = page.context
    page.close()
    context.set_offline(False)
    page = labeler.page = context.new_page()
    page.goto(f"{served.at}/label")
    labeler.item()
    assert page.locator(".badge").all_inner_texts() == ["", "", "", ""] and stored(tmp_path)[1] == []
    served.stop()
    page.close()
    (tmp_path / "labels.db").unlink()
    (tmp_path / "first.db").rename(tmp_path / "labels.db")
    served.start(served.port)
    page = context.new_page()
    page.goto(f"{served.at}/label")  # the first store again: now it is sent
    page.wait_for_function("() => document.querySelector('#counts').innerText.startsWith('1 today')")
    assert len(stored(tmp_path)[1]) == 1
    served.stop()


def test_an_answer_that_is_not_the_servers_acknowledges_nothing(browser, server, tmp_path):
    """A hotel's or a proxy's page, with status 200."""
    served = server()
    page = new_page(browser, [])
    page.goto(served.at)
    labeler = Labeler(page)
    labeler.item()
    page.route("**/api/**", lambda route: route.fulfill(status=200, body="<html>Please log in to our network</html>"))
    labeler.press("1", "2", "3", "4", "Enter")
    page.wait_for_selector("#banner:not([hidden])")
    assert "1 answer is kept" in page.locator("#banner").inner_text() and stored(tmp_path)[1] == []
    page.unroute("**/api/**")
    page.wait_for_function("() => document.querySelector('#counts').innerText.startsWith('1 today')")
    assert len(stored(tmp_path)[1]) == 1
    served.stop()


def test_a_reason_is_written_by_keys_alone(browser, server, tmp_path):
    """What is typed is the reason, and nothing of it reaches the next item."""
    served = server()
    page = new_page(browser, problems := [])
    page.goto(served.at)
    labeler = Labeler(page)
    first = labeler.item()
    labeler.press("s", "Enter")  # which chooses nothing
    page.keyboard.type(" I cannot judge 5 of these, d")
    labeler.press("Enter")
    page.wait_for_function("text => document.querySelector('#prompt .text').innerText.trim() !== text", arg=first)
    assert page.locator("dialog[open]").count() == 0 and page.locator("#skip-words").input_value() == ""
    labeler.press("e")
    page.wait_for_selector("#earlier-list button b")
    assert page.locator("#earlier-list b").all_inner_texts() == ["skipped: I cannot judge 5 of these, d"] and not problems
    served.stop()


def test_by_mouse_on_a_phone_and_in_the_dark(browser, server, tmp_path):
    served = server()
    problems = []
    page = new_page(browser, problems)
    page.goto(served.at)
    labeler = Labeler(page)
    labeler.item()
    texts = labeler.texts()
    page.drag_and_drop(".lane[data-rank=''] .chip >> text=B", ".lane[data-rank='1']")
    page.drag_and_drop(".lane[data-rank=''] .chip >> text=A", ".lane[data-rank='1']")
    page.click(".answer:nth-child(3) .ranks button:has-text('3')")
    assert page.locator("#submit").is_disabled()
    page.click(".answer:nth-child(4) .ranks .f")
    page.click(".answer:nth-child(4) .flag:has-text('leaks')")
    page.select_option(".answer:nth-child(4) select", "1")
    page.click("#submit")
    page.wait_for_function("() => document.querySelector('#counts').innerText.startsWith('1 today')")
    (ranking,) = stored(tmp_path)[0].values()
    assert list(ranking.values()) == [dict(zip(texts, ("1", "1", "3", "F"), strict=True))]
    phone = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True).new_page()
    phone.goto(served.at)
    phone.wait_for_selector(".answer")
    accessible(phone, "phone, dark")
    for url in ("/label", "/instructions", "/overview"):
        phone.goto(served.at + url)
        assert phone.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), url
        accessible(phone, f"phone, dark {url}")
    phone.goto(f"{served.at}/label")
    phone.wait_for_selector(".answer")
    for k in range(4):
        phone.tap(f".answer:nth-child({k + 1}) .ranks button:nth-child({k + 1})")
    phone.tap("#submit")
    phone.wait_for_function("() => document.querySelector('#counts').innerText.startsWith('2 today')")
    assert not problems
    served.stop()
