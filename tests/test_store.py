"""The label store, on SQLite and on PostgreSQL: nothing that was acknowledged is lost, nothing is there twice."""

import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from conftest import BINARIES
from sqlalchemy import select, text

from accord.data.pairs import opinions, rankings_by_prompt
from accord.data.records import Completion, Prompt, Ranking
from accord.data.sources import read_rankings
from accord.disk import write_lines
from accord.errors import UserError
from accord.feedback import statements
from accord.feedback.schema import assignments, metadata
from accord.feedback.store import Label, QueueSettings, Store


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def make(url):
    made = []

    def make(clock=None, **settings):
        made.append(Store.open(url, QueueSettings(**{"gold_share": 0.0, "repeat_share": 0.0, **settings}), clock or Clock()))
        return made[-1]

    yield make
    for store in made:
        store.close()


def completions(count, k=3, start=0):
    return {
        f"p{i}": [Completion(Prompt(f"p{i}", f"say {i}", "t"), f"{'abcdefghi'[j]} {i}", True, j) for j in range(k)]
        for i in range(start, start + count)
    }


def answer(*ranks):
    return Label(ranks=ranks or (1, 2, 2))


def work(store, person, label=None, limit=1000):
    """Everything this labeler is given, submitted; the prompts in their order."""
    done = []
    while len(done) < limit and (given := store.next(person)) is not None:
        store.submit(person, given.id, label or answer(), f"{person.name}/{given.id}")
        done.append(given.prompt.id)
    return done


def test_migrations_make_the_tables_of_the_schema(make):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with make().database.engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_overlap_and_what_comes_out(make):
    store = make(overlap=2)
    version = store.set_criterion("Be good.")
    assert store.add_items(completions(6)) == 6 and store.add_items(completions(8)) == 2
    people = [store.people.add(name, "labeler") for name in ("ann", "bob", "cy")]
    done = {p.name: work(store, p, limit=n) for p, n in zip(people, (5, 8, 8), strict=True)}
    assert Counter(x for some in done.values() for x in some) == {f"p{i}": 2 for i in range(8)}  # each by two, by nobody twice
    assert all(len(set(some)) == len(some) for some in done.values())
    assert done["ann"] != sorted(done["ann"])  # not as they were imported
    assert store.next(people[0]) is None
    got = list(store.rankings(chunk=3))
    assert len(got) == 16 and {r.labeler for r in got} == set(done) and {r.criterion for r in got} == {version}
    assert {r.ranks for r in got} == {(1, 2, 2)} and store.completions() == completions(8)
    assert store.progress() == {"items": 8, "complete": 8, "rankings": 16, "skipped": 0}


def test_priority_first(make):
    store = make()
    store.add_items(completions(9), priority={"p3": 2.0, "p5": 2.0, "p7": 1.0})
    done = work(store, store.people.add("ann", "labeler"))
    assert set(done[:2]) == {"p3", "p5"} and done[2] == "p7"


def test_the_order_of_completions_is_stable_and_differs_by_labeler(make):
    store = make(overlap=9)
    store.add_items(completions(20, k=9))
    people = [store.people.add(name, "labeler") for name in ("ann", "bob")]
    seen = {}
    for p in people:
        for _ in range(20):
            given = store.next(p)
            assert store.next(p) == given == store.assignment(p, given.id)  # asked again, it is the same
            seen[p.name, given.prompt.id] = given.order
            store.submit(p, given.id, answer(*range(1, 10)), f"{p.name}{given.id}")
    assert [p for who, p in seen if who == "ann"] != [p for who, p in seen if who == "bob"]  # everyone starts elsewhere
    assert all(sorted(order) == list(range(9)) for order in seen.values())
    assert len({seen["ann", f"p{i}"] for i in range(20)}) > 15
    assert sum(seen["ann", f"p{i}"] == seen["bob", f"p{i}"] for i in range(20)) < 3
    first = Counter(order[0] for order in seen.values())
    assert max(first.values()) < 15  # no completion is always shown first


def test_a_lease_ends_and_another_gets_the_item_and_nothing_is_lost(make):
    clock = Clock()
    store = make(clock, lease=60)
    store.add_items(completions(1))
    ann, bob = (store.people.add(name, "labeler") for name in ("ann", "bob"))
    given = store.next(ann)
    assert store.next(bob) is None
    clock.now += 50
    store.save_draft(ann, given.id, {"ranks": [1]})  # she is at it
    clock.now += 50
    assert store.next(bob) is None and store.next(ann).draft == {"ranks": [1]}
    clock.now += 61
    other = store.next(bob)
    assert other is not None and other.prompt.id == "p0"
    assert store.submit(ann, given.id, answer(), "late") and store.submit(bob, other.id, answer(), "b")
    assert len(list(store.rankings())) == 2


def test_what_another_has_done_meanwhile_is_not_asked_for_again(make):
    clock = Clock()
    store = make(clock, lease=60)
    store.add_items(completions(2))
    ann, bob = (store.people.add(name, "labeler") for name in ("ann", "bob"))
    late = store.next(ann)
    clock.now += 61
    done = work(store, bob)
    assert late.prompt.id in done and store.next(ann) is None
    assert store.submit(ann, late.id, answer(), "k")  # but is kept if she sends it all the same


def test_a_request_that_comes_twice_counts_once(make):
    store = make()
    store.add_items(completions(2))
    ann = store.people.add("ann", "labeler")
    given = store.next(ann)
    assert store.submit(ann, given.id, answer(), "key", seconds=5.0) is True
    assert store.submit(ann, given.id, answer(3, 2, 1), "key", seconds=5.0) is False
    assert [r.ranks for r in store.rankings()] == [(1, 2, 2)]
    again, bob = store.next(ann), store.people.add("bob", "labeler")
    assert store.submit(ann, again.id, answer(), "key")  # a name is an item's own
    assert len(list(store.rankings())) == 2 and store.next(bob) is None


def test_the_criterion_is_the_one_that_was_shown(make):
    clock = Clock()
    store = make(clock)
    first = store.set_criterion("one")
    store.add_items(completions(1))
    ann = store.people.add("ann", "labeler")
    given = store.next(ann)
    clock.now += 1
    store.set_criterion("two")
    store.submit(ann, given.id, answer(), "k")
    assert [r.criterion for r in store.rankings()] == [first]


def test_edits_at_once_keep_the_whole_history(make):
    """Each change's before is another one's after, and the time adds up."""
    store = make()
    store.add_items(completions(1))
    ann = store.people.add("ann", "labeler")
    given = store.next(ann)
    edit = lambda k: store.submit(ann, given.id, Label((1, 2, 3), note=str(k)), str(k), seconds=1.0)
    drafts = lambda k: store.save_draft(ann, given.id, {"k": k})
    threads = [threading.Thread(target=f, args=(k,)) for k in range(12) for f in (edit, drafts)]
    [t.start() for t in threads], [t.join() for t in threads]
    log = [e for e in store.log() if e["what"] in ("submitted", "changed")]
    assert len(log) == 12 and log[0]["before"] is None
    assert [e["before"]["note"] for e in log[1:]] == [e["after"]["note"] for e in log[:-1]]
    with store.database.engine.begin() as connection:
        row = connection.execute(select(assignments)).one()
    assert row.seconds == 12.0 and row.state == "done" and len(list(store.rankings())) == 1


def test_changes_and_skips_are_in_the_log_with_what_stood_before(make):
    clock = Clock()
    store = make(clock)
    first = store.set_criterion("one")
    store.add_items(completions(2))
    ann = store.people.add("ann", "labeler")
    a = store.next(ann)
    store.submit(ann, a.id, answer(), "1")
    clock.now += 1
    store.set_criterion("two")
    store.submit(ann, a.id, answer(None, 1, 1), "2")
    b = store.next(ann)
    store.submit(ann, b.id, Label(reason="unclear"), "3")
    assert [r.ranks for r in store.rankings()] == [(None, 1, 1)]
    assert [r.criterion for r in store.rankings()] == [first]  # a change does not move it to another version
    assert store.progress()["skipped"] == 1 and [h.state for h in store.history(ann)] == ["skipped", "done"]
    store.submit(ann, b.id, Label(reason="unclear"), "3")
    log = [(e["who"], e["what"], e["before"] and e["before"]["ranks"], e["after"]) for e in store.log() if e["assignment"]]
    assert [x[:3] for x in log] == [
        ("ann", "opened", None), ("ann", "submitted", None), ("ann", "changed", [1, 2, 2]), ("ann", "opened", None), ("ann", "skipped", None),
    ]  # fmt: skip
    assert log[2][3]["ranks"] == [None, 1, 1] and log[4][3]["reason"] == "unclear"
    # A skipped item goes to another.
    assert store.next(store.people.add("bob", "labeler")).prompt.id == b.prompt.id


def test_calibration_first_then_gold_and_repetitions_unseen(make):
    gold_prompts = {f"p{i}" for i in range(200, 230)}
    store = make(overlap=1, gold_share=0.2, repeat_share=0.2, repeat_after=5)
    store.add_items(completions(60))
    store.add_items(completions(3, start=100), "calibration", gold={f"p{i}": [1, 2, 3] for i in range(100, 103)})
    store.add_items(completions(30, start=200), "gold", gold={f"p{i}": [1, 1, None] for i in range(200, 230)})
    ann = store.people.add("ann", "labeler")
    kinds, prompts = [], []
    while (given := store.next(ann)) is not None:
        assert given.gold is None  # nothing tells an item whose answer is known
        kinds.append("calibration" if given.calibration else "gold" if given.prompt.id in gold_prompts else "real")
        prompts.append(given.prompt.id)
        store.submit(ann, given.id, answer(), "key")
        assert store.assignment(ann, given.id).gold == ((1, 2, 3) if given.calibration else None)
    assert kinds[:3] == ["calibration"] * 3 and kinds.count("calibration") == 3
    again = [i for i, p in enumerate(prompts) if p in prompts[:i]]
    assert 5 <= kinds.count("gold") <= 30 and 5 <= len(again) <= 30
    assert all(i - prompts.index(prompts[i]) > 5 for i in again) and max(Counter(prompts).values()) == 2
    assert len(list(store.rankings())) == 60 and len(list(store.rankings("gold"))) == kinds.count("gold")
    assert len(list(store.rankings(number=1))) == len(again)
    orders = {(h.prompt.id, h.order) for h in store.history(ann, 1000)}
    assert (
        sum(1 for i in again if len({o for p, o in orders if p == prompts[i]}) == 2) > len(again) / 4
    )  # mostly in another order: 5 of 6 by chance


def test_known_ranks_may_come_later_for_what_nobody_has_had(make):
    store = make(overlap=2)
    store.add_items(completions(3))
    ann = store.people.add("ann", "labeler")
    had = store.next(ann).prompt.id
    free = sorted({"p0", "p1", "p2"} - {had})
    assert store.add_items({free[0]: completions(3)[free[0]]}, "gold", {free[0]: [1, 2, 3]}) == 1
    assert store.known() == [(free[0], (1, 2, 3))] and set(store.completions()) == {had, free[1]}
    assert store.add_items(completions(3)) == 0 and store.known() == [(free[0], (1, 2, 3))]  # brought in again, it stays known
    for key, ranks, told in ((had, [1, 2, 3], "people have had it"), (free[0], [3, 2, 1], "it is a gold item, with other ranks")):
        with pytest.raises(UserError, match=f"'{key}' cannot become a gold item: {told}"):
            store.add_items({key: completions(3)[key]}, "gold", {key: ranks})


def test_only_ones_own(make):
    store = make(overlap=2)
    store.add_items(completions(1))
    ann, bob = (store.people.add(name, "labeler") for name in ("ann", "bob"))
    given = store.next(ann)
    for call in (
        lambda: store.assignment(bob, given.id),
        lambda: store.save_draft(bob, given.id, {}),
        lambda: store.submit(bob, given.id, answer(), "x"),
    ):
        with pytest.raises(UserError, match="given to 'bob'"):
            call()
    assert store.history(bob) == []


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (Label(ranks=(1, 2)), "2 ranks were given for 3 completions"),
        (Label(ranks=(1, 2, 4)), "Ranks go from 1 to 3"),
        (Label(ranks=(1, 2, True)), "Ranks go from 1 to 3"),
        (Label(ranks=(1, 2, 3), ratings=(8, 1, 1)), "Ratings go from 1 to 7"),
        (Label(ranks=(1, 2, 3), ratings=(7,)), "1 ratings were given"),
        (Label(ranks=(1, 2, 3), flags=((), ("toxik",), ())), "no flag 'toxik'.*Did you mean 'toxic'"),
        (Label(ranks=(1, 2, 3), reason="x"), "no ranks"),
    ],
)
def test_labels_that_are_wrong(label, message):
    with pytest.raises(UserError, match=message):
        label.check(3)


def test_what_no_database_holds_is_a_sentence(make):
    store = make()
    ann = store.people.add("ann", "labeler")
    store.add_items(completions(1))
    given = store.next(ann)
    texts = lambda key, text="x", theme="": {key: [Completion(Prompt(key, "q", theme), text, True, k) for k in range(2)]}
    for call in (
        lambda: store.submit(ann, given.id, answer(), "k" * 101),
        lambda: store.people.add("a\x00b", "labeler"),
        lambda: store.set_criterion("\ud800"),
        lambda: store.add_items(texts("i" * 501)),
        lambda: store.add_items(texts("i", "\ud800")),
        lambda: store.add_items(texts("i", theme="t" * 201)),
        lambda: store.submit(ann, 2**40, answer(), "k"),
    ):
        with pytest.raises(UserError):
            call()
    assert store.people.check_password("ann", "\ud800") is None and store.progress()["items"] == 1


def test_items_that_are_wrong(make):
    store = make()
    store.add_items(completions(2))
    with pytest.raises(UserError, match="'p0' has 1 completions"):
        store.add_items(completions(1, k=1))
    with pytest.raises(UserError, match="'p0' is in the store with another text"):
        store.add_items(completions(1, k=4))
    with pytest.raises(UserError, match="'p5': known ranks are what gold items need"):
        store.add_items(completions(1, start=5), "gold")
    with pytest.raises(UserError, match="'p5': known ranks are what real items lack"):
        store.add_items(completions(1, start=5), gold={"p5": [1, 2, 3]})
    assert store.progress()["items"] == 2


def test_people_and_passwords(make):
    store = make()
    store.people.add("ann", "owner", "a long password")
    store.people.add("bob", "labeler")
    assert store.people.check_password("ann", "a long password").role == "owner"
    assert (
        store.people.check_password("ann", "another")
        is None
        is store.people.check_password("bob", "")
        is store.people.check_password("nobody", "x")
    )
    with store.database.engine.begin() as connection:
        kept = connection.execute(text("select password from people where name = 'ann'")).scalar()
    assert kept.startswith("$argon2id$") and "long password" not in str(store.log())
    with pytest.raises(UserError, match="called 'ann' already"):
        store.people.add(" ann ", "labeler")
    with pytest.raises(UserError, match="Did you mean 'labeler'"):
        store.people.add("cy", "labeller")


def test_criteria_are_kept(make):
    clock = Clock()
    store = make(clock)
    one = store.set_criterion("one")
    clock.now += 1
    store.set_criterion("two")
    assert store.criterion()[1] == "two"
    clock.now += 1
    assert store.set_criterion("one") == one and store.criterion() == (one, "one")


def test_many_at_once(make):
    """Eight labelers at the same time, each submit sent twice at once: every item by two people, every label once."""
    store = make(overlap=2)
    store.add_items(completions(40))
    people = [store.people.add(f"l{i}", "labeler") for i in range(8)]
    failures, accepted = [], Counter()

    def labeler(person):
        try:
            while (given := store.next(person)) is not None:
                ranks = tuple(int(r) for r in np.random.default_rng(given.id).integers(1, 4, 3))
                results = []
                send = lambda given=given, ranks=ranks, results=results: results.append(
                    store.submit(person, given.id, Label(ranks), f"k{given.id}")
                )
                twice = [threading.Thread(target=send) for _ in range(2)]
                [t.start() for t in twice], [t.join() for t in twice]
                assert sorted(results) == [False, True], results
                accepted[given.prompt.id] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=labeler, args=(p,)) for p in people]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failures, failures
    assert accepted == {f"p{i}": 2 for i in range(40)}
    got = list(store.rankings())
    assert len(got) == 80 and len({(r.prompt_id, r.labeler) for r in got}) == 80
    with store.database.engine.begin() as connection:
        keys = connection.execute(select(assignments.c.id, assignments.c.label)).all()
    assert all(row.label["ranks"] == np.random.default_rng(row.id).integers(1, 4, 3).tolist() for row in keys)


def test_one_person_in_many_tabs_has_one_item_open(make):
    store = make()
    store.add_items(completions(20))
    ann = store.people.add("ann", "labeler")
    given = []
    tabs = [threading.Thread(target=lambda: given.append(store.next(ann).id)) for _ in range(8)]
    [t.start() for t in tabs], [t.join() for t in tabs]
    assert len(given) == 8 and len(set(given)) == 1


def test_the_log_waits_for_what_was_begun_before(make):
    """Whoever reads it page by page misses nothing that got its number early and was written late."""
    store = make()
    store.add_items(completions(2))
    ann, bob = (store.people.add(name, "labeler") for name in ("ann", "bob"))
    read = []
    with store.database.write(of=ann.id) as connection:
        store.database.note(connection, "first", ann.id)
        if store.database.engine.dialect.name == "postgresql":
            store.next(bob)  # others are not in the way of each other
        reader = threading.Thread(target=lambda: read.append([e["what"] for e in store.log()]))
        reader.start()
        reader.join(0.5)
        assert not read
    reader.join()
    assert "first" in read[0]


def test_what_was_acknowledged_survives_a_kill(make, url, tmp_path):
    """A process that submits is killed at any moment, five times; each label it was told of is there once."""
    store = make()
    store.add_items(completions(400))
    store.people.add("ann", "labeler")
    program = f"""
import sys
from accord.feedback.store import *
store = Store.open({url!r}, QueueSettings(gold_share=0, repeat_share=0))
ann = store.people.get("ann")
while (given := store.next(ann)) is not None:
    print("try", given.id, flush=True)
    if store.submit(ann, given.id, Label(ranks=(1, 2, 3)), f"k{{given.id}}"):
        print("kept", given.id, flush=True)
"""
    told = []
    for round_ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        for line in process.stdout:
            told.append(line.split())
            if len(told) >= 30 * (round_ + 1) + round_:
                break
        process.send_signal(signal.SIGKILL)
        told += [line.split() for line in process.stdout.read().splitlines()]
        process.wait()
    kept = {int(number) for what, number in told if what == "kept"}
    with store.database.engine.begin() as connection:
        rows = connection.execute(select(assignments.c.id).where(assignments.c.state == "done")).scalars().all()
        labels = connection.execute(text("select count(*) from events where kind = 'submitted'")).scalar()
    tried = {int(number) for what, number in told if what == "try"}
    assert kept <= set(rows) <= tried and len(rows) == labels and len(kept) > 50


def test_a_store_that_cannot_be_opened_is_a_sentence(tmp_path):
    (tmp_path / "x").write_text("no database")
    for where in (tmp_path / "x", tmp_path / "none" / "x.db", "postgresql://nobody@localhost:1/x", "nosuch://x"):
        with pytest.raises(UserError, match="cannot be opened"):
            Store.open(where)
    with pytest.raises(UserError) as told:
        Store.open("postgresql://me:S3cret@localhost:1/x")
    assert "S3cret" not in str(told.value)
    Store.open(tmp_path / "a?b=1.db").close()
    assert (tmp_path / "a?b=1.db").exists()


def test_a_backup_is_the_same_store_again(make, url, tmp_path):
    """Also from SQLite to PostgreSQL and back; and what comes after it is numbered anew."""
    from accord.feedback.backup import TABLES, back_up, restore

    store = make(overlap=2, repeat_share=0.3, repeat_after=2)
    store.set_criterion("Be good. \u00e9 \U0001f600")
    store.add_items(completions(7, 4))
    store.add_items(completions(1, 2, start=90), "gold", {"p90": (1, None)})
    ann = store.people.add("Ann", "owner", "four small words here")
    work(store, ann, Label(ranks=(1, 2, None, 2), ratings=(1, None, 7, 2), flags=(("toxic",), (), (), ()), note="n\n\u2028"), limit=5)
    store.save_draft(ann, store.next(ann).id, {"note": "half"})
    store.people.log_in(ann), store.people.invite("labeler")
    rows = back_up(store, tmp_path / "backup.zip")
    assert rows["items"] == 8 and rows["people"] == 1 and rows["assignments"] == 6

    def everything(some):
        with some.database.read() as connection:
            return {t.name: [tuple(row) for row in connection.execute(select(t).order_by(*t.primary_key))] for t in TABLES}

    copy = Store.open(tmp_path / "other.db", clock=Clock())
    copy.set_criterion("of a start that came to nothing"), copy.people.add("you", "owner"), copy.people.invite("owner")
    assert restore(tmp_path / "backup.zip", copy) == rows
    assert everything(copy) == everything(store) and copy.settings == store.settings
    assert copy.people.check_password("Ann", "four small words here").id == ann.id
    assert list(copy.rankings()) == list(store.rankings()) and copy.next(ann) == store.next(ann)
    with pytest.raises(UserError, match="has items in it already"):
        restore(tmp_path / "backup.zip", copy)
    copy.close()
    used = Store.open(tmp_path / "used.db", clock=Clock())
    used.people.add("Bob", "owner", "four small words here")
    with pytest.raises(UserError, match="has people in it already"):
        restore(tmp_path / "backup.zip", used)
    used.close()


def test_a_backup_goes_from_one_database_to_the_other(postgres, tmp_path):
    from accord.feedback.backup import back_up, restore

    first = Store.open(tmp_path / "labels.db", QueueSettings(overlap=3), Clock())
    first.add_items(completions(4))
    work(first, first.people.add("Ann", "labeler"))
    back_up(first, tmp_path / "one.zip")
    subprocess.run([BINARIES / "createdb", "-h", str(postgres), "-U", "accord", "moved"], check=True)
    second = Store.open(f"postgresql://accord@/moved?host={postgres}", clock=Clock())
    restore(tmp_path / "one.zip", second)
    assert second.progress() == first.progress() and second.settings.overlap == 3
    bob = second.people.add("Bob", "labeler")  # numbers go on after those that came
    assert bob.id == 2 and len(work(second, bob)) == 4
    back_up(second, tmp_path / "two.zip")
    third = Store.open(tmp_path / "third.db", clock=Clock())
    restore(tmp_path / "two.zip", third)
    assert list(third.rankings()) == list(second.rankings()) and len(list(third.rankings())) == 8
    for store in (first, second, third):
        store.close()


def test_a_damaged_backup_leaves_an_empty_store(tmp_path):
    import zipfile

    from accord.feedback.backup import back_up, restore

    store = Store.open(tmp_path / "labels.db", clock=Clock())
    store.add_items(completions(3))
    back_up(store, tmp_path / "good.zip")
    with pytest.raises(UserError, match="already exists"):
        back_up(store, tmp_path / "good.zip")
    store.close()
    whole = {n: zipfile.ZipFile(tmp_path / "good.zip").read(n) for n in zipfile.ZipFile(tmp_path / "good.zip").namelist()}
    changed = [
        {**whole, "items.jsonl": whole["items.jsonl"].replace(b"say 1", b"say 7")}, {**whole, "items.jsonl": whole["items.jsonl"].splitlines(True)[0]},
        {n: d for n, d in whole.items() if n != "items.jsonl"}, {n: d for n, d in whole.items() if n != "manifest.json"}, {**whole, "manifest.json": b"[]"},
        {**whole, "manifest.json": whole["manifest.json"].replace(b'"revision": "0', b'"revision": "9')}, {**whole, "items.jsonl": b"{}\n"},
    ]  # fmt: skip
    for number, files in enumerate(changed):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    (tmp_path / "x.zip").write_bytes((tmp_path / "good.zip").read_bytes()[:-40])
    for bad in [*(f"{n}.zip" for n in range(len(changed))), "x.zip", "labels.db"]:
        fresh = Store.open(tmp_path / f"{bad}.fresh.db", clock=Clock())
        with pytest.raises(UserError, match=bad):
            restore(tmp_path / bad, fresh)
        assert fresh.completions() == {} and fresh.people.everyone() == []
        fresh.close()


def test_what_models_write_is_kept_as_it_is(make):
    store = make()
    texts = ["a\x00b", "", "\u2028\x85\x7f", "\U0001f600" * 3]
    store.add_items({"p": [Completion(Prompt("p", "say\x00"), text, True, k) for k, text in enumerate(texts)]})
    ann = store.people.add("ann", "labeler")
    assert sorted(store.next(ann).completions) == sorted(texts) and [c.text for c in store.completions()["p"]] == texts


def test_uncertain_prompts_come_first(make, tiny):
    """By hand: one model that is sure, one that is undecided, two that contradict each other."""
    import math

    import torch

    from accord.feedback.priority import uncertainty

    class Fixed:
        def __init__(self, scores):
            self.scores = scores

        def encode(self, completions):
            return [c.text for c in completions]

        def logits(self, texts):
            return torch.tensor([self.scores[t] for t in texts])

    given = {k: [Completion(Prompt(k, k), f"{k}{j}", True, j) for j in range(2)] for k in ("sure", "undecided", "contrary")}
    one = Fixed({"sure0": 4.0, "sure1": 1.0, "undecided0": 0.1, "undecided1": 0.0, "contrary0": 3.0, "contrary1": 0.0})
    two = Fixed({**one.scores, "contrary0": -3.0})
    h = lambda p: -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    sigma = lambda d: 1 / (1 + math.exp(-d))
    found = uncertainty(given, [one, two])
    assert found == pytest.approx({"sure": h(sigma(3)), "undecided": h(sigma(0.1)), "contrary": 1.0}, abs=1e-5)
    assert uncertainty(given, [one])["contrary"] == pytest.approx(h(sigma(3)), abs=1e-5)
    store = make()
    store.add_items(given)
    store.set_priority(found)
    assert work(store, store.people.add("ann", "labeler"), answer(1, 2)) == ["contrary", "undecided", "sure"]


def test_a_reward_model_says_what_it_is_unsure_of(tiny):
    from accord.feedback.priority import uncertainty
    from accord.reward.model import RewardModel

    given, reward = completions(40, 3), RewardModel.on(tiny, 1)
    found = uncertainty(given, [reward])
    for key in ("p0", "p39"):  # in chunks, and one by one
        raw = reward.logits(reward.encode(given[key])).tolist()
        p = [1 / (1 + np.exp(-(raw[i] - raw[j]))) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found[key] == pytest.approx(np.mean([-x * np.log2(x) - (1 - x) * np.log2(1 - x) for x in p]), abs=1e-4)


def test_a_decision_stands_for_all_in_what_is_trained_on(make):
    clock = Clock()
    store = make(clock, overlap=2)
    store.add_items(completions(2, 2))
    for name in ("ann", "bob"):
        work(store, store.people.add(name, "labeler"), answer(1, 2))
    rae, sam = store.people.add("rae", "reviewer"), store.people.add("sam", "reviewer")
    before = list(store.rankings())
    settled = lambda: [r for mine in rankings_by_prompt(store.rankings()).values() for r in mine]
    assert sorted(settled(), key=str) == sorted(before, key=str) and len(before) == 4
    given = store.rule(rae, "p1")
    assert store.rule(rae, "p1").id == given.id and list(store.rankings()) == before  # opened only
    assert given.decision and (offered := store.next(rae)) is None, offered  # it waits where it was begun
    store.submit(rae, given.id, answer(2, 1), "decision-1")
    clock.now += 1
    store.submit(sam, store.rule(sam, "p1").id, answer(1, 1), "decision-2")
    assert sorted((r.prompt_id, r.labeler, r.ranks) for r in settled()) == [
        ("p0", "ann", (1, 2)), ("p0", "bob", (1, 2)), ("p1", "sam", (1, 1))
    ]  # fmt: skip
    clock.now += 1
    store.submit(rae, given.id, answer(2, 1), "decision-3")  # who opened it first decides it last
    assert [r.labeler for r in settled() if r.prompt_id == "p1"] == ["rae"]
    assert opinions(store.rankings()) == before  # raw rankings are as they were
    parts = list(store.by_prompt(chunk=1))
    assert [list(some.completions) for some in parts] == [["p0"], ["p1"]] and [r.decision for r in parts[1].rankings] == [
        False,
        False,
        True,
        True,
    ]
    assert {k: v for some in parts for k, v in some.completions.items()} == store.completions()
    assert sorted((r for some in parts for r in some.rankings), key=str) == sorted(store.rankings(), key=str)
    assert [r.labeler for r in parts[1].rankings if r.decision] == ["sam", "rae"]  # the newest last
    with pytest.raises(UserError, match="no prompt 'p9'"):
        store.rule(rae, "p9")


def test_settings_of_the_queue_stay_with_the_store(make, url):
    store = make(overlap=3)
    store.add_items(completions(2))
    work(store, store.people.add("ann", "labeler"))
    looking = Store.open(url, clock=Clock())
    assert looking.settings == store.settings and looking.settings.overlap == 3
    looking.close()
    bob, cy, dee = (store.people.add(name, "labeler") for name in ("bob", "cy", "dee"))
    assert len(work(store, bob)) == 2  # looking has changed nothing
    store.set_queue(store.settings.model_copy(update={"overlap": 2}))
    assert work(store, cy) == []
    store.set_queue(store.settings.model_copy(update={"overlap": 3}))
    assert len(work(store, cy)) == 2 and work(store, dee) == []


def test_the_order_of_completions_does_not_hang_on_a_setting(make):
    store = make(seed=1)
    store.add_items(completions(5, 5))
    ann = store.people.add("ann", "labeler")
    given = store.next(ann)
    store.set_queue(store.settings.model_copy(update={"seed": 2}))
    assert store.assignment(ann, given.id).order == given.order


def test_a_store_of_a_newer_accord_is_refused_in_a_sentence(tmp_path):
    store = Store.open(tmp_path / "labels.db")
    with store.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(UserError, match=r"cannot be opened.*9999"):
        Store.open(tmp_path / "labels.db")


def test_a_first_store_is_migrated(tmp_path):
    """What revision 0001 wrote is there with what 0002 adds."""
    from alembic import command
    from alembic.config import Config

    from accord.feedback.database import Database

    database = Database.open(tmp_path / "labels.db")
    config = Config()
    config.set_main_option("script_location", str(Path(statements.__file__).parent / "migrations"))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        connection.execute(text("INSERT INTO people (id, name, role, active, created) VALUES (1, 'Ann', 'labeler', 1, 0)"))
        connection.execute(text("""INSERT INTO items (id, prompt_id, theme, content, completions, kind, priority, place, taken, wanted, created) VALUES (1, 'p', '', '"q"', '[{"text": "a", "finished": true}, {"text": "b", "finished": true}]', 'real', 0, 0, 1, 0, 0)"""))  # fmt: skip
        connection.execute(text("""INSERT INTO assignments (id, item, person, round, state, lease, opened, closed, label) VALUES (1, 1, 1, 0, 'done', 0, 0, 5, '{"ranks": [2, 1], "ratings": [], "flags": [], "note": "", "reason": ""}')"""))  # fmt: skip
    database.close()
    store = Store.open(tmp_path / "labels.db")
    assert [r.ranks for r in store.rankings()] == [(2, 1)] and len(store.id) == 32
    (given,) = store.history(store.people.get("Ann"))
    assert given.answers == 1
    store.close()


def test_an_export_imported_is_exported_the_same(make, tmp_path):
    store = make(overlap=2)
    store.set_criterion("Be good.")
    store.add_items(completions(5))
    ann, bob = (store.people.add(name, "labeler") for name in ("ann", "bob"))
    work(store, ann, answer(1, 2, None))
    store.set_criterion("Be better.")
    work(store, bob, Label((2, 2, 1), (7, None, 1), (("toxic", "other"), (), ()), "said  so \u2028"), limit=3)
    store.submit(ann, store.rule(ann, "p1").id, answer(3, 1, 1), "decided")
    rankings = list(store.rankings())
    write_lines(tmp_path / "r.jsonl", (r.to_json() for r in rankings))
    assert read_rankings(tmp_path / "r.jsonl") == rankings and rankings[-1].decision
    assert store.add_rankings(rankings) == 0  # they are all there
    copy = Store.open(tmp_path / "copy.db", QueueSettings(overlap=2, gold_share=0, repeat_share=0), Clock())
    with pytest.raises(UserError, match="import them first"):
        copy.add_rankings(rankings)
    copy.add_items(store.completions())
    assert copy.people.everyone() == []  # all or nothing
    assert copy.add_rankings(rankings) == 9 and copy.add_rankings(rankings) == 0
    assert list(copy.rankings()) == rankings and copy.completions() == store.completions() and copy.progress() == store.progress()
    assert copy.criterion() is None  # versions without their text are in force nowhere
    with pytest.raises(UserError, match="'ann' said something else of 'p0'"):
        copy.add_rankings([Ranking("p0", "ann", (3, 2, 1))])
    assert copy.add_rankings([Ranking("p0", "ann", (1, 2, None), note="but")]) == 1  # nothing contradicts it
    assert copy.add_rankings([Ranking("p0", "ann", (1, 2, None))]) == 0 and "but" in [r.note for r in copy.rankings()]
    with pytest.raises(UserError, match="'ann' said something else of 'p0'"):
        copy.add_rankings([Ranking("p0", "ann", (1, 2, None), note="and")])
    assert copy.add_rankings([Ranking("p0", "bob", (2, 2, 1), flags=(("other", "toxic"), (), ()))]) == 0  # in whatever order
    of_bob = lambda: next(r for r in copy.rankings() if (r.prompt_id, r.labeler) == ("p0", "bob"))
    assert copy.add_rankings([Ranking("p0", "bob", (2, 2, 1), ratings=(7, 3, None), simulated=True)]) == 1
    assert (of_bob().ratings, of_bob().flags, of_bob().simulated) == (
        (7, 3, 1),
        (("toxic", "other"), (), ()),
        False,
    )  # a person said it first
    before = copy.progress()
    eve = copy.people.add("eve", "labeler")
    opened, decided = copy.next(eve), copy.rule(eve, "p2")
    told = [Ranking(opened.prompt.id, "eve", (1, 2, 3), "v0"), Ranking("p2", "eve", (3, 2, 1), decision=True)]
    assert copy.add_rankings(told) == 2 and copy.add_rankings(told) == 0  # what was open only is answered by it
    assert copy.assignment(eve, opened.id).label.ranks == (1, 2, 3) and copy.assignment(eve, decided.id).label.ranks == (3, 2, 1)
    assert [r.criterion for r in copy.rankings() if r.labeler == "eve" and not r.decision] == ["v0"]
    assert copy.progress()["rankings"] == before["rankings"] + 1 and len(work(copy, eve)) == 1  # two of five wanted one more
    with pytest.raises(UserError, match="no flag 'toxick'"):
        copy.add_rankings([Ranking("p0", "dee", (1, 2, None), flags=(("toxick",), (), ()))])
    assert copy.add_rankings([Ranking("p4", "panel", (1, 2, 3), simulated=True)]) == 1
    assert [r.labeler for r in copy.rankings() if r.simulated] == ["panel"]
    with pytest.raises(UserError, match="2 ranks were given for 3"):
        copy.add_rankings([Ranking("p0", "dee", (2, 1))])
    copy.close()
