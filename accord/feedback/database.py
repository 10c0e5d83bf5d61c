"""The label store's database: opened, migrated, one writer at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from alembic.util.exc import CommandError
from sqlalchemy import URL, BigInteger, Connection, Engine, Integer, bindparam, create_engine, event, func, insert, make_url, select
from sqlalchemy.exc import SQLAlchemyError

from accord.data.sources import is_unicode
from accord.errors import UserError, first_line
from accord.feedback.schema import events

NOTE = insert(events)
WRITER = 4_217  # PostgreSQL's advisory lock of whoever writes
ALONE = select(func.pg_advisory_xact_lock(bindparam("writer", type_=BigInteger)))
BESIDE = select(
    func.pg_advisory_xact_lock_shared(bindparam("writer", type_=BigInteger)),
    func.pg_advisory_xact_lock(bindparam("writer", type_=Integer), bindparam("of", type_=Integer)),
)


class Database:
    """SQLite in a file, in WAL, or PostgreSQL. Open with :meth:`open`."""

    def __init__(self, engine: Engine, clock: Callable[[], float], url: str) -> None:
        self.engine, self.clock, self.url = engine, clock, url
        # SQLite's own waiting is by sleeping, ever longer; threads of one process wait here for each other instead.
        self._writer = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()

    @classmethod
    def open(cls, url: str | Path, clock: Callable[[], float] = time.time) -> Database:
        """A database by its URL, or an SQLite file; made or migrated if need be.

        Raises:
            UserError: it cannot be opened.
        """
        shown = str(url)
        try:
            if "://" in shown:
                place = make_url(shown.replace("postgresql://", "postgresql+psycopg://", 1))
            else:
                place = URL.create("sqlite", database=str(Path(shown).expanduser().absolute()))
            shown = place.render_as_string(hide_password=True)
            engine = create_engine(place, pool_size=20, max_overflow=20)
            if engine.dialect.name == "sqlite":
                event.listen(engine, "connect", _sqlite_connection)
                event.listen(engine, "begin", _sqlite_begin)
            database = cls(engine, clock, shown)
            with database.write() as connection:
                _migrate(connection)
        except (SQLAlchemyError, CommandError, ImportError, ValueError) as error:
            raise UserError(f"The label store {shown} cannot be opened: {first_line(error)}") from None
        return database

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def write(self, of: int | None = None) -> Iterator[Connection]:
        """One transaction; whoever else writes waits, so that what was read still holds when it is written.

        Args:
            of: a person's number: this changes only what is theirs, and by statements that say under which condition what they share
                with others. PostgreSQL lets others do the like at the same time; SQLite has one writer.
        """
        with self._writer, self.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(ALONE if of is None else BESIDE, {"writer": WRITER, "of": of})
            yield connection

    @contextmanager
    def read(self, snapshot: bool = False) -> Iterator[Connection]:
        """One transaction that only reads; it waits for nobody. ``snapshot``: everything is read as it is at one moment."""
        with self.engine.connect().execution_options(reads=True) as connection:
            if connection.dialect.name == "postgresql":  # SQLite's are always; without one no begin and end have to be sent
                connection = connection.execution_options(isolation_level="REPEATABLE READ" if snapshot else "AUTOCOMMIT")
            with connection.begin():
                yield connection

    def note(
        self,
        connection: Connection,
        kind: str,
        person: int | None = None,
        assignment: int | None = None,
        key: str | None = None,
        before: Any = None,
        after: Any = None,
    ) -> None:
        """Append to the event log: who did what to which assignment, and what stood before and after."""
        row = {"at": self.clock(), "person": person, "kind": kind, "assignment": assignment, "key": key, "before": before, "after": after}
        connection.execute(NOTE, row)


def check_text(text: str, what: str, most: int, empty: bool = False) -> None:
    """Refuse what a database does not hold."""
    if (not text.strip() and not empty) or len(text) > most or "\x00" in text or not is_unicode(text):
        raise UserError(f"{what} must have {'at most' if empty else '1 to'} {most} characters, without NUL and half surrogate pairs.")


def _sqlite_connection(connection: Any, _: Any) -> None:
    """Transactions are begun by us, so that two writers never wait for each other; what is committed survives a power cut."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
