"""Rows that are too long: left out where that is asked for, refused where they exceed the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accord.errors import UserError
from accord.progress import console

Row = TypeVar("Row")


def fitting(
    rows: Sequence[Row], length: Callable[[Row], int], name: Callable[[Row], str], max_tokens: int | None, context: int, what: str
) -> list[Row]:
    """Those of at most ``max_tokens`` tokens.

    Args:
        length: of one, in tokens; ``name``: what to call it.
        what: they are, in words.

    Raises:
        UserError: none is left, or one of those that are exceeds the context.
    """
    kept = [row for row in rows if max_tokens is None or length(row) <= max_tokens]
    if len(kept) < len(rows):
        console.print(
            f"{len(rows) - len(kept)} of {len(rows)} {what} are longer than {max_tokens} tokens and are left out.", soft_wrap=True
        )
    if not kept:
        raise UserError(f"There are no {what} that are short enough; raise --max-tokens.")
    longest = max(kept, key=length)
    if length(longest) > context:
        over = sum(length(row) > context for row in kept)
        raise UserError(
            f"{over} of {len(kept)} {what} exceed the model's context of {context} tokens, such as '{name(longest)}' with "
            f"{length(longest)}; shorten them, or leave them out with --max-tokens {context}."
        )
    return kept
