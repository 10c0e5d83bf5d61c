"""The before/after table, in the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from accord.progress import console
from accord.rl.explain import Explained

LABELS = {
    "score": "reward-model score",
    "gold": "gold score (0 to 1)",
    "parses": "share of the grammar",
    "follows": "share that is what was asked for",
    "kind": "share that ends kindly",
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


MEANING = {
    "log pi": "log-probability under the policy after the step's updates",
    "log pi_old": "under the policy that sampled",
    "log pi_ref": "under the frozen reference",
    "ratio": "exp(log pi - log pi_old)",
    "clipped": "1 where the clip removes the gradient",
    "KL part": "reward: -kl_coef x KL estimate",
    "score part": "reward: the score, on the last token of a turn",
    "value": "what the critic expected before the token",
    "advantage": "A, what the action is judged by",
    "return": "R, the critic's target",
}


def print_explained(x: Explained) -> None:
    """Two tables: what each token was, and what it gives to each term of the objective."""
    parts = ", ".join(f"{name} {'skipped' if value is None else format(value, '.3f')}" for name, value in x.parts.items())
    console.print(f"[bold]{x.algorithm}, step {x.step}[/]: {x.count} tokens, kl_coef {x.kl_coef:.4g}", soft_wrap=True)
    console.print(
        f"prompt: {x.prompt}\ncompletion: {x.text}\nscore: {x.score:.3f} ({parts})", soft_wrap=True, highlight=False, markup=False
    )
    first = Table(title="What each token was (log-probabilities in nats)", title_justify="left", box=None, padding=(0, 1, 0, 0))
    second = Table(title=f"What it gives to J, in thousandths (each is a mean over {x.count} tokens)", title_justify="left", box=None)
    for table, names in ((first, ["token", *x.columns]), (second, ["token", *x.terms, "sum"])):
        for name in names:
            table.add_column(name, justify="left" if name == "token" else "right", no_wrap=name == "token")
    for t, token in enumerate(x.tokens):
        shown = escape(repr(token)[1:-1])
        first.add_row(shown, *(_short(name, values[t]) for name, values in x.columns.items()))
        given = [values[t] for values in x.terms.values()]
        second.add_row(shown, *(f"{1000 * v:+.3f}" for v in [*given, sum(given)]))
    sums = [sum(values) for values in x.terms.values()]
    second.add_section()
    second.add_row("this completion", *(f"{1000 * v:+.3f}" for v in [*sums, sum(sums)]))
    whole = list(x.step_terms.values())
    second.add_row("the whole step", *(f"{1000 * v:+.3f}" for v in [*whole, sum(whole)]))
    console.print(first)
    console.print(second)
    console.print(f"loss = -J = -({' '.join(f'{v:+.6f}' for v in whole)}) = {x.loss:.6f}", soft_wrap=True)
    for name in x.columns:
        console.print(f"[dim]{name}: {MEANING.get(name, '')}[/]", soft_wrap=True, highlight=False)


def _short(name: str, value: float) -> str:
    return ("x" if value else "") if name == "clipped" else f"{value:+.2f}" if name != "ratio" else f"{value:.3f}"


def print_comparison(facts: dict[str, Any]) -> None:
    table = Table(title="Held-out prompts, 95% intervals clustered by prompt", title_justify="left")
    for column in ("", "reference", "aligned", "change"):
        table.add_column(column)
    for row in table_rows(facts):
        table.add_row(*row)
    console.print(table)
    for name, value in headline(facts):
        console.print(f"[bold]{name}[/]: {value}", soft_wrap=True)
