"""What the queue asks the database over and over. Each is built once: building a statement takes longer than running it."""

from __future__ import annotations

from sqlalchemy import BindParameter, Select, and_, bindparam, exists, func, insert, or_, select, update

from accord.feedback.schema import assignments, criteria, events, items

FIRST, AGAIN, RULING = range(3)
"""Rounds of an assignment: the labeler's ranking, the same item shown to the same person again, a reviewer's decision."""

_person: BindParameter[int] = bindparam("of_person")
_item: BindParameter[int] = bindparam("of_item")
_key: BindParameter[int] = bindparam("of_key")
_a = assignments.alias()
_seen = exists().where(_a.c.item == items.c.id, _a.c.person == _person, _a.c.round == FIRST)

LATE = select(assignments.c.id, assignments.c.item, assignments.c.round).where(
    assignments.c.state == "open", assignments.c.lease <= bindparam("now")
)
OPEN = (
    select(assignments)
    .join(items, items.c.id == assignments.c.item)
    .where(assignments.c.person == _person, or_(assignments.c.state == "open", and_(assignments.c.state == "late", items.c.wanted)))
    .order_by(assignments.c.id)
    .limit(1)
)
"""What a person has open; late items only as long as nobody else has taken them."""

ANSWERED = select(func.count()).select_from(assignments).where(assignments.c.person == _person, assignments.c.state != "open")
SHOWN = select(assignments, items).join(items, items.c.id == assignments.c.item).where(assignments.c.id == _key)
OWN = SHOWN.where(assignments.c.person == _person)
FIRST_OF = select(assignments).where(assignments.c.item == _item, assignments.c.person == _person, assignments.c.round == FIRST)
CRITERION = select(criteria).where(criteria.c.text != "").order_by(criteria.c.created.desc(), criteria.c.version).limit(1)
KNOWN_REQUEST = select(events.c.id).where(events.c.assignment == _key, events.c.key == bindparam("request"))
ADD = insert(assignments)
CHANGE = update(assignments).where(assignments.c.id == _key)
TAKE = (
    update(items)
    .where(items.c.id == _item)
    .values(taken=items.c.taken + bindparam("by"), wanted=items.c.taken + bindparam("by") < bindparam("overlap"))
)


def _unseen(real: bool) -> Select:
    """Items of a kind that a person has not had; of real ones those that have not been given out often enough."""
    some = select(items.c.id, items.c.priority).where(items.c.kind == bindparam("kind"), ~_seen)
    return some.where(items.c.wanted) if real else some


HIGHEST = {real: _unseen(real).order_by(items.c.priority.desc()).limit(1) for real in (True, False)}
_LEVEL = {real: _unseen(real).where(items.c.priority == bindparam("level")).order_by(items.c.place).limit(1) for real in (True, False)}
FROM = {real: query.where(items.c.place >= bindparam("start")) for real, query in _LEVEL.items()}
BEFORE = {real: query.where(items.c.place < bindparam("start")) for real, query in _LEVEL.items()}

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
