"""Agreement in the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.markup import escape
from rich.table import Table

from accord.data.statistics import Estimate
from accord.feedback.agreement import Agreement
from accord.progress import console

SHOWN = 10  # disputed prompts

MEANING = {
    "with_ties": "two labelers say the same of two completions: better, equal, worse",
    "without_ties": "the same, where neither says equal",
    "alpha": "Krippendorff's alpha of these, ordinal: 0 is chance, 1 is all the same",
    "kendall_w": "Kendall's W, mean over prompts: 0 is no concord, 1 is all the same",
    "kappa_fail": "Cohen's kappa of F or not, completion by completion",
}


def to_json(found: Agreement) -> dict[str, Any]:
    """Plain values, for a file."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return value.to_json()
        if isinstance(value, float) and math.isnan(value):
            return None
        return {k: plain(v) for k, v in vars(value).items()} if hasattr(value, "__dataclass_fields__") else value

    return {**plain(found), "labelers": {who: plain(report) for who, report in found.labelers.items()}}


def print_agreement(found: Agreement) -> None:
    """How far they agree, who agrees with whom, and where they do not."""
    console.print(f"{found.rankings} rankings of {found.prompts} prompts by {len(found.labelers)} labelers; 95% intervals over prompts.")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, meaning in MEANING.items():
        value = getattr(found, name)
        table.add_row(str(value) if value is not None else "too little to tell it from", meaning)
    console.print(table)
    table = Table(title="Labelers", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "rankings", "F", "ties", "like others", "like gold", "right"):
        table.add_column(column, justify="left" if not column else "right")
    for who, r in found.labelers.items():
        shares = [f"{r.fails:.1%}", f"{r.ties:.1%}", *(str(e) if e is not None else "" for e in (r.with_others, r.with_gold))]
        table.add_row(escape(who), str(r.rankings), *shares, f"{r.quality:.2f}" if not math.isnan(r.quality) else "")
    console.print(table)
    console.print(
        "[dim]like others, like gold: where neither says equal; right: estimated from how they agree (Dawid & Skene 1979)[/]",
        soft_wrap=True,
    )
    disputed = [of for of in found.disputed if of.same < 0.5][:SHOWN]
    if disputed:
        console.print(
            "Most disputed, with the share of comparisons that agree: " + ", ".join(f"{of.prompt} ({of.same:.0%})" for of in disputed),
            soft_wrap=True,
            markup=False,
        )
