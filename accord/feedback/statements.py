"""What the queue asks the database over and over. Each is built once: building a statement takes longer than running it."""

from __future__ import annotations

from sqlalchemy import (
    BindParameter,
    Float,
    FromClause,
    Select,
    bindparam,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)

from accord.feedback.schema import assignments, criteria, events, items

FIRST, AGAIN, RULING = range(3)
"""Rounds of an assignment: the labeler's ranking, the same item shown to the same person again, a reviewer's decision."""

_person: BindParameter[int] = bindparam("of_person")
_item: BindParameter[int] = bindparam("of_item")
_key: BindParameter[int] = bindparam("of_key")
_a = assignments.alias()

LATE = select(assignments.c.id, assignments.c.item, assignments.c.round).where(
    assignments.c.state == "open", assignments.c.lease <= bindparam("now")
)
OPEN = (
    select(assignments)
    .join(items, items.c.id == assignments.c.item)
    .where(assignments.c.person == _person, assignments.c.state.in_(("open", "late")), or_(assignments.c.state == "open", items.c.wanted))
    .where(assignments.c.round != RULING)
    .order_by(assignments.c.id)
    .limit(1)
)
"""What a person has open; late items only as long as nobody else has taken them. A decision waits where it was begun."""

ANSWERED = select(func.count()).select_from(assignments).where(assignments.c.person == _person, assignments.c.state != "open")
SHOWN = select(assignments, items).join(items, items.c.id == assignments.c.item).where(assignments.c.id == _key)
OWN = SHOWN.where(assignments.c.person == _person)
_known = exists().where(events.c.assignment == _key, events.c.key == bindparam("request"))
TO_ANSWER = OWN.add_columns(_known.label("known"))
"""With whether a request of this name was taken before."""
GIVEN = select(assignments).where(
    assignments.c.item == _item, assignments.c.person == _person, assignments.c.round == bindparam("of_round")
)
CRITERION = select(criteria).where(criteria.c.text != "").order_by(criteria.c.created.desc(), criteria.c.version).limit(1)
ADD = insert(assignments)
GIVE = insert(assignments).values(criterion=CRITERION.with_only_columns(criteria.c.version).scalar_subquery())
"""By the criterion in force."""
CHANGE = update(assignments).where(assignments.c.id == _key)
TAKE = (
    update(items)
    .where(items.c.id == _item)
    .values(taken=items.c.taken + bindparam("by"), wanted=items.c.taken + bindparam("by") < bindparam("overlap"))
)
CLAIM = TAKE.where(or_(items.c.wanted, items.c.kind != "real"))
"""If somebody else has not been faster; known ones are anybody's."""


def _unseen(dialect: str, real: bool) -> Select:
    """Of a kind's items that a person has not had, and of real ones that have not been given out often enough: of those with the
    highest priority the first from a place on, around the circle."""

    def some(table: FromClause, column: str) -> Select:
        had = select(_a.c.item).where(_a.c.person == _person, _a.c.round == FIRST)
        # SQLite looks each item up. So would PostgreSQL, but not while a table is new and its rows are not counted.
        new = ~exists(had.where(_a.c.item == table.c.id)) if dialect == "sqlite" else table.c.id.not_in(had)
        query = select(table.c[column]).where(table.c.kind == bindparam("kind"), new)
        return query.where(table.c.wanted) if real else query

    other, start = items.alias(), bindparam("start", type_=Float)
    highest = some(other, "priority").order_by(other.c.priority.desc()).limit(1).scalar_subquery()
    level = some(items, "id").where(items.c.priority == highest).order_by(items.c.place).limit(1)
    sides = [
        level.where(side).add_columns(literal(k).label("side")) for k, side in enumerate((items.c.place >= start, items.c.place < start))
    ]
    both = union_all(*(select(side.subquery()) for side in sides)).subquery()
    return select(both.c.id).order_by(both.c.side).limit(1)


UNSEEN = {(dialect, real): _unseen(dialect, real) for dialect in ("sqlite", "postgresql") for real in (True, False)}

_mine = select(func.count()).select_from(assignments).where(assignments.c.person == _person, assignments.c.state == "done")
WORK = select(
    _mine.scalar_subquery().label("done"),
    _mine.where(assignments.c.closed >= bindparam("since")).scalar_subquery().label("today"),
    select(func.count()).select_from(items).where(items.c.kind == "real", items.c.wanted).scalar_subquery().label("wanted"),
    select(func.count())
    .select_from(assignments.join(items, items.c.id == assignments.c.item))
    .where(
        assignments.c.person == _person, assignments.c.round == FIRST, items.c.kind == "real", items.c.wanted, assignments.c.state != "open"
    )
    .scalar_subquery()
    .label("had"),
)
"""How much a person has done, and how many real items are wanted: of everybody, and of these had by this person."""
