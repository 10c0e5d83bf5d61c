"""Files and folders that are the old one or the new one, never half; logs that end with a whole line; a full disk is waited for."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.markup import escape
from safetensors import SafetensorError

from accord.errors import UserError, first_line
from accord.progress import console, stop_requested

Result = TypeVar("Result")
FULL = (errno.ENOSPC, errno.EDQUOT)
WAIT, POLL = 3600.0, 2.0
"""Seconds that a full disk is waited for, unless ``ACCORD_DISK_WAIT`` says otherwise, and seconds between two looks."""


def write_whole(path: Path, text: str) -> None:
    """Write aside, flush to the disk and rename.

    Raises:
        UserError: it could not be written; what was there is still there.
    """

    def write() -> None:
        with _aside(path) as aside:
            aside.write_text(text, encoding="utf-8")

    patiently(path.parent, write)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yields the name of a new file that takes ``path``'s place, flushed to the disk, or is deleted if anything fails."""
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except BaseException:
        _forget(aside)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the name of a new file beside ``path`` that takes its place, flushed to the disk, once the block ends without an error.

    Raises:
        UserError: it could not be written; what was there is still there.
    """
    try:
        with _aside(path) as aside:
            yield aside
    except OSError as error:
        raise disk_error(path.parent, error) from None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """:func:`write_whole` of rows as JSON, one a line."""
    write_whole(path, "".join(map(as_line, rows)))


def stream_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """:func:`write_lines` of more rows than memory holds. Nothing is there if ``rows`` raises.

    Raises:
        UserError: they could not be written; what was there is still there.
    """
    left = iter(rows)
    with whole_file(path) as aside:
        aside.write_bytes(b"")
        while some := list(islice(left, 1000)):
            append_lines(aside, some)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows as JSON, one a line: all of them or none.

    Raises:
        UserError: they could not be written; the file is as it was.
    """
    data = "".join(map(as_line, rows)).encode()

    def write() -> None:
        with path.open("ab", buffering=0) as handle:
            before = os.fstat(handle.fileno()).st_size
            try:
                left = memoryview(data)
                while left:
                    left = left[handle.write(left) :]
            except OSError:
                handle.truncate(before)  # which needs no room
                raise

    patiently(path.parent, write)


def as_line(row: Mapping[str, Any]) -> str:
    """A row as JSON. Half a surrogate pair, which no encoding has, is escaped as JSON escapes it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a log that accord itself appends to; none if there is no such file.

    Only a newline ends a row: JSON may hold the other characters that ``str.splitlines`` cuts at.

    Raises:
        UserError: a line is damaged; which one, and what to do.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is damaged ({error}); delete the line, or take the file from a copy.") from None
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {first_line(error)}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)}); save or copy it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; it holds a {type(value).__name__}. Save or copy it again.")
    return value


def lock(folder: Path) -> IO[str]:
    """Be the one writer of a folder until what is returned is closed, or the process ends, whatever ends it.

    Raises:
        UserError: another process is.
    """
    try:
        handle = (folder / ".lock").open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            handle.close()
            raise
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise UserError(f"{folder} is in use by another accord process; wait for it or choose another name.") from None
        raise disk_error(folder, error) from None
    return handle


def repair_lines(path: Path) -> None:
    """Cut a last line that was not written whole: a process ended in the middle of it."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        patiently(path.parent, lambda: os.truncate(path, data.rfind(b"\n") + 1))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside ``folder`` that takes its place, flushed to the disk, once the block ends without an error.

    Where ``folder`` exists already, its files are replaced one by one, and what else is in it stays.

    Raises:
        UserError: it could not be written; what was there is still there.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give the name of a folder.")
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        paths = sorted(aside.rglob("*"))
        for path in [*paths, aside]:
            flush(path)
        if not folder.exists():
            os.replace(aside, folder)
        else:
            for path in paths:
                there = folder / path.relative_to(aside)
                there.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, there)
            flush(folder)
            shutil.rmtree(aside, ignore_errors=True)
        flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, Exception) and number_of(error):  # of Python, or of a library in Rust
            raise disk_error(folder.parent, error) from None
        raise


def patiently(folder: Path, write: Callable[[], Result], needed: int = 0) -> Result:
    """Do ``write``; while the disk is full, say so once and try again.

    Args:
        needed: bytes that must be free before it is tried.

    Raises:
        UserError: it failed for another reason, the wait was long enough (``ACCORD_DISK_WAIT``, in seconds), or a stop was
            asked for.
    """
    until, told = time.monotonic() + disk_wait(), False
    while True:
        try:
            if needed and shutil.disk_usage(folder).free < needed:
                raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed and {shutil.disk_usage(folder).free / 1e6:.0f} MB are free")
            result = write()
        except (OSError, SafetensorError) as error:
            if number_of(error) not in FULL or time.monotonic() >= until or stop_requested():
                raise disk_error(folder, error) from None
            if not told:
                console.print(f"[bold yellow]The disk of {escape(str(folder))} is full[/] ({escape(reason_of(error))}). Waiting; make room, or stop with Ctrl-C.", soft_wrap=True)  # fmt: skip
                told = True
            time.sleep(min(POLL, max(until - time.monotonic(), 0)))
            continue
        if told:
            console.print("There is room again; going on.")
        return result


def disk_wait() -> float:
    """Seconds that a full disk is waited for."""
    given = os.environ.get("ACCORD_DISK_WAIT", "")
    try:
        return float(given) if given else WAIT
    except ValueError:
        raise UserError(f"ACCORD_DISK_WAIT is '{given}'; it must be a number of seconds.") from None


def disk_error(folder: Path, error: Exception) -> UserError:
    return UserError(f"Cannot write to {folder}: {reason_of(error)}. Make room or fix the permissions, then start it again or go on with accord resume; nothing that was whole is lost.")  # fmt: skip


def reason_of(error: Exception) -> str:
    number = number_of(error)
    return (isinstance(error, OSError) and error.strerror) or (os.strerror(number) if number else str(error))


def number_of(error: Exception) -> int:
    """The system's error number, or 0; of safetensors and tokenizers, from the text."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def flush(path: Path) -> None:
    """Have what was written to a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _forget(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
