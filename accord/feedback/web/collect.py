"""A run's labeling stage: the page is served, and the run waits until people have ranked enough."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from accord.data.records import Completion, Ranking
from accord.errors import UserError
from accord.feedback.intake import set_criterion
from accord.feedback.settings import QueueSettings
from accord.feedback.store import MOST, Store
from accord.feedback.web.serve import announce, listen, serving, web_settings
from accord.progress import bar, console, safe_point

LOOK = 0.5  # seconds between two looks at how many there are


class Wanted(Protocol):
    """What :class:`accord.config.FeedbackSettings` says of it."""

    overlap: int
    enough: float
    accounts: bool
    host: str
    port: int
    seed: int


def collect(url: str, completions: Mapping[str, Sequence[Completion]], wanted: Wanted) -> list[Ranking]:
    """Rankings of at least the share ``wanted.enough`` of the prompts, each by ``wanted.overlap`` people.

    Raises:
        UserError: the page cannot be served, or the completions are more or fewer than people compare.
        Interrupted: a stop was asked for; labels are kept, and the same call goes on with them.
    """
    if any(not 2 <= len(group) <= MOST for group in completions.values()):
        raise UserError(f"People compare 2 to {MOST} completions of a prompt; change sample.per_prompt.")
    if wanted.overlap > 1 and not wanted.accounts:
        raise UserError(f"overlap is {wanted.overlap}, and without accounts there is one person; set accounts to true, or overlap to 1.")
    listening = listen(wanted.host, wanted.port)
    store = Store.open(url, QueueSettings.model_validate({"overlap": wanted.overlap, "seed": wanted.seed}))
    try:
        web = web_settings(store, wanted.host, wanted.accounts)
        set_criterion(store, None)
        store.add_items(completions)
        need = math.ceil(wanted.enough * len(completions))
        with serving(store, web, listening) as check:
            announce(store, web, listening, "Ctrl-C stops the run; what is ranked is kept")
            with bar("Labeling", need) as progress:
                done = 0
                while done < need:
                    check()
                    safe_point("What people have ranked is kept.")
                    time.sleep(LOOK)
                    seen = store.progress()
                    now = min(seen["complete"], need)
                    progress.advance(now - done, f"{seen['rankings']} rankings")
                    done = now
                    if web.alone is not None and not store.work_of(web.alone, 0.0)["left"]:
                        break  # what was skipped nobody else will rank
            if done < need:
                console.print(f"{need - done} of {need} prompts were skipped.")
        return list(store.rankings())
    finally:
        store.close()
