"""The pages of owners and reviewers: how it goes, who does what, what goes in and out."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, HTTPException, Request, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from accord.data.charts import line_chart
from accord.data.records import as_written
from accord.data.sources import read_completions
from accord.errors import UserError
from accord.feedback.export import Rows, rows
from accord.feedback.overview import SAYS, Overview, overview
from accord.feedback.people import ROLES, code_of
from accord.feedback.statements import RULING
from accord.feedback.store import Store
from accord.feedback.summary import MEANING
from accord.feedback.web.render import markdown, turns
from accord.feedback.web.retraining import Retraining
from accord.feedback.web.site import Owner, Reviewer, Site

routes = APIRouter()
SHOWN = 20  # disputed prompts
FORMATS: tuple[Rows | Literal["events"], ...] = ("rankings", "completions", "pairs", "groups", "unpaired", "events")
UPLOADED = (".jsonl", ".json", ".csv", ".parquet")


class Watched:
    """The overview, computed again when something has happened, but never for most of the time."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._last: Overview | None = None
        self._event, self._until = -1, 0.0

    def now(self) -> Overview:
        with self._lock:
            event = self._store.newest_event()
            if self._last is None or (event != self._event and time.monotonic() > self._until):
                begun = time.monotonic()
                self._last, self._event = overview(self._store), event
                self._until = time.monotonic() + 10 * (time.monotonic() - begun)
            return self._last


@routes.get("/overview", response_class=HTMLResponse)
def overview_page(request: Request, session: Reviewer) -> Response:
    return _overview(request, session)


def _overview(request: Request, session: Any, status: int = 200, **told: Any) -> Response:
    site = Site.of(request)
    watched: Watched = request.app.state.watched
    seen = watched.now()
    numbers = [(meaning, getattr(seen.agreement, name)) for name, meaning in MEANING.items()] if seen.agreement else []
    decided = {r.prompt_id for r in site.store.rankings(number=RULING)}
    some = [of for of in (seen.agreement.disputed if seen.agreement else []) if of.same < 1][:SHOWN]
    asked = site.store.of_prompts([of.prompt for of in some])
    disputed = [(of, asked[of.prompt][0].prompt.text, of.prompt in decided) for of in some if of.prompt in asked]
    days = line_chart("Rankings a day", {"rankings": [(float(k), float(n)) for k, (_, n) in enumerate(seen.days)]}, f"{seen.days[0][0]} to {seen.days[-1][0]}", "day") if len(seen.days) > 1 else ""  # fmt: skip
    retraining: Retraining | None = request.app.state.retraining
    trained = retraining.history() if retraining else []
    version, text = site.store.criterion() or ("", "")
    values = {"link": "", "whose": "", "error": "", "done": ""} | told
    return site.page(
        request, "overview", session, status, seen=seen, numbers=numbers, disputed=disputed, days=days, says=SAYS, trains=retraining is not None,
        training=retraining is not None and retraining.running, trained=trained, accuracy=_accuracy(trained), formats=FORMATS, people=site.store.people.everyone(), invitations=site.store.people.invitations(),
        version=version, criterion=text, roles=ROLES, clock=lambda at: time.strftime("%Y-%m-%d %H:%M", time.localtime(at)), overlap=site.store.settings.overlap, **values,
    )  # fmt: skip


def _accuracy(trained: list[dict[str, Any]]) -> str:
    """How right the reward models are, as labels arrive, beside how far labelers agree."""
    points = lambda name: [(float(row["rankings"]), row[name]["value"]) for row in trained if row.get(name)]
    if len(points("accuracy")) < 2:
        return ""
    note = "Held-out pairs ordered rightly; and how often two labelers agree on two completions, which is about what can be reached."
    return line_chart("Reward model", {"reward model": points("accuracy"), "people": points("ceiling")}, note, "rankings")


@routes.get("/overview/disputed", response_class=HTMLResponse)
def disputed(request: Request, session: Reviewer, prompt: str) -> Response:
    """How everybody ranked one prompt."""
    site = Site.of(request)
    completions, rankings = site.store.of_prompt(prompt)
    ranked = [{**vars(r), "ranks": as_written(r.ranks)} for r in rankings]
    return site.page(
        request, "disputed", session, prompt_id=prompt, turns=turns(completions[0].prompt.content),
        answers=[markdown(c.text) for c in completions], ranked=ranked, decided=any(r.decision for r in rankings),
    )  # fmt: skip


@routes.post("/overview/decide")
def decide(request: Request, session: Reviewer, prompt: Annotated[str, Form(max_length=500)]) -> Response:
    """A reviewer's ranking of a prompt, which stands in the place of all others in what is trained on."""
    given = Site.of(request).store.rule(session.person, prompt)
    return RedirectResponse(f"/label?item={given.id}&then=disputed", 303)


@routes.get("/export/{name}.jsonl")
def export(request: Request, session: Reviewer, name: str) -> Response:
    """Everything, as it is read from the store."""
    kind = next((known for known in FORMATS if known == name), None)
    if kind is None:
        raise HTTPException(404, f"There is no export '{name}'; there are {', '.join(FORMATS)}.")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(Site.of(request).store, kind))
    return StreamingResponse(
        lines, media_type="application/x-ndjson", headers={"Content-Disposition": f'attachment; filename="{name}.jsonl"'}
    )


def _rows(store: Store, name: Rows | Literal["events"]) -> Iterator[dict[str, Any]]:
    if name == "events":
        last = 0
        while events := store.log(last):
            yield from events
            last = events[-1]["id"]
    else:
        for some in store.by_prompt():
            yield from rows(name, some)


@routes.post("/retrain")
def retrain(request: Request, session: Owner) -> Response:
    """A reward model from the labels so far."""
    if request.app.state.retraining is None:
        raise HTTPException(404, "This server trains nothing.")
    request.app.state.retraining.start()
    return RedirectResponse("/overview#reward", 303)


@routes.post("/people/invite", response_class=HTMLResponse)
def invite(request: Request, session: Owner, role: Annotated[str, Form(max_length=20)]) -> Response:
    """A link for one person."""
    return _with_link(request, session, Site.of(request).store.people.invite(role, session.person), f"somebody new, as {role}")


@routes.post("/people/revoke")
def revoke(request: Request, session: Owner, invitation: Annotated[str, Form(max_length=64)]) -> Response:
    """A link that is not to be taken any more."""
    Site.of(request).store.people.revoke(invitation, session.person)
    return RedirectResponse("/overview#people", 303)


@routes.post("/people/{number}/password", response_class=HTMLResponse)
def new_password(request: Request, session: Owner, number: int) -> Response:
    """A link by which somebody who has forgotten their password chooses another."""
    people = Site.of(request).store.people
    token = people.new_password(number, session.person)
    return _with_link(request, session, token, next(f"{p['name']}, a new password" for p in people.everyone() if p["id"] == number))


def _with_link(request: Request, session: Any, token: str, whose: str) -> Response:
    url = f"{request.url.scheme}://{request.headers['host']}/invite/{token}"
    return _overview(request, session, link=url, whose=f"{whose} ({code_of(token)})")


@routes.post("/people/{number}/active")
def set_active(request: Request, session: Owner, number: int, active: Annotated[bool, Form()]) -> Response:
    """Shut somebody out, or let them in again."""
    Site.of(request).store.people.set_active(number, active, session.person)
    return RedirectResponse("/overview#people", 303)


@routes.post("/criterion")
def set_criterion(request: Request, session: Owner, text: Annotated[str, Form(max_length=200_000)]) -> Response:
    """A new version of the instructions; labels keep the one by which they were given."""
    Site.of(request).store.set_criterion(text.replace("\r\n", "\n"), session.person)
    return RedirectResponse("/overview#criterion", 303)


@routes.post("/import", response_class=HTMLResponse)
def bring_in(request: Request, session: Owner, file: UploadFile) -> Response:
    """Completions from a file of the browser's. Of its name only the ending counts."""
    suffix = Path(file.filename or "").suffix.lower()
    if suffix not in UPLOADED:
        raise HTTPException(400, f"A file to import ends in {', '.join(UPLOADED)}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"uploaded{suffix}"
        path.write_bytes(file.file.read())
        try:
            given = read_completions(path, with_tokens=False)
        except UserError as error:
            raise UserError(str(error).replace(str(path), file.filename or "the file")) from None
    new = Site.of(request).store.add_items(given)
    return _overview(request, session, done=f"{len(given)} prompts to rank, {new} of them new.")
