"""What comes into a label store: completions, known rankings, the criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from accord.data.records import Completion
from accord.data.sources import read_completions, read_rankings
from accord.disk import read_text
from accord.errors import UserError
from accord.feedback.store import Kind, Store


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


def begin_with(store: Store, completions: Sequence[str], gold: str | None = None, calibration: str | None = None) -> Iterator[str]:
    """Add the completions of files; those that a file of known rankings speaks of become gold or calibration items.

    Yields:
        A line for people, for each kind of item.

    Raises:
        UserError: a file is not as it should be, or known rankings speak of other completions.
    """
    given: dict[str, list[Completion]] = {}
    for source in completions:
        for key, group in read_completions(source, with_tokens=False).items():
            if key in given:
                raise UserError(f"{source}: prompt '{key}' is in another of the files too.")
            given[key] = group
    known: dict[str, tuple[Kind, Sequence[int | None]]] = {}
    for kind, path in (("gold", gold), ("calibration", calibration)):
        for ranking in read_rankings(path) if path else ():
            if ranking.prompt_id not in given:
                raise UserError(f"{path}: prompt '{ranking.prompt_id}' is not among the --completions.")
            if ranking.prompt_id in known:
                raise UserError(f"{path}: prompt '{ranking.prompt_id}' has known ranks already.")
            known[ranking.prompt_id] = (kind, ranking.ranks)  # type: ignore[assignment]
    kinds: tuple[Kind, ...] = ("real", "gold", "calibration")
    for kind in kinds:
        mine = {key: group for key, group in given.items() if known.get(key, ("real",))[0] == kind}
        ranks: Mapping[str, Sequence[int | None]] = {key: known[key][1] for key in mine if key in known}
        if mine:
            new = store.add_items(mine, kind, ranks or None)
            what = {"real": "prompts to rank", "gold": "prompts with known ranks", "calibration": "prompts to begin with"}[kind]
            yield f"{len(mine)} {what}, {new} of them new."
