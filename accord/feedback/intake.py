"""What comes into a label store: completions, known rankings, the criterion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from accord.data.records import Completion, Ranking
from accord.data.sources import read_completions, read_rankings
from accord.disk import read_text
from accord.errors import UserError
from accord.feedback.store import Kind, Store
from accord.progress import several


def set_criterion(store: Store, path: str | None) -> None:
    """Tell labelers what a Markdown file says; without one what the store has, at first accord's own."""
    now = store.criterion()
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"Criterion {path} does not exist.")
        text = read_text(Path(path))
    elif now is None:
        text = (files("accord.feedback") / "helpful-honest-harmless.md").read_text()
    else:
        return
    if now is None or now[1] != text:
        store.set_criterion(text)


@dataclass(frozen=True)
class Intake:
    """What files bring into a store: completions by prompt, which ranks of them are known, and rankings."""

    completions: dict[str, list[Completion]]
    known: dict[str, tuple[Kind, Ranking]]
    rankings: list[Ranking]

    @classmethod
    def read(
        cls, completions: Sequence[str], gold: str | None = None, calibration: str | None = None, rankings: str | None = None
    ) -> Intake:
        """Everything that can be refused before there is a store.

        Args:
            gold, calibration: rankings that are known to be right, one a prompt.

        Raises:
            UserError: a file is not as it should be.
        """
        given: dict[str, list[Completion]] = {}
        for source in completions:
            for key, group in read_completions(source, with_tokens=False).items():
                if key in given:
                    raise UserError(f"{source}: prompt '{key}' is in another of the files too.")
                given[key] = group
        known: dict[str, tuple[Kind, Ranking]] = {}
        kinds: tuple[tuple[Kind, str | None], ...] = (("gold", gold), ("calibration", calibration))
        for kind, path in kinds:
            for ranking in read_rankings(path) if path else ():
                if ranking.prompt_id in known:
                    raise UserError(f"{path}: prompt '{ranking.prompt_id}' has known ranks already.")
                known[ranking.prompt_id] = (kind, ranking)
        for key, (_, ranking) in known.items():
            if key in given and len(given[key]) != len(ranking.ranks):
                raise UserError(f"'{key}' has {len(given[key])} completions, and {len(ranking.ranks)} ranks of it are known.")
        return cls(given, known, read_rankings(rankings) if rankings else [])

    @property
    def elsewhere(self) -> list[str]:
        """Prompts whose ranks are known and whose completions are not here; the store must have them."""
        return [key for key in self.known if key not in self.completions]

    def bring_into(self, store: Store) -> Iterator[str]:
        """Add it; prompts whose ranks are known become gold or calibration items.

        Yields:
            A line for people, for each kind of item.

        Raises:
            UserError: it does not fit what is in the store.
        """
        there = store.of_prompts(self.elsewhere)
        if missing := sorted(set(self.elsewhere) - there.keys()):
            raise UserError(f"Of '{missing[0]}', whose ranks are known, there are no completions, neither here nor in the store; give --completions too.")  # fmt: skip
        everything = self.completions | there
        for kind, what in WHAT.items():
            mine = {key: group for key, group in everything.items() if (self.known[key][0] if key in self.known else "real") == kind}
            ranks = {key: self.known[key][1].ranks for key in mine if key in self.known}
            if mine:
                yield f"{several(len(mine), 'prompt')} {what}, {store.add_items(mine, kind, ranks or None)} of them new."
        if self.rankings:
            yield f"{several(len(self.rankings), 'ranking')}, {store.add_rankings(self.rankings)} of them new."


WHAT: dict[Kind, str] = {"real": "to rank", "gold": "with known ranks", "calibration": "to begin with"}
