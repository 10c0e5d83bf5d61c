"""The before/after table, in the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from accord.progress import console

LABELS = {
    "score": "reward-model score",
    "gold": "gold score (0 to 1)",
    "toxicity": "toxicity, all prompts",
    "toxicity, harmlessness": "toxicity, harmful theme",
    "entropy": "entropy (nats a token)",
    "length": "length (tokens)",
    "finished": "share that finishes",
    "distinct_2": "distinct-2",
}


def interval(e: dict[str, float] | None, digits: int = 3) -> str:
    """``0.71 [0.65, 0.77]``."""
    return "-" if e is None else f"{e['value']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def table_rows(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, reference, aligned, change), each with its 95% interval."""
    names = [*[n for n in LABELS if n in facts["before"]], *[n for n in facts["before"] if n not in LABELS]]
    return [(LABELS.get(n, n), interval(facts["before"][n]), interval(facts["after"][n]), interval(facts["change"][n])) for n in names]


def headline(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers that stand for the run."""
    out = []
    if facts["win_rate"]:
        out.append(("win rate by gold, aligned against reference", interval(facts["win_rate"])))
    out.append(("KL to the reference, nats a completion", interval(facts["kl"], 1)))
    if facts["harmful_ratio"]:
        out.append(("toxicity on the harmful theme, aligned / reference", interval(facts["harmful_ratio"], 2)))
    return out


def print_comparison(facts: dict[str, Any]) -> None:
    table = Table(title="Held-out prompts, 95% intervals clustered by prompt", title_justify="left")
    for column in ("", "reference", "aligned", "change"):
        table.add_column(column)
    for row in table_rows(facts):
        table.add_row(*row)
    console.print(table)
    for name, value in headline(facts):
        console.print(f"[bold]{name}[/]: {value}", soft_wrap=True)
