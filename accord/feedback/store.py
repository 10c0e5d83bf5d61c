"""What labelers were asked and what they said: SQLite (in WAL) by default, PostgreSQL by its URL.

Labels are never overwritten without a trace: every change is an event with what stood before and after. A submit names
itself by a key, and the same key again changes nothing, so that a request may be repeated until it is answered.

The queue: an item goes to ``overlap`` labelers. While one has it open it is leased to them; a lease that ends gives it to
another, and what the first one submits after all is kept too. Items whose answer is known (gold) and items that a labeler
has seen before are mixed in; a new labeler starts with the calibration items.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, Update, bindparam, delete, exists, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from accord.data.records import Completion, Prompt, RankedCompletions, Ranking
from accord.errors import UserError, did_you_mean, first_line
from accord.feedback import statements
from accord.feedback.database import Database, check_text
from accord.feedback.people import People, Person
from accord.feedback.schema import about, assignments, criteria, events, items, people
from accord.feedback.settings import QueueSettings
from accord.feedback.statements import AGAIN, FIRST, RULING

Kind = Literal["real", "gold", "calibration"]
FLAGS = ("toxic", "false", "refuses needlessly", "leaks", "other")
MOST = 9  # completions of a prompt: a digit each
RANKED = (items.c.prompt_id, people.c.name, assignments.c.round, assignments.c.label, assignments.c.criterion)


@dataclass(frozen=True)
class Label:
    """One labeler's answer. ``ranks[k]`` is of completion k as it was imported, None for ``F``; ``reason``: of a skip, which has no ranks."""

    ranks: tuple[int | None, ...] = ()
    ratings: tuple[int | None, ...] = ()  # 1 to 7 a completion
    flags: tuple[tuple[str, ...], ...] = ()  # of FLAGS, a completion
    note: str = ""
    reason: str = ""

    def check(self, count: int) -> None:
        """Raises:
        UserError: it does not fit ``count`` completions, or has a value that is none.
        """
        check_text(self.note, "A note", 10_000, empty=True)
        check_text(self.reason, "A reason", 1000, empty=True)
        if self.reason:
            if self.ranks:
                raise UserError("A skipped item has no ranks; give a reason or ranks.")
            return
        if len(self.ranks) != count:
            raise UserError(f"{len(self.ranks)} ranks were given for {count} completions; rank each, or mark it F.")
        if any(r is not None and (type(r) is not int or not 1 <= r <= count) for r in self.ranks):
            raise UserError(f"Ranks go from 1 to {count}, equal ones are ties, and F is for nonsense.")
        for what, values in (("ratings", self.ratings), ("flags", self.flags)):
            if values and len(values) != count:
                raise UserError(f"{len(values)} {what} were given for {count} completions.")
        if any(r is not None and (type(r) is not int or not 1 <= r <= 7) for r in self.ratings):
            raise UserError("Ratings go from 1 to 7.")
        unknown = next((f for some in self.flags for f in some if f not in FLAGS), None)
        if unknown is not None:
            raise UserError(f"There is no flag '{unknown}'; there are {', '.join(FLAGS)}.{did_you_mean(unknown, FLAGS)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "ranks": list(self.ranks),
            "ratings": list(self.ratings),
            "flags": [list(f) for f in self.flags],
            "note": self.note,
            "reason": self.reason,
        }

    def plain(self) -> Label:
        """The same, where what is said of no completion is not there, and flags are in their order."""
        flags = tuple(tuple(sorted(set(some), key=FLAGS.index)) for some in self.flags)
        return replace(self, ratings=self.ratings if any(self.ratings) else (), flags=flags if any(flags) else ())

    def completed(self, other: Label) -> Label | None:
        """This one with what only the other says besides; None if they say different things."""

        def each(a: tuple[Any, ...], b: tuple[Any, ...]) -> list[tuple[Any, Any]]:
            empty = (None,) * len(self.ranks)
            return list(zip(a or empty, b or empty, strict=True))

        mine, theirs = self.plain(), other.plain()
        pairs = [
            *each(mine.ratings, theirs.ratings),
            *each(mine.flags, theirs.flags),
            (mine.note, theirs.note),
            (mine.reason, theirs.reason),
        ]
        if mine.ranks != theirs.ranks or any(a and b and a != b for a, b in pairs):
            return None
        ratings, flags = (tuple(a or b for a, b in each(getattr(mine, name), getattr(theirs, name))) for name in ("ratings", "flags"))
        return Label(
            mine.ranks, ratings, tuple(some or () for some in flags), mine.note or theirs.note, mine.reason or theirs.reason
        ).plain()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Label:
        return cls(tuple(row["ranks"]), tuple(row["ratings"]), tuple(tuple(f) for f in row["flags"]), row["note"], row["reason"])


@dataclass(frozen=True)
class Assignment:
    """An item as one labeler sees it.

    Attributes:
        order: ``order[place]`` is the index of the completion shown there: shuffled by labeler, item and round, and always the same.
        calibration: it is one to begin with, whose ``gold`` ranks are shown after the answer. Other items with known ranks look like any.
        answers: how often it was answered; a draft belongs to one of these times.
        decision: it is a reviewer's to decide.
    """

    id: int
    prompt: Prompt
    completions: tuple[str, ...]
    order: tuple[int, ...]
    calibration: bool
    state: str
    draft: Mapping[str, Any] | None = None
    label: Label | None = None
    gold: tuple[int | None, ...] | None = None
    answers: int = 0
    decision: bool = False


class Store:
    """Open with :meth:`open`. What a method changes it changes in one transaction, or not at all."""

    def __init__(self, database: Database, settings: QueueSettings) -> None:
        self.database, self.settings = database, settings
        self.people = People(database)

    @classmethod
    def open(cls, url: str | Path, settings: QueueSettings | None = None, clock: Callable[[], float] = time.time) -> Store:
        """A store at a database URL, or in an SQLite file; made or migrated if need be.

        Args:
            settings: from now on; none: as they were set last, so that looking at a store changes nothing.

        Raises:
            UserError: it cannot be opened.
        """
        store = cls(Database.open(url, clock), settings or QueueSettings.model_validate({}))
        try:
            if settings is not None:
                store.set_queue(settings)
            else:
                store.reload()
        except SQLAlchemyError as error:
            raise UserError(f"The label store {store.database.url} cannot be read: {first_line(error)}") from None
        return store

    def reload(self) -> None:
        """Take what the store knows of itself: its settings, and its ``id``, which no other store has."""
        with self.database.read() as connection:
            known = {row.name: row.value for row in connection.execute(select(about)).all()}
        if "id" not in known:
            with self.database.write() as connection:
                if connection.execute(select(about).where(about.c.name == "id")).first() is None:
                    connection.execute(insert(about).values(name="id", value=secrets.token_hex(16)))
            return self.reload()
        self.id = str(known["id"])
        self.settings = QueueSettings.model_validate(known.get("queue", {}))

    def set_queue(self, settings: QueueSettings) -> None:
        """Give items out by other settings from now on."""
        self.reload()
        if settings == self.settings:
            return
        self.settings = settings
        with self.database.write() as connection:
            connection.execute(delete(about).where(about.c.name == "queue"))
            connection.execute(insert(about).values(name="queue", value=settings.model_dump()))
            connection.execute(update(items).values(wanted=items.c.taken < settings.overlap))
            self.database.note(connection, "queue set", after=settings.model_dump())

    def close(self) -> None:
        self.database.close()

    # What people are told.

    def set_criterion(self, text: str, by: Person | None = None) -> str:
        """The text that labelers are shown from now on; its version follows from the text. Labels keep the version they were given by."""
        check_text(text, "A criterion", 10**6)
        version, now = hashlib.sha256(text.encode()).hexdigest()[:12], self.database.clock()
        with self.database.write() as connection:
            again = connection.execute(update(criteria).where(criteria.c.version == version).values(created=now))
            if not again.rowcount:
                connection.execute(insert(criteria).values(version=version, text=text, created=now))
            self.database.note(connection, "criterion set", by.id if by is not None else None, after={"version": version})
        return version

    def criterion(self) -> tuple[str, str] | None:
        """(version, text) of the one that is in force."""
        with self.database.read() as connection:
            return self._in_force(connection)

    def _in_force(self, connection: Connection) -> tuple[str, str] | None:
        row = connection.execute(statements.CRITERION).first()
        return (row.version, row.text) if row is not None else None

    def _version(self, connection: Connection) -> str | None:
        found = self._in_force(connection)
        return found and found[0]

    # Items.

    def add_items(
        self,
        completions: Mapping[str, Sequence[Completion]],
        kind: Kind = "real",
        gold: Mapping[str, Sequence[int | None]] | None = None,
        priority: Mapping[str, float] | None = None,
    ) -> int:
        """Import prompts with their completions; returns how many are new. What is there already stays as it is.

        Args:
            gold: known ranks by prompt id; gold and calibration items need them.
            priority: by prompt id; the highest is asked first. 0 where it is not given.

        Raises:
            UserError: a prompt has no two completions or more than nine, is there with other texts, or lacks its known ranks.
        """
        fresh: list[dict[str, Any]] = []
        new = 0
        with self.database.write() as connection:
            there = self._there(connection, list(completions))
            for key, group in completions.items():
                check_text(key, "A prompt's id", 500)
                check_text(group[0].prompt.theme, f"Prompt '{key}': its theme", 200, empty=True)
                for completion in group:
                    check_text(
                        completion.text.replace("\0", ""), f"Prompt '{key}': a completion", 10**6, empty=True
                    )  # in JSON it has a NUL too
                if not 2 <= len(group) <= MOST:
                    raise UserError(f"Prompt '{key}' has {len(group)} completions; people compare 2 to {MOST} of them.")
                texts = [{"text": c.text, "finished": c.finished} for c in group]
                known = (gold or {}).get(key)
                if (kind != "real") != (known is not None):
                    raise UserError(f"Prompt '{key}': known ranks are what {kind} items " + ("lack." if kind == "real" else "need."))
                if known is not None:
                    Label(ranks=tuple(known)).check(len(group))
                before = there.get(key)
                content = group[0].prompt.content
                if before is not None:
                    if (before.content, before.completions) != (content, texts):
                        raise UserError(f"Prompt '{key}' is in the store with another text or other completions; give it another id.")
                    if (before.kind, before.gold) == (kind, known and list(known)) or known is None:
                        continue  # what is known of it is known
                    self._make_known(connection, before, kind, known)
                    new += 1
                    continue
                fresh.append({
                    "prompt_id": key, "theme": group[0].prompt.theme, "content": content, "completions": texts, "kind": kind,
                    "gold": known and list(known), "priority": float((priority or {}).get(key, 0.0)),
                    "place": _share(f"{self.settings.seed}/{key}"), "taken": 0, "wanted": True, "created": self.database.clock(),
                })  # fmt: skip
            if fresh:
                connection.execute(insert(items), fresh)
            self.database.note(connection, "items added", None, after={"kind": kind, "new": len(fresh) + new})
        return len(fresh) + new

    def _make_known(self, connection: Connection, item: Any, kind: Kind, known: Sequence[int | None]) -> None:
        """An item that nobody has had becomes one whose ranks are known."""
        had = connection.execute(select(assignments.c.id).where(assignments.c.item == item.id).limit(1)).first()
        if had is not None or item.kind != "real":
            why = "people have had it already" if item.kind == "real" else f"it is a {item.kind} item, with other ranks or none"
            raise UserError(f"Prompt '{item.prompt_id}' cannot become a {kind} item: {why}. Choose another prompt, or give it another id.")
        connection.execute(update(items).where(items.c.id == item.id).values(kind=kind, gold=list(known)))

    def add_rankings(self, rankings: Sequence[Ranking]) -> int:
        """Import raw rankings, and decisions, under their labelers' names; returns how many say something new. Labelers who are not
        there yet come without a password, and versions of the criterion that are not, without their text. Decisions count as made now.

        Raises:
            UserError: a ranking is of no real item, does not fit it, or its labeler said something else of it here.
        """
        new = 0
        with self.database.write() as connection:
            there = self._there(connection, sorted({r.prompt_id for r in rankings}))
            known = {row.name: row.id for row in connection.execute(select(people)).all()}
            versions = set(connection.execute(select(criteria.c.version)).scalars())
            for r in rankings:
                item = there.get(r.prompt_id)
                if item is None or item.kind != "real":
                    raise UserError(
                        f"Of '{r.prompt_id}', which '{r.labeler}' ranked, there are no completions to rank here; import them first."
                    )
                try:
                    Label(r.ranks, r.ratings, r.flags, r.note).check(len(item.completions))
                except UserError as error:
                    raise UserError(f"The ranking of '{r.prompt_id}' by '{r.labeler}': {error}") from None
                if r.labeler not in known:
                    known[r.labeler] = self.people.add_in(connection, r.labeler, "labeler").id
                if r.criterion and r.criterion not in versions:
                    check_text(r.criterion, "A criterion's version", 80)
                    connection.execute(insert(criteria).values(version=r.criterion, text="", created=0.0))
                    versions.add(r.criterion)
                new += self._import(connection, item.id, known[r.labeler], r)
        return new

    def _import(self, connection: Connection, item: int, person: int, r: Ranking) -> bool:
        """One ranking, as if it had been given on the page. False: it says nothing that is not there."""
        now, number, label = self.database.clock(), RULING if r.decision else FIRST, Label(r.ranks, r.ratings, r.flags, r.note)
        before = connection.execute(statements.GIVEN, {"of_item": item, "of_person": person, "of_round": number}).one_or_none()
        if before is not None and before.label:
            whole = Label.of(before.label).completed(label)
            if whole is None:
                raise UserError(f"'{r.labeler}' said something else of '{r.prompt_id}' here; a label is changed on the page.")
            if whole == Label.of(before.label).plain():
                return False
            label = whole
        simulated = before.label.get("simulated", False) if before is not None and before.label else r.simulated
        told = label.to_json() | ({"simulated": True} if simulated else {})  # until somebody changes it on the page
        values = {"state": "done", "label": told, "draft": None, "closed": now, "answered": now, "criterion": r.criterion or None}
        if before is None:
            values |= {"item": item, "person": person, "round": number, "lease": now, "opened": now, "answers": 1}
            key: int = connection.execute(statements.ADD, values).inserted_primary_key[0]  # type: ignore[index]
        else:  # it was open, or less was said of it
            key, holding = before.id, before.state in ("open", "done")
            values |= {
                "answers": before.answers + 1,
                "closed": before.closed or now,
                "criterion": (before.criterion if before.label else r.criterion) or r.criterion or None,
            }
            connection.execute(statements.CHANGE, {"of_key": key, **values})
        if before is None or not holding:
            self._take(connection, item, number, +1)
        self.database.note(connection, "imported", person, key, before=before and before.label, after=told)
        return True

    def set_priority(self, priority: Mapping[str, float]) -> None:
        """Ask first for the items, by prompt id, of the highest priority; others stay where they are."""
        with self.database.write() as connection:
            rows = [{"of_prompt": key, "level": float(value)} for key, value in priority.items()]
            if rows:
                connection.execute(
                    update(items).where(items.c.prompt_id == bindparam("of_prompt")).values(priority=bindparam("level")), rows
                )
            self.database.note(connection, "priority set", after={"prompts": len(rows)})

    def _there(self, connection: Connection, keys: list[str], chunk: int = 500) -> dict[str, Any]:
        """Items that are in the store already, by prompt id."""
        found: dict[str, Any] = {}
        for start in range(0, len(keys), chunk):
            rows = connection.execute(select(items).where(items.c.prompt_id.in_(keys[start : start + chunk]))).all()
            found |= {row.prompt_id: row for row in rows}
        return found

    # The queue.

    def next(self, person: Person) -> Assignment | None:
        """What this labeler does next: what they have open, or something new, leased to them; None if there is nothing left."""
        self._end_leases()
        with self.database.write(of=person.id) as connection:
            while True:  # until nobody else has been faster
                row = connection.execute(statements.OPEN, {"of_person": person.id}).one_or_none()
                if row is not None:
                    if row.state == "late" and not self._take(connection, row.item, row.round, +1, statements.CLAIM):
                        continue
                    self._hold(connection, row)
                    return self._assignment(connection, row.id)
                found = self._choose(connection, person)
                if found is None:
                    return None
                if self._take(connection, *found, +1, statements.CLAIM):
                    return self._assignment(connection, self._give(connection, person, *found, "opened"))

    def _give(self, connection: Connection, person: Person, item: int, number: int, told: str) -> int:
        """Open an item for somebody, by the criterion in force; the new assignment's number."""
        now = self.database.clock()
        values = {
            "item": item, "person": person.id, "round": number, "state": "open", "lease": now + self.settings.lease, "opened": now,
        }  # fmt: skip
        key: int = connection.execute(statements.GIVE, values).inserted_primary_key[0]  # type: ignore[index]
        self.database.note(connection, told, person.id, key)
        return key

    def _end_leases(self) -> None:
        """Open items whose lease has ended are wanted by others again."""
        now = {"now": self.database.clock()}
        with self.database.read() as connection:
            if connection.execute(statements.LATE, now).first() is None:
                return
        with self.database.write() as connection:
            for row in connection.execute(statements.LATE, now).all():
                connection.execute(statements.CHANGE, {"of_key": row.id, "state": "late"})
                self._take(connection, row.item, row.round, -1)

    def _hold(self, connection: Connection, row: Any, **values: Any) -> None:
        """Keep an open item for its labeler for another while, also one whose lease had ended."""
        state = "open" if row.state == "late" else row.state
        lease = self.database.clock() + self.settings.lease
        connection.execute(statements.CHANGE, {"of_key": row.id, "state": state, "lease": lease, **values})

    def _take(self, connection: Connection, item: int, number: int, by: int, how: Update = statements.TAKE) -> bool:
        """Count one more, or one fewer, of an item's rankings; what is shown again to the same person is not among them. False: it
        is not to be had."""
        if number != FIRST or not by:
            return True
        return bool(connection.execute(how, {"of_item": item, "by": by, "overlap": self.settings.overlap}).rowcount)

    def _choose(self, connection: Connection, person: Person) -> tuple[int, int] | None:
        """(item, round) of the next one: calibration first, then now and then gold or a repetition, else what is asked for most."""
        calibration = self._unseen(connection, person, "calibration")
        if calibration is not None:
            return calibration, FIRST
        done = int(connection.execute(statements.ANSWERED, {"of_person": person.id}).scalar_one())
        luck = np.random.default_rng([self.settings.seed, person.id, done]).random()
        if luck < self.settings.gold_share:
            gold = self._unseen(connection, person, "gold")
            if gold is not None:
                return gold, FIRST
        elif luck < self.settings.gold_share + self.settings.repeat_share:
            again = self._repeat(connection, person)
            if again is not None:
                return again, AGAIN
        real = self._unseen(connection, person, "real")
        return None if real is None else (real, FIRST)

    def _unseen(self, connection: Connection, person: Person, kind: Kind) -> int | None:
        """An item that this person has not had; everybody begins at their own place."""
        told = {"kind": kind, "of_person": person.id, "start": _share(f"{self.settings.seed}/{person.id}")}
        query = statements.UNSEEN[connection.dialect.name, kind == "real"]
        found: int | None = connection.execute(query, told).scalar_one_or_none()
        return found

    def _repeat(self, connection: Connection, person: Person) -> int | None:
        """A real item that this person ranked some while ago, and has not seen twice."""
        again = assignments.alias()
        twice = exists().where(again.c.item == assignments.c.item, again.c.person == person.id, again.c.round == AGAIN)
        query = select(assignments.c.item).join(items, items.c.id == assignments.c.item)
        query = query.where(
            assignments.c.person == person.id, assignments.c.state == "done", assignments.c.round == FIRST, items.c.kind == "real", ~twice
        )
        rows = connection.execute(query.order_by(assignments.c.closed.desc())).all()
        return rows[-1].item if len(rows) > self.settings.repeat_after else None

    def _assignment(self, connection: Connection, key: int) -> Assignment:
        return self._shown(connection.execute(statements.SHOWN, {"of_key": key}).one())

    def _shown(self, row: Any) -> Assignment:
        luck = np.random.default_rng(int(_share(f"{self.id}/{row.person}/{row.round}/{row.prompt_id}") * 2**53))
        return Assignment(
            row.id,
            Prompt(row.prompt_id, row.content, row.theme),
            tuple(c["text"] for c in row.completions),
            tuple(int(k) for k in luck.permutation(len(row.completions))),
            row.kind == "calibration",
            row.state,
            row.draft,
            row.label and Label.of(row.label),
            tuple(row.gold) if row.kind == "calibration" and row.label else None,
            row.answers,
            row.round == RULING,
        )

    def assignment(self, person: Person, key: int) -> Assignment:
        """One of this person's own, to look at or to change.

        Raises:
            UserError: it is not theirs, or there is none.
        """
        with self.database.read() as connection:
            return self._shown(self._own(connection, person, key))

    def _own(self, connection: Connection, person: Person, key: int, request: str | None = None) -> Any:
        """``request``: say also whether it was taken before (``known``)."""
        asked = {"of_key": key, "of_person": person.id} | ({"request": request} if request else {})
        query = statements.TO_ANSWER if request else statements.OWN
        row = connection.execute(query, asked).one_or_none() if 0 < key < 2**31 else None
        if row is None:
            raise UserError(f"There is no item {key} that was given to '{person.name}'.")
        return row

    def save_draft(self, person: Person, key: int, draft: Mapping[str, Any]) -> bool:
        """Keep what is not submitted yet, and the lease. One that was overtaken, by an answer or by a newer draft, is not kept.

        Args:
            draft: what the page likes; ``answers`` is how often the item was answered when it was begun, ``at`` when it was made.

        Raises:
            UserError: the item is not theirs, or the draft is larger than any answer.
        """
        check_text(json.dumps(draft, ensure_ascii=False).replace("\\u0000", "\0"), "A draft", 100_000)
        with self.database.write(of=person.id) as connection:
            row = self._own(connection, person, key)
            if draft.get("answers", row.answers) != row.answers or draft.get("at", 0) < (row.draft or {}).get("at", 0):
                return False
            if row.state == "late":
                self._take(connection, row.item, row.round, +1)
            self._hold(connection, row, draft=dict(draft))
        return True

    def submit(
        self, person: Person, key: int, label: Label | Callable[[Assignment], Label], request: str, seconds: float | None = None
    ) -> bool:
        """Record an answer, or another one in its place; the event log has both.

        Args:
            label: the answer, or what makes it of the item as its labeler sees it.
            request: the request's own name. With one that was taken before for this item nothing changes.
            seconds: time on the item.

        Returns:
            False if this request was taken before.

        Raises:
            UserError: the item is not theirs, or the label does not fit it.
        """
        check_text(request, "A request's name", 100)
        now = self.database.clock()
        with self.database.write(of=person.id) as connection:
            row = self._own(connection, person, key, request)
            if row.known:
                return False
            if callable(label):
                label = label(self._shown(row))
            label.check(len(row.completions))
            state = "skipped" if label.reason else "done"
            kind = "changed" if row.label else "skipped" if label.reason else "submitted"
            self.database.note(connection, kind, person.id, key, request, row.label, label.to_json())
            holding, now_holding = row.state in ("open", "done"), state == "done"
            self._take(connection, row.item, row.round, now_holding - holding)
            values = {
                "state": state, "label": label.to_json(), "draft": None, "closed": row.closed or now, "answered": now, "answers": row.answers + 1,
                "seconds": row.seconds if seconds is None else (row.seconds or 0.0) + seconds, "criterion": row.criterion or self._version(connection),
            }  # fmt: skip
            connection.execute(statements.CHANGE, {"of_key": key, **values})
        return True

    def rule(self, person: Person, prompt_id: str) -> Assignment:
        """A real item for this reviewer to decide, whoever ranked it before.

        Raises:
            UserError: there is no such prompt.
        """
        with self.database.write() as connection:
            item = self._real(connection, prompt_id).id
            own = select(assignments.c.id).where(
                assignments.c.item == item, assignments.c.person == person.id, assignments.c.round == RULING
            )
            key = connection.execute(own).scalar_one_or_none()
            if key is None:
                key = self._give(connection, person, item, RULING, "opened to decide")
            return self._assignment(connection, key)

    # What came of it.

    def work_of(self, person: Person, since: float) -> dict[str, int]:
        """How many items this person has answered, how many of them since a time, and how many real ones wait for them."""
        with self.database.read() as connection:
            row = connection.execute(statements.WORK, {"of_person": person.id, "since": since}).one()
        return {"done": row.done, "today": row.today, "left": row.wanted - row.had}

    def history(self, person: Person, limit: int = 50) -> list[Assignment]:
        """This person's own answers, the last first."""
        with self.database.read() as connection:
            query = select(assignments.c.id).where(assignments.c.person == person.id, assignments.c.state != "open")
            query = query.where(assignments.c.closed.is_not(None)).order_by(assignments.c.closed.desc(), assignments.c.id.desc())
            keys = connection.execute(query.limit(limit)).scalars().all()
            return [self._assignment(connection, key) for key in keys]

    def rankings(self, kind: Kind = "real", number: int | None = None, chunk: int = 1000) -> Iterator[Ranking]:
        """Every ranking that stands, in the order in which they were given out, and then reviewers' decisions, the newest last;
        skipped items are none. ``number``: of one round only."""
        yield from (_ranking(row) for row in self._done(kind, FIRST if number is None else number, chunk))
        if number is None:
            yield from (_ranking(row) for row in sorted(self._done(kind, RULING, chunk), key=lambda row: row.answered))

    def labels(self) -> Iterator[tuple[str, str, Label]]:
        """(prompt, labeler's name, label) of the real items, with ratings, flags and notes; also of those that were skipped."""
        rows = self._done("real", FIRST, states=("done", "skipped"))
        yield from ((row.prompt_id, row.name, Label.of(row.label)) for row in rows)

    def _done(self, kind: Kind, number: int, chunk: int = 1000, states: Sequence[str] = ("done",)) -> Iterator[Any]:
        last = 0
        while True:
            with self.database.read() as connection:
                query = select(*RANKED, assignments.c.id, assignments.c.answered)
                query = query.join(items, items.c.id == assignments.c.item).join(people, people.c.id == assignments.c.person)
                query = query.where(assignments.c.state.in_(states), assignments.c.round == number, assignments.c.id > last)
                rows = connection.execute(query.where(items.c.kind == kind).order_by(assignments.c.id).limit(chunk)).all()
            yield from rows
            if len(rows) < chunk:
                return
            last = rows[-1].id

    def completions(self) -> dict[str, list[Completion]]:
        """The real items' prompts and completions, as they were imported."""
        with self.database.read() as connection:
            rows = connection.execute(select(items).where(items.c.kind == "real").order_by(items.c.id)).all()
        return {row.prompt_id: _completions(row) for row in rows}

    def of_prompts(self, keys: Sequence[str]) -> dict[str, list[Completion]]:
        """Completions of those of these prompts that are there."""
        with self.database.read() as connection:
            return {key: _completions(row) for key, row in self._there(connection, list(keys)).items()}

    def of_prompt(self, prompt_id: str) -> tuple[list[Completion], list[Ranking]]:
        """A real prompt's completions, and what people say of them.

        Raises:
            UserError: there is no such prompt.
        """
        with self.database.read() as connection:
            row = self._real(connection, prompt_id)
            return _completions(row), [_ranking(given) for given in _rankings_of(connection, [row.id])]

    def _real(self, connection: Connection, prompt_id: str) -> Any:
        check_text(prompt_id, "A prompt's id", 500)
        row = connection.execute(select(items).where(items.c.prompt_id == prompt_id, items.c.kind == "real")).one_or_none()
        if row is None:
            raise UserError(f"There is no prompt '{prompt_id}' that people are to rank.")
        return row

    def known(self) -> list[tuple[str, tuple[int | None, ...]]]:
        """Gold items' prompts, with the ranks that are known to be right."""
        with self.database.read() as connection:
            rows = connection.execute(select(items.c.prompt_id, items.c.gold).where(items.c.kind == "gold").order_by(items.c.id)).all()
        return [(row.prompt_id, tuple(row.gold)) for row in rows]

    def effort(self) -> list[dict[str, Any]]:
        """Every answer but decisions: who, when, how many seconds, done or skipped, of which kind of item."""
        query = select(people.c.name, assignments.c.closed, assignments.c.seconds, assignments.c.state, items.c.kind)
        query = (
            query.where(assignments.c.round != RULING)
            .join(people, people.c.id == assignments.c.person)
            .join(items, items.c.id == assignments.c.item)
        )
        with self.database.read() as connection:
            return [
                dict(row._mapping)
                for row in connection.execute(query.where(assignments.c.closed.is_not(None)).order_by(assignments.c.closed))
            ]

    def newest_event(self) -> int:
        """The number of the last event; it grows with everything that happens."""
        with self.database.write() as connection:  # so that none with a smaller number is still on its way
            return int(connection.execute(select(func.max(events.c.id))).scalar_one() or 0)

    def by_prompt(self, chunk: int = 500) -> Iterator[RankedCompletions]:
        """What :meth:`completions` and :meth:`rankings` say, some prompts at a time."""
        last = 0
        while True:
            with self.database.read() as connection:
                some = connection.execute(
                    select(items).where(items.c.kind == "real", items.c.id > last).order_by(items.c.id).limit(chunk)
                ).all()
                given = _rankings_of(connection, [row.id for row in some])
            if some:
                yield RankedCompletions({row.prompt_id: _completions(row) for row in some}, [_ranking(row) for row in given])
            if len(some) < chunk:
                return
            last = some[-1].id

    def progress(self) -> dict[str, int]:
        """Real items, those that have all their rankings, rankings, skips."""
        with self.database.read() as connection:
            count = lambda *where: int(
                connection.execute(
                    select(func.count())
                    .select_from(assignments.join(items, items.c.id == assignments.c.item))
                    .where(items.c.kind == "real", *where)
                ).scalar_one()
            )
            total = int(connection.execute(select(func.count()).select_from(items).where(items.c.kind == "real")).scalar_one())
            first = assignments.c.round == FIRST
            often = select(assignments.c.item).join(items, items.c.id == assignments.c.item)
            often = often.where(items.c.kind == "real", assignments.c.state == "done", first).group_by(assignments.c.item)
            full = often.having(func.count() >= self.settings.overlap).subquery()
            complete = int(connection.execute(select(func.count()).select_from(full)).scalar_one())
            return {
                "items": total,
                "complete": complete,
                "rankings": count(assignments.c.state == "done", first),
                "skipped": count(assignments.c.state == "skipped", first),
            }

    def log(self, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """Events in their order: who, what, when, before, after."""
        with self.database.write() as connection:  # so that no event with a smaller number is still on its way
            query = select(events, people.c.name).join(people, people.c.id == events.c.person, isouter=True).where(events.c.id > after)
            rows = connection.execute(query.order_by(events.c.id).limit(limit)).all()
        return [
            {"id": r.id, "at": r.at, "who": r.name, "what": r.kind, "assignment": r.assignment, "before": r.before, "after": r.after}
            for r in rows
        ]


def _completions(row: Any) -> list[Completion]:
    """An item's, as they were imported."""
    prompt = Prompt(row.prompt_id, row.content, row.theme)
    return [Completion(prompt, c["text"], c["finished"], k) for k, c in enumerate(row.completions)]


def _rankings_of(connection: Connection, numbers: Sequence[int]) -> Sequence[Any]:
    """Of items, by their numbers: what :func:`_ranking` makes rankings of, item by item, decisions after opinions and the newest last."""
    query = select(*RANKED).join(items, items.c.id == assignments.c.item).join(people, people.c.id == assignments.c.person)
    query = query.where(assignments.c.state == "done", assignments.c.round != AGAIN, assignments.c.item.in_(numbers))
    return connection.execute(query.order_by(assignments.c.item, assignments.c.round, assignments.c.answered, assignments.c.id)).all()


def _ranking(row: Any) -> Ranking:
    """What an assignment's label says, with its person's name."""
    said, simulated = Label.of(row.label).plain(), row.label.get("simulated", False)
    return Ranking(
        row.prompt_id, row.name, said.ranks, row.criterion or "", simulated, said.ratings, said.flags, said.note, row.round == RULING
    )


def _share(name: str) -> float:
    """A number from 0 to 1 that follows from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
