"""What the owner is told, by hand from a dozen labels."""

import pytest

pytest.importorskip("sqlalchemy")

from accord.data.records import Completion, Prompt
from accord.feedback import statements
from accord.feedback.overview import overview
from accord.feedback.store import Label, QueueSettings, Store

DAY = 86_400.0


@pytest.fixture
def store(tmp_path):
    now = [10 * DAY + 3600]
    store = Store.open(tmp_path / "labels.db", QueueSettings(overlap=2, gold_share=0, repeat_share=0), lambda: now[0])
    store.tick = lambda seconds: now.__setitem__(0, now[0] + seconds)
    yield store
    store.close()


def group(key, *texts):
    return {key: [Completion(Prompt(key, f"say {key}"), text, True, k) for k, text in enumerate(texts)]}


def give(store, person, key, number=statements.FIRST):
    """An item, whatever the queue would say."""
    with store.database.write() as connection:
        item = connection.execute(statements.items.select().where(statements.items.c.prompt_id == key)).one().id
        row = {"item": item, "person": person.id, "round": number, "state": "open", "lease": 10**12, "opened": store.database.clock()}
        return connection.execute(statements.ADD, row).inserted_primary_key[0]


def say(store, person, key, *ranks, number=statements.FIRST, seconds=None, reason=""):
    assignment = give(store, person, key, number)
    store.submit(person, assignment, Label(ranks=ranks, reason=reason), f"request-{assignment}", seconds)


def test_by_hand(store):
    store.add_items(group("p0", "longer", "short") | group("p1", "one", "three") | group("p2", "same", "size"))
    store.add_items(group("g0", "x", "yy", "zzz"), "gold", {"g0": (1, 2, None)})
    ann, bob = store.people.add("Ann", "labeler"), store.people.add("Bob", "labeler")
    say(store, ann, "p0", 1, 2, seconds=10.0)
    say(store, ann, "p1", 1, 1, seconds=30.0)
    say(store, ann, "p2", 1, 2, seconds=20.0)
    store.tick(DAY)
    say(store, bob, "p0", 2, 1)
    say(store, bob, "p1", 2, 1)
    say(store, bob, "p2", reason="broken")
    say(store, ann, "g0", 2, 1, None)  # of three comparisons with the known ranks the first is wrong
    say(store, ann, "p0", 2, 1, number=statements.AGAIN)  # the reverse of what she said at first
    say(store, ann, "p1", 1, 1, number=statements.AGAIN)
    seen = overview(store)
    assert seen.progress == {"items": 3, "complete": 2, "rankings": 5, "skipped": 1}
    assert seen.longer.value == pytest.approx(2 / 3)  # Ann on p0 and Bob on p1, not Bob on p0; p2 has no longer one, Ann's p1 is a tie
    assert seen.agreement.with_ties.value == 0.0 and seen.agreement.prompts == 3
    better, equal, worse = range(3)
    assert seen.confusion[better][worse] == seen.confusion[worse][better] == 1 and seen.confusion[equal][equal] == 2
    assert sum(map(sum, seen.confusion)) == 4
    by_name = {row.name: row for row in seen.labelers}
    assert (by_name["Ann"].done, by_name["Ann"].skipped, by_name["Ann"].seconds) == (6, 0, 20.0)
    assert by_name["Ann"].with_gold.value == pytest.approx(2 / 3) and by_name["Ann"].repeated.value == 0.5
    assert (by_name["Bob"].done, by_name["Bob"].skipped, by_name["Bob"].seconds, by_name["Bob"].with_gold) == (2, 1, None, None)
    assert [count for _, count in seen.days] == [3, 5] and seen.days[0][0] < seen.days[1][0]


def test_flags(store):
    """Ann and Bob on five completions: both call one toxic, Ann one more; Cohen's kappa by hand, and by a peer."""
    sklearn = pytest.importorskip("sklearn.metrics")
    store.add_items(group("p0", "a", "b") | group("p1", "a", "b", "c"))
    ann, bob = store.people.add("Ann", "labeler"), store.people.add("Bob", "labeler")
    flags = {
        (ann, "p0"): (("toxic",), ()), (ann, "p1"): ((), ("toxic", "false"), ()),
        (bob, "p0"): (("toxic",), ()), (bob, "p1"): (),
    }  # fmt: skip
    for (person, key), some in flags.items():
        ranks = (1, 2) if key == "p0" else (1, 2, 3)
        store.submit(person, give(store, person, key), Label(ranks, flags=some), f"request-{person.id}-{key}")
    found = overview(store).flags
    assert list(found) == ["toxic", "false"] and found["toxic"][0] == 3
    # They agree on four of five; by chance on 2/5 * 1/5 + 3/5 * 4/5 = 14/25.
    assert found["toxic"][1].value == pytest.approx((4 / 5 - 14 / 25) / (1 - 14 / 25))
    assert found["toxic"][1].value == pytest.approx(sklearn.cohen_kappa_score([1, 0, 0, 1, 0], [1, 0, 0, 0, 0]))
    assert found["false"] == (1, None)  # half of the resampled prompts have none, so nothing is told of it
    cy = store.people.add("Cy", "labeler")
    store.submit(cy, give(store, cy, "p0"), Label(reason="I would rather not", flags=(("other",), ())), "request-cy")
    assert overview(store).flags["other"][0] == 1  # a skip's flags count, too
    store.submit(cy, give(store, cy, "p1"), Label(reason="broken"), "request-cy-2")
    assert overview(store).flags["toxic"][0] == 3


def test_of_nothing_there_is_nothing_to_say(store):
    seen = overview(store)
    assert seen.agreement is None and seen.labelers == [] and seen.longer is None and seen.confusion == [[0] * 3] * 3
    store.add_items(group("p0", "a", "b"))
    ann = store.people.add("Ann", "labeler")
    say(store, ann, "p0", reason="broken")
    seen = overview(store)
    assert seen.agreement is None and [row.skipped for row in seen.labelers] == [1] and seen.labelers[0].report is None
