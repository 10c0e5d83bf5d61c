"""Who labels: people with a role, passwords, invitations, and the sessions they are logged in by.

Of a password there is an argon2id hash, of a session's and an invitation's token a SHA-256: who reads the database can log in
as nobody.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from accord.data.sources import is_unicode
from accord.errors import UserError, did_you_mean
from accord.feedback.database import Database, check_text
from accord.feedback.schema import invitations, people, sessions

ROLES = ("owner", "reviewer", "labeler")
SHORTEST, LONGEST = 10, 1000  # characters of a password
DAYS = 86_400.0
INVITED = 7 * DAYS
"""Seconds for which an invitation can be taken."""
IDLE, TOUCH = 14 * DAYS, 600.0
"""Seconds after which an unused session has ended; how exactly its last use is noted."""

SESSION = (
    select(sessions, people.c.name, people.c.role)
    .join(people, people.c.id == sessions.c.person)
    .where(sessions.c.token == bindparam("digest"), sessions.c.used > bindparam("since"), people.c.active)
)  # asked with every request, and built once


@dataclass(frozen=True)
class Person:
    id: int
    name: str
    role: str


@dataclass(frozen=True)
class Invitation:
    """A link that can be taken. ``name``: of the person who chooses a new password by it; None: it is for somebody new."""

    digest: str  # of its token, which nobody can tell from it
    role: str
    name: str | None
    expires: float


@dataclass(frozen=True)
class Session:
    """Somebody who is logged in. ``csrf``: what their pages send along with every change, and nobody else's page knows."""

    person: Person
    csrf: str


class People:
    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, name: str, role: str, password: str | None = None) -> Person:
        """A new person. ``password`` is hashed (argon2id) before it is kept; without one they cannot log in.

        Raises:
            UserError: the name is taken or empty, there is no such role, or the password is too short or too long.
        """
        row = self._row(name, role, password)
        with self._db.write() as connection:
            return self._insert(connection, row)

    def add_in(self, connection: Connection, name: str, role: str) -> Person:
        """:meth:`add`, without a password, within a transaction."""
        return self._insert(connection, self._row(name, role, None))

    def _row(self, name: str, role: str, password: str | None) -> dict[str, Any]:
        _check_role(role)
        check_text(name, "A person's name", 200)
        hashed = None
        if password is not None:
            check_password(password)
            hashed = _hasher().hash(password)
        return {"name": name.strip(), "role": role, "password": hashed, "active": True, "created": self._db.clock()}

    def _insert(self, connection: Connection, row: dict[str, Any]) -> Person:
        try:
            with connection.begin_nested():
                number = connection.execute(insert(people).values(**row)).inserted_primary_key[0]  # type: ignore[index]
        except IntegrityError:
            raise UserError(f"There is a person called '{row['name']}' already.") from None
        self._db.note(connection, "person added", number, after={"name": row["name"], "role": row["role"]})
        return Person(number, row["name"], row["role"])

    def get(self, name: str) -> Person | None:
        """An active person by name."""
        with self._db.read() as connection:
            row = connection.execute(select(people).where(people.c.name == name, people.c.active)).one_or_none()
        return Person(row.id, row.name, row.role) if row is not None else None

    def everyone(self) -> list[dict[str, Any]]:
        """All people: id, name, role, active, logs_in (they have a password), created."""
        with self._db.read() as connection:
            rows = connection.execute(select(people).order_by(people.c.id)).all()
        return [
            {"id": r.id, "name": r.name, "role": r.role, "active": r.active, "logs_in": r.password is not None, "created": r.created}
            for r in rows
        ]

    def set_active(self, number: int, active: bool, by: Person) -> None:
        """Shut somebody out, or let them in again; what they said stays. Their sessions end, and the links that they made.

        Raises:
            UserError: there is no such person, or it is the last active owner.
        """
        with self._db.write() as connection:
            row = connection.execute(select(people).where(people.c.id == number)).one_or_none() if 0 < number < 2**31 else None
            if row is None:
                raise UserError(f"There is no person {number}.")
            owners = select(func.count()).select_from(people).where(people.c.role == "owner", people.c.active, people.c.id != number)
            if not active and row.role == "owner" and not connection.execute(owners).scalar_one():
                raise UserError(f"'{row.name}' is the only owner; make another one first.")
            connection.execute(update(people).where(people.c.id == number).values(active=active))
            connection.execute(delete(sessions).where(sessions.c.person == number))
            if not active:
                theirs = or_(invitations.c.person == number, invitations.c.made_by == number)
                connection.execute(delete(invitations).where(theirs, invitations.c.taken_by.is_(None)))
            self._db.note(connection, "person shut out" if not active else "person let in", by.id, after={"person": number})

    def check_password(self, name: str, password: str) -> Person | None:
        """Who this is, or None. It takes as long for a name that there is not."""
        found = self._verified(name, password)
        return found and found[0]

    def enter(self, name: str, password: str) -> str | None:
        """A new session's token for whoever this is, or None. Of a password that is changed meanwhile nothing comes any more."""
        found = self._verified(name, password)
        if found is None:
            return None
        person, hashed = found
        with self._db.write() as connection:
            still = select(people.c.id).where(people.c.id == person.id, people.c.active, people.c.password == hashed)
            return None if connection.execute(still).first() is None else self._begin(connection, person)

    def _verified(self, name: str, password: str) -> tuple[Person, str] | None:
        """Who this is, and the hash that says so."""
        from argon2.exceptions import InvalidHashError, VerificationError

        if not is_unicode(password) or not is_unicode(name) or len(password) > LONGEST or "\x00" in name:
            return None
        with self._db.read() as connection:
            row = connection.execute(select(people).where(people.c.name == name.strip(), people.c.active)).one_or_none()
        try:
            _hasher().verify(row.password if row is not None and row.password else _nobody(), password)
        except (VerificationError, InvalidHashError):
            return None
        return (Person(row.id, row.name, row.role), row.password) if row is not None and row.password else None

    # Invitations.

    def invite(self, role: str, by: Person | None = None) -> str:
        """The token of a link by which one person may choose a name and a password, once, within a week. By nobody in particular it
        takes the place of those for this role that are open.

        Raises:
            UserError: there is no such role.
        """
        _check_role(role)
        with self._db.write() as connection:
            if by is None:  # printed where the server starts: the last one that was printed counts
                new = invitations.c.person.is_(None)
                connection.execute(delete(invitations).where(invitations.c.role == role, invitations.c.taken_by.is_(None), new))
            token = self._new(connection, role, by)
            self._db.note(connection, "invited", by.id if by is not None else None, after={"role": role})
        return token

    def new_password(self, number: int, by: Person | None = None) -> str:
        """The token of a link by which this person may choose a new password, once, within a week. It takes the place of an earlier one.

        Raises:
            UserError: there is no such person, or they are shut out.
        """
        with self._db.write() as connection:
            row = connection.execute(select(people).where(people.c.id == number)).one_or_none() if 0 < number < 2**31 else None
            if row is None or not row.active:
                raise UserError(f"There is no person {number} who could log in.")
            connection.execute(delete(invitations).where(invitations.c.person == number, invitations.c.taken_by.is_(None)))
            token = self._new(connection, row.role, by, number)
            self._db.note(connection, "new password offered", by.id if by is not None else None, after={"person": number})
        return token

    def _new(self, connection: Connection, role: str, by: Person | None, person: int | None = None) -> str:
        token, now = secrets.token_urlsafe(24), self._db.clock()
        row = {"token": _digest(token), "role": role, "created": now, "expires": now + INVITED, "person": person, "made_by": by and by.id}
        connection.execute(insert(invitations).values(**row))
        return token

    def invitations(self) -> list[Invitation]:
        """Those that can be taken, the newest first."""
        with self._db.read() as connection:
            rows = connection.execute(self._open().order_by(invitations.c.created.desc(), invitations.c.token)).all()
        return [Invitation(r.token, r.role, r.name, r.expires) for r in rows]

    def revoke(self, digest: str, by: Person) -> None:
        """End an invitation.

        Raises:
            UserError: it was taken already, or there is none.
        """
        with self._db.write() as connection:
            gone = delete(invitations).where(invitations.c.token == digest, invitations.c.taken_by.is_(None))
            if not is_unicode(digest) or not connection.execute(gone).rowcount:
                raise UserError("This invitation was taken already, or there is none.")
            self._db.note(connection, "invitation ended", by.id)

    def invited(self, token: str) -> Invitation | None:
        """What a link is for, or None if it is no invitation, was taken or has ended."""
        with self._db.read() as connection:
            return self._invited(connection, token)

    def _invited(self, connection: Connection, token: str) -> Invitation | None:
        if not is_unicode(token):
            return None
        row = connection.execute(self._open().where(invitations.c.token == _digest(token))).one_or_none()
        return None if row is None else Invitation(row.token, row.role, row.name, row.expires)

    def _open(self) -> Select:
        query = select(invitations, people.c.name).join(people, people.c.id == invitations.c.person, isouter=True)
        return query.where(invitations.c.taken_by.is_(None), invitations.c.expires > self._db.clock())

    def accept(self, token: str, name: str, password: str) -> Person:
        """Take an invitation. Of one for a new password the name is known, and whoever was logged in by the old one is not any more.

        Raises:
            UserError: it cannot be taken any more, the name is taken, or the password is too short.
        """
        told = self.invited(token)
        row = self._row(told.name if told and told.name else name, "labeler", password)
        with self._db.write() as connection:
            invitation = self._invited(connection, token)
            if invitation is None:
                raise UserError("This invitation was taken already or has ended; ask for another one.")
            if invitation.name is None:
                person = self._insert(connection, row | {"role": invitation.role})
            else:
                found = connection.execute(select(people).where(people.c.name == invitation.name)).one()
                person = Person(found.id, found.name, found.role)
                connection.execute(update(people).where(people.c.id == person.id).values(password=row["password"]))
                connection.execute(delete(sessions).where(sessions.c.person == person.id))
                self._db.note(connection, "password changed", person.id)
            connection.execute(update(invitations).where(invitations.c.token == _digest(token)).values(taken_by=person.id))
        return person

    # Sessions.

    def log_in(self, person: Person) -> str:
        """A new session's token. It is never one that was there before (so that nobody can be given theirs)."""
        with self._db.write() as connection:
            return self._begin(connection, person)

    def _begin(self, connection: Connection, person: Person) -> str:
        token, now = secrets.token_urlsafe(32), self._db.clock()
        row = {"token": _digest(token), "person": person.id, "csrf": secrets.token_urlsafe(24), "created": now, "used": now}
        connection.execute(delete(sessions).where(sessions.c.used < now - IDLE))
        connection.execute(insert(sessions).values(**row))
        self._db.note(connection, "logged in", person.id)
        return token

    def session(self, token: str) -> Session | None:
        """Who is logged in by this token."""
        if not is_unicode(token):
            return None
        now = self._db.clock()
        with self._db.read() as connection:
            row = connection.execute(SESSION, {"digest": _digest(token), "since": now - IDLE}).one_or_none()
        if row is None:
            return None
        if now - row.used > TOUCH:
            with self._db.write() as connection:
                connection.execute(update(sessions).where(sessions.c.token == row.token).values(used=now))
        return Session(Person(row.person, row.name, row.role), row.csrf)

    def log_out(self, token: str) -> None:
        """End a session."""
        with self._db.write() as connection:
            connection.execute(delete(sessions).where(sessions.c.token == _digest(token)))


def check_password(password: str) -> None:
    """Raises:
    UserError: it is too short, too long, or no text.
    """
    if not SHORTEST <= len(password) <= LONGEST or not is_unicode(password):
        raise UserError(f"A password has {SHORTEST} to {LONGEST} characters; a few words that only you put together are easy to keep.")


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise UserError(f"There is no role '{role}'; there are {', '.join(ROLES)}.{did_you_mean(role, ROLES)}")


def code_of(token: str) -> str:
    """Four letters by which a link is known among others: the beginning of what the store has of it."""
    return _digest(token)[:4]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _hasher() -> Any:
    from argon2 import PasswordHasher

    return PasswordHasher()


@cache
def _nobody() -> str:
    """The hash of a password that nobody has."""
    hashed: str = _hasher().hash(secrets.token_hex())
    return hashed
