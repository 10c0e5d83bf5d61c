"""A label store as one file, and back: of SQLite and PostgreSQL alike, so that it is also the way from one to the other.

A zip archive: ``manifest.json`` and a ``.jsonl`` file a table. Everything is in it but who is logged in at the moment and
invitations that are open. Passwords are in it as their argon2id hashes; keep it as you keep the store.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from sqlalchemy import Connection, Table, delete, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from accord import __version__
from accord.disk import whole_file
from accord.errors import UserError, first_line
from accord.feedback.schema import about, assignments, criteria, events, invitations, items, people, sessions
from accord.feedback.store import Store

FORMAT = 1
TABLES = (about, people, criteria, items, assignments, events)  # each after what it refers to
CHUNK = 1000


def back_up(store: Store, out: Path) -> dict[str, int]:
    """Write all of a store as it is at one moment, also while people label; returns how many rows of each table.

    Raises:
        UserError: ``out`` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out or delete it.")
    tables: dict[str, dict[str, Any]] = {}
    with (
        store.database.read(snapshot=True) as connection,
        whole_file(out) as aside,
        zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for table in TABLES:
            digest, count = hashlib.sha256(), 0
            with archive.open(f"{table.name}.jsonl", "w", force_zip64=True) as file:
                for row in connection.execution_options(yield_per=CHUNK).execute(select(table).order_by(*table.primary_key)):
                    line = (json.dumps(dict(row._mapping), ensure_ascii=True) + "\n").encode()
                    file.write(line)
                    digest.update(line)
                    count += 1
            tables[table.name] = {"rows": count, "sha256": digest.hexdigest()}
        manifest = {"format": FORMAT, "accord": __version__, "revision": _revision(connection), "tables": tables}
        archive.writestr("manifest.json", json.dumps(manifest, indent=1))
    return {name: told["rows"] for name, told in tables.items()}


def restore(path: Path, store: Store) -> dict[str, int]:
    """Fill a store without items and without people who log in; all of it or nothing. Returns how many rows of each table.

    Raises:
        UserError: the store has more in it, or the file is damaged, no backup, or of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive, store.database.write() as connection:
            manifest = json.loads(archive.read("manifest.json"))
            revision = _revision(connection)
            if manifest["format"] != FORMAT or manifest["revision"] != revision:
                raise UserError(f"{path} was made by accord {manifest['accord']} (revision {manifest['revision']}); this is {__version__} (revision {revision}). Restore it with that version; a newer one then migrates the store.")  # fmt: skip
            held = {"items": select(items.c.id), "people": select(people.c.id).where(people.c.password.is_not(None))}
            for what, some in held.items():
                if connection.execute(some.limit(1)).first() is not None:
                    raise UserError(f"The store {store.database.url} has {what} in it already; restore into a new one.")
            for table in (sessions, invitations, *reversed(TABLES)):  # what a start without items leaves
                connection.execute(delete(table))
            for table in TABLES:
                _fill(connection, table, archive, manifest["tables"][table.name], path)
        store.reload()
    except (zipfile.BadZipFile, SQLAlchemyError, zlib.error, KeyError, ValueError, TypeError, OSError, EOFError) as error:
        raise UserError(f"{path} is no backup of a label store, or damaged: {first_line(error)}") from None
    return {name: told["rows"] for name, told in manifest["tables"].items()}


def _fill(connection: Connection, table: Table, archive: zipfile.ZipFile, told: dict[str, Any], path: Path) -> None:
    digest, count = hashlib.sha256(), 0
    with archive.open(f"{table.name}.jsonl") as file:
        while lines := list(islice(file, CHUNK)):
            digest.update(b"".join(lines))
            count += len(lines)
            connection.execute(insert(table), [json.loads(line) for line in lines])
    if (count, digest.hexdigest()) != (told["rows"], told["sha256"]):
        raise UserError(f"{path} is damaged: {table.name} is not what was written.")
    if connection.dialect.name == "postgresql" and "id" in table.c:  # so that the next row's number is a new one
        connection.execute(
            text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), (SELECT coalesce(max(id), 0) + 1 FROM {table.name}), false)")
        )


def _revision(connection: Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""
