"""The pages of whoever labels, and the JSON interface behind them. Everybody sees their own items only."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from accord.data.records import as_written
from accord.feedback.people import Person
from accord.feedback.store import FLAGS, MOST, Assignment, Label, Store
from accord.feedback.web.render import markdown, turns
from accord.feedback.web.site import Anyone, Site

routes = APIRouter()
REASONS = (
    "I do not understand the prompt",
    "It needs knowledge that I do not have",
    "I would rather not judge this",
    "Something is broken",
)
"""Why an item is skipped; or in one's own words."""

Rank = Annotated[StrictInt, Field(ge=1, le=MOST)] | Literal["F"]
Rating = Annotated[StrictInt, Field(ge=1, le=7)] | None


class Answer(BaseModel):
    """A labeler's answer, completions in the order in which they were shown."""

    model_config = ConfigDict(extra="forbid")

    request: Annotated[str, Field(min_length=8, max_length=100, pattern="^[0-9A-Za-z_-]+$")]
    ranks: Annotated[list[Rank], Field(max_length=MOST)] = []
    ratings: Annotated[list[Rating], Field(max_length=MOST)] = []
    flags: Annotated[list[Annotated[list[str], Field(max_length=len(FLAGS))]], Field(max_length=MOST)] = []
    note: Annotated[str, Field(max_length=10_000)] = ""
    reason: Annotated[str, Field(max_length=1000)] = ""
    seconds: Annotated[float, Field(ge=0, le=1e7)] | None = None

    def label(self, order: tuple[int, ...]) -> Label:
        """As the completions were imported: what was given for the place ``order[place]`` is shown at."""
        place = {index: place for place, index in enumerate(order)}
        arranged = lambda values: tuple(values[place[k]] for k in range(len(order))) if len(values) == len(order) else tuple(values)
        ranks = tuple(None if rank == "F" else rank for rank in arranged(self.ranks))
        return Label(ranks, arranged(self.ratings), tuple(tuple(dict.fromkeys(f)) for f in arranged(self.flags)), self.note, self.reason)


class Draft(BaseModel):
    """What a labeler has not submitted yet: the page's own state, kept as it is."""

    model_config = ConfigDict(extra="forbid")

    ranks: Annotated[list[Rank | None], Field(max_length=MOST)] = []
    ratings: Annotated[list[Rating], Field(max_length=MOST)] = []
    flags: Annotated[list[Annotated[list[str], Field(max_length=len(FLAGS))]], Field(max_length=MOST)] = []
    note: Annotated[str, Field(max_length=10_000)] = ""
    seconds: Annotated[float, Field(ge=0, le=1e7)] = 0.0
    at: Annotated[float, Field(ge=0, le=1e15)] = 0.0
    answers: Annotated[int, Field(ge=0, le=10**9)] = 0


@routes.get("/", response_class=RedirectResponse)
def home(session: Anyone) -> Response:
    return RedirectResponse("/label", 303)


@routes.get("/label", response_class=HTMLResponse)
def label_page(request: Request, session: Anyone) -> Response:
    return Site.of(request).page(request, "label", session, flags=FLAGS, reasons=REASONS)


@routes.get("/instructions", response_class=HTMLResponse)
def instructions(request: Request, session: Anyone) -> Response:
    site = Site.of(request)
    version, text = site.store.criterion() or ("", "There are no instructions yet.")
    return site.page(request, "instructions", session, version=version, html=markdown(text))


@routes.post("/api/next")
def next_item(request: Request, session: Anyone) -> dict[str, Any]:
    """What to do next, or nothing."""
    store = Site.of(request).store
    given = store.next(session.person)
    return {"item": given and shown(given), "work": work(store, session.person)}


@routes.get("/api/items/{number}")
def item(request: Request, session: Anyone, number: int) -> dict[str, Any]:
    """One's own item again."""
    store = Site.of(request).store
    return {"item": shown(store.assignment(session.person, number)), "work": work(store, session.person)}


@routes.put("/api/items/{number}/draft")
def draft(request: Request, session: Anyone, number: int, given: Draft) -> dict[str, Any]:
    """Keep what is not submitted yet."""
    return {"kept": Site.of(request).store.save_draft(session.person, number, given.model_dump())}


@routes.post("/api/items/{number}/label")
def label(request: Request, session: Anyone, number: int, answer: Answer) -> dict[str, Any]:
    """Submit an answer or change one; the same request again changes nothing."""
    store = Site.of(request).store
    seen: list[Assignment] = []

    def as_imported(given: Assignment) -> Label:
        seen.append(given)
        return answer.label(given.order)

    fresh = store.submit(session.person, number, as_imported, answer.request, answer.seconds)
    given = seen[0] if seen else store.assignment(session.person, number)
    gold = store.assignment(session.person, number).gold if given.calibration else None
    told_gold = by_place(as_written(gold), given.order) if gold else None
    return {"new": fresh, "gold": told_gold, "work": work(store, session.person)}


@routes.get("/api/history")
def history(request: Request, session: Anyone) -> dict[str, Any]:
    """One's own answers, the last first."""
    answers = Site.of(request).store.history(session.person)
    return {"items": [{"id": a.id, "prompt": a.prompt.text[:200], "label": told(a), "decision": a.decision} for a in answers]}


def work(store: Store, person: Person) -> dict[str, int]:
    """How much they have done, today by this machine's clock, and about how much is left: exactly told, it would say which items were known before."""
    midnight = datetime.datetime.fromtimestamp(store.database.clock()).replace(hour=0, minute=0, second=0, microsecond=0)
    found = store.work_of(person, midnight.timestamp())
    return found | {"left": found["left"] if found["left"] <= ABOUT else -(-found["left"] // ABOUT) * ABOUT}


ABOUT = 10


def by_place(values: Any, order: tuple[int, ...]) -> list[Any]:
    """What is known by completion, in the order in which they are shown."""
    return [values[k] for k in order] if values else []


def told(given: Assignment) -> dict[str, Any] | None:
    """A label as the page has it."""
    if given.label is None:
        return None
    row = given.label.to_json()
    row["ranks"] = as_written(row["ranks"])
    return row | {name: by_place(row[name], given.order) for name in ("ranks", "ratings", "flags")}


def shown(given: Assignment) -> dict[str, Any]:
    """An item as its labeler sees it: nothing in it says where a completion is from, or whether its ranks are known."""
    return {
        "id": given.id,
        "state": given.state,
        "calibration": given.calibration,
        "prompt": turns(given.prompt.content),
        "completions": [{"text": text, "html": markdown(text)} for text in by_place(given.completions, given.order)],
        "draft": given.draft,
        "label": told(given),
        "answers": given.answers,
        "decision": given.decision,
    }
