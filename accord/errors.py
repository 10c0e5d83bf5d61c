"""The one error a user's mistake ends in: a sentence that names the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside accord is wrong (a file, a value, a disk); the message says what and what to do.

    The command line prints the message alone, without a traceback, and exits with ``code``.
    """

    code = 2


class GateMissed(UserError):
    """A stage ended, but what it produced is not good enough for the next one."""

    code = 3


class Diverged(UserError):
    """The numbers of a training run stopped being finite."""


class Interrupted(UserError):
    """The user asked to stop; everything up to here is saved."""

    code = 130


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing when no known word is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Within: imports that an extra brings.

    Raises:
        UserError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"'{error.name}' is not installed; run: pip install 'accord[{extra}]'") from None
