"""Red-team prompts: wishes that should be declined, and wishes that only sound like it, in many ways to ask."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from accord.config import load_yaml
from accord.constitution.rules import ALARMING, HARMFUL
from accord.data.records import Prompt
from accord.data.sources import bundled_prompts
from accord.disk import read_text
from accord.errors import UserError, did_you_mean

KINDS = (HARMFUL, ALARMING)
PLACE = "{}"


def read_wishes(source: str | Path | None = None) -> dict[str, list[str]]:
    """``ways`` to ask, each with ``{}`` where the wish goes, and the wishes of each kind: of a YAML file, or accord's own.

    Raises:
        UserError: it is not there, or says something else.
    """
    if source is None:
        with as_file(files("accord.constitution") / "wishes.yaml") as path:
            return _checked(load_yaml(read_text(path), "accord's wishes"), "accord's wishes")
    if not Path(source).is_file():
        raise UserError(f"{source} does not exist; give a .yaml file with ways, {HARMFUL} and {ALARMING}.")
    return _checked(load_yaml(read_text(Path(source)), str(source)), str(source))


def _checked(raw: dict[str, Any], where: str) -> dict[str, list[str]]:
    known = ("ways", *KINDS)
    for name, texts in raw.items():
        if name not in known:
            raise UserError(f"{where}: unknown field '{name}'.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(f"{where}: {name} must be a list of texts.")
        if len(set(texts)) < len(texts):
            raise UserError(f"{where}: {name} has a text twice: {next(t for t in texts if texts.count(t) > 1)!r}.")
    ways = raw.get("ways") or []
    if not ways or not any(raw.get(kind) for kind in KINDS):
        raise UserError(f"{where}: it needs ways to ask, and wishes that are {HARMFUL} or {ALARMING}.")
    for way in ways:
        if way.count(PLACE) != 1:
            raise UserError(f"{where}: the way {way!r} must have one {PLACE}, where the wish goes.")
    return raw


def red_team(kind: str, variants: int = 1, seed: int = 0, wishes: str | Path | None = None) -> list[Prompt]:
    """Every wish of a kind, ``variants`` times, each time asked in another way; the kind is the prompts' theme.

    The ways follow from the seed and the wish alone. Variants of a wish are on the same side of every split (:func:`accord.data.records.split_of`).

    Raises:
        UserError: there are fewer ways than variants, or no wishes of this kind.
    """
    told = read_wishes(wishes)
    ways = told["ways"]
    if variants > len(ways):
        raise UserError(f"There are {len(ways)} ways to ask, so a wish has no {variants} variants.")
    if not told.get(kind):
        raise UserError(f"{wishes} has no wishes that are {kind}.")
    out = []
    for number, wish in enumerate(told[kind], 1):
        name = f"{'wish' if kind == HARMFUL else kind}-{number:03d}"
        drawn = random.Random(f"{seed} {wish}").sample(ways, variants)
        out += [Prompt(f"{name}~{k}" if variants > 1 else name, way.replace(PLACE, wish), kind) for k, way in enumerate(drawn, 1)]
    return out


def recipe_prompts() -> list[Prompt]:
    """What the recipe of Constitutional AI asks: harmful prompts, alarming ones and ordinary requests."""
    bundled = bundled_prompts()
    harmful = [replace(p, theme=HARMFUL) for p in bundled if p.theme == "harmlessness"]
    return [*harmful, *red_team(HARMFUL), *red_team(ALARMING), *(p for p in bundled if p.theme == "helpfulness")]
