"""Where a command's preferences come from: pairs, rankings of completions, or a label store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accord.data.pairs import group_pairs
from accord.data.records import PairGroup, RankedCompletions
from accord.data.sources import read_completions, read_pairs, read_rankings, read_weights
from accord.errors import UserError, needs

if TYPE_CHECKING:
    from accord.feedback.store import Store


class Given(NamedTuple):
    """The options ``--pairs``, or ``--completions`` with ``--rankings``, or ``--store``; and ``--labeler-weights``."""

    pairs: str | None = None
    completions: str | None = None
    rankings: str | None = None
    store: str | None = None
    labeler_weights: str | None = None

    @contextmanager
    def ranked(self) -> Iterator[tuple[Iterable[RankedCompletions], dict[str, float] | None]]:
        """Completions and rankings of them, some prompts at a time, and labelers' weights if they are given."""
        weights = read_weights(self.labeler_weights) if self.labeler_weights else None
        if self.store:
            if self.completions or self.rankings:
                raise UserError("--store has the completions and the rankings; leave out --completions and --rankings.")
            with opened(self.store) as store:
                yield store.by_prompt(), weights
        elif self.rankings and self.completions:
            yield [RankedCompletions(read_completions(self.completions, with_tokens=False), read_rankings(self.rankings))], weights
        else:
            raise UserError("Give --rankings together with --completions, or --store.")

    def check(self) -> None:
        """Raises:
        UserError: not one of the three is given.
        """
        if bool(self.pairs) == bool(self.rankings or self.store):
            raise UserError("Give one of --pairs, --rankings together with --completions, and --store.")
        if self.labeler_weights and self.pairs:
            raise UserError("--labeler-weights weigh --rankings; pairs have no labelers any more.")

    def groups(self, fail_weight: float) -> list[PairGroup]:
        """The pairs of all prompts.

        Raises:
            UserError: not one of the three is given, or what is given does not belong together.
        """
        self.check()
        if self.pairs:
            return read_pairs(self.pairs)
        with self.ranked() as (some, weights):
            given = list(some)
        completions = {key: group for one in given for key, group in one.completions.items()}
        return group_pairs(completions, [r for one in given for r in one.rankings], fail_weight, weights)


@contextmanager
def opened(url: str, make: bool = False) -> Iterator[Store]:
    """A label store, closed in the end. ``make``: it need not be there yet."""
    with needs("label"):
        from accord.feedback.store import Store
    if not make and "://" not in url and not Path(url).is_file():
        raise UserError(f"There is no label store {url}; accord label --store {url} makes it.")
    store = Store.open(url)
    try:
        yield store
    finally:
        store.close()
