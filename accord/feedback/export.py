"""Rankings and their completions as what others read, some prompts at a time: a store may hold more than memory does.

| format        | a row is                                                                     | for                          |
|---------------|------------------------------------------------------------------------------|------------------------------|
| `rankings`    | a ranking as it was given, decisions among them                              | ``accord reward --rankings``, ``accord label --rankings`` |
| `completions` | a completion, ranked or not                                                  | the same commands' ``--completions`` |
| `groups`      | a prompt: its completions, pairs and ties with weights, fails, criteria      | ``accord reward --pairs``; loses the labelers alone |
| `pairs`       | prompt, chosen, rejected, weight, distance                                   | TRL's reward and DPO trainers, ``accord reward --pairs`` |
| `unpaired`    | prompt, completion, label, weight                                            | TRL's KTO trainer            |
| `dataset`     | a folder: all but `groups` as Parquet, with a card; of completions those that are ranked | ``datasets.load_dataset`` |

Chat prompts give chat rows (``[{"role": "assistant", ...}]``), texts give texts, as TRL has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from accord.data.pairs import answers_of, group_pairs, opinions, rankings_by_prompt, refuse_unknown, scored_by_rank
from accord.data.records import Completion, PairGroup, Prompt, RankedCompletions, Ranking, split_of
from accord.disk import stream_lines, whole_folder
from accord.errors import UserError
from accord.feedback.agreement import agreement

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Literal["rankings", "completions", "groups", "pairs", "unpaired"]
Format = Rows | Literal["dataset"]
SPLITS = {"train": "train", "validation": "validation", "heldout": "test"}
"""accord's name of a split -> the one that others use."""


def export(
    ranked: Iterable[RankedCompletions], kind: Format, out: Path, fail_weight: float = 1.0, labeler_weights: Mapping[str, float] | None = None
) -> int:  # fmt: skip
    """Write a file, or for ``dataset`` a folder; returns how many rows, of a dataset how many pairs.

    Args:
        ranked: some prompts each, with all rankings of them; read once, and one at a time.

    Raises:
        UserError: rankings and completions do not belong together, nothing follows from them, a weight is of nobody who ranked,
            ``out`` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out or delete it.")
    if kind != "dataset" and out.suffix != ".jsonl":
        raise UserError(f"{out} does not end in .jsonl, which is what is written; give --out {out}.jsonl.")
    seen = _Seen(ranked, labeler_weights or {})
    if kind == "dataset":
        with whole_folder(out) as aside:
            count = _write_dataset(aside, out.name, seen, fail_weight)
            seen.check(kind, count)
        return count
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for some, weights in seen:
            for row in rows(kind, some, fail_weight, weights):
                count += 1
                yield row
        seen.check(kind, count)

    stream_lines(out, counted())
    return count


class _Seen:
    """Goes through what is ranked, with the weights of those who ranked it, and remembers what the whole of it must be asked for."""

    def __init__(self, ranked: Iterable[RankedCompletions], weights: Mapping[str, float]) -> None:
        self._ranked, self._weights = ranked, weights
        self.labelers: set[str] = set()
        self._ties = False

    def __iter__(self) -> Iterator[tuple[RankedCompletions, dict[str, float]]]:
        for some in self._ranked:
            here = {r.labeler for r in some.rankings}
            self.labelers |= here
            self._ties = self._ties or any(_ties(r) for r in some.rankings)
            yield some, {who: weight for who, weight in self._weights.items() if who in here}

    def check(self, kind: Format, count: int) -> None:
        """Raises:
        UserError: what was written is not what was asked for.
        """
        refuse_unknown(self._weights, self.labelers)
        if count:
            return
        if kind in ("rankings", "completions"):
            raise UserError(f"There are no {kind}, so there is nothing to write.")
        if self._ties and kind != "groups":
            raise UserError("These rankings hold ties only, and no pair follows from them; --as groups keeps ties.")
        raise UserError("No pair and no tie follows from these rankings, so there is nothing to write.")


def _ties(ranking: Ranking) -> bool:
    ranks = [rank for rank in ranking.ranks if rank is not None]
    return len(set(ranks)) < len(ranks)


def rows(
    kind: Rows, ranked: RankedCompletions, fail_weight: float = 1.0, labeler_weights: Mapping[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """What a file of this format has of some prompts.

    Raises:
        UserError: a ranking is of other completions, or a labeler ranked a prompt twice.
    """
    if kind == "rankings":
        rankings_by_prompt(ranked.rankings)
        for ranking in ranked.rankings:
            answers_of(ranking, ranked.completions)
            yield ranking.to_json()
    elif kind == "completions":
        yield from (c.to_json() for group in ranked.completions.values() for c in group)
    elif kind == "unpaired":
        yield from unpaired_rows(ranked.completions, ranked.rankings, labeler_weights)
    else:
        groups = group_pairs(ranked.completions, ranked.rankings, fail_weight, labeler_weights)
        yield from pair_rows(groups) if kind == "pairs" else group_rows(groups, ranked.rankings)


def group_rows(groups: Sequence[PairGroup], rankings: Iterable[Ranking]) -> Iterator[dict[str, Any]]:
    """A row a prompt. ``fails``: how many labelers marked a completion ``F``; ``rankings``: how many there are, by criterion."""
    by_prompt = rankings_by_prompt(rankings)
    for group in groups:
        own = by_prompt.get(group.prompt.id, [])
        yield {
            **group.prompt.to_json(),
            "completions": [
                {"text": c.text, "finished": c.finished, "fails": sum(r.ranks[k] is None for r in own)}
                for k, c in enumerate(group.completions)
            ],
            "pairs": [pair._asdict() for pair in group.pairs],
            "ties": [tie._asdict() for tie in group.ties],
            "weight": group.weight,
            "rankings": dict(Counter(r.criterion for r in own)),
        }


def pair_rows(groups: Iterable[PairGroup]) -> Iterator[dict[str, Any]]:
    """A row a pair. Ties are not among them."""
    for group in groups:
        for pair in group.pairs:
            sides = (group.completions[pair.preferred], group.completions[pair.other])
            chosen, rejected = (_answer(group.prompt, c) for c in sides)
            yield {
                "id": group.prompt.id, "theme": group.prompt.theme, "split": SPLITS[split_of(group.prompt.id)], "prompt": group.prompt.content,
                "chosen": chosen, "rejected": rejected, "weight": pair.weight, "distance": pair.distance,
            }  # fmt: skip


def unpaired_rows(
    completions: Mapping[str, list[Completion]], rankings: Sequence[Ranking], labeler_weights: Mapping[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """A row a completion: good (``label``) if it stands above more of its prompt's others than below, averaged over labelers;
    ``weight`` is by how much (:func:`accord.data.pairs.scored_by_rank`). One that stands in the middle is neither."""
    for logged in scored_by_rank(completions, rankings, labeler_weights):
        c = logged.completion
        if abs(logged.score) > 1e-9:
            yield {
                "id": c.prompt.id, "theme": c.prompt.theme, "split": SPLITS[split_of(c.prompt.id)], "prompt": c.prompt.content,
                "completion": _answer(c.prompt, c), "label": logged.score > 0, "weight": abs(logged.score),
            }  # fmt: skip


def _answer(prompt: Prompt, completion: Completion) -> Any:
    return completion.text if isinstance(prompt.content, str) else [{"role": "assistant", "content": completion.text}]


def _write_dataset(folder: Path, name: str, seen: _Seen, fail_weight: float) -> int:
    """Table by table as the rows come; of everything only the rankings are kept, for the card. Returns how many pairs."""
    chats: set[bool] = set()
    given: list[Ranking] = []
    count: Counter[str] = Counter()
    with ExitStack() as open_tables:
        tables: dict[tuple[str, str], _Table] = {}
        for everything, weights in seen:
            names = {r.prompt_id for r in everything.rankings}
            some = RankedCompletions({key: group for key, group in everything.completions.items() if key in names}, everything.rankings)
            chats |= {isinstance(group[0].prompt.content, list) for group in some.completions.values()}
            if len(chats) > 1:
                raise UserError(
                    "Some prompts are chats and some are texts, which one table cannot hold; export groups, or make them all one kind."
                )
            given += some.rankings
            for kind in TABLES:
                for row in rows(kind, some, fail_weight, weights):
                    at = (kind, row.pop("split", "train"))
                    if at not in tables:
                        tables[at] = open_tables.enter_context(_Table(folder / kind / f"{at[1]}.parquet", kind, chats == {True}))
                    tables[at].add(row)
                    count[kind] += 1
    if not count["pairs"]:
        return 0
    configs: list[dict[str, Any]] = []
    for kind in TABLES:
        files = [{"split": split, "path": f"{kind}/{split}.parquet"} for split in SPLITS.values() if (kind, split) in tables]
        if files:
            configs.append({"config_name": kind, "data_files": files})
    configs[0]["default"] = True
    (folder / "README.md").write_text(_card(name, configs, given, count), encoding="utf-8")
    return count["pairs"]


TABLES: tuple[Rows, ...] = ("pairs", "unpaired", "rankings", "completions")


class _Table:
    """A Parquet file, written a thousand rows at a time."""

    def __init__(self, path: Path, kind: Rows, chat: bool) -> None:
        import pyarrow.parquet as pq

        path.parent.mkdir(exist_ok=True)
        self._schema, self._rows = _schema(kind, chat), list[dict[str, Any]]()
        self._writer = pq.ParquetWriter(path, self._schema)

    def __enter__(self) -> _Table:
        return self

    def add(self, row: dict[str, Any]) -> None:
        if "ranks" in row:  # as texts, because F is among them
            row = {**row, "ranks": [str(rank) for rank in row["ranks"]]}
        self._rows.append(row)
        if len(self._rows) == 1000:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows.clear()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def _schema(kind: Rows, chat: bool) -> pa.Schema:
    import pyarrow as pa

    text, number, truth = pa.string(), pa.float64(), pa.bool_()
    messages = pa.list_(pa.struct({"role": text, "content": text})) if chat else text
    told = {"id": text, "theme": text, "prompt": messages}
    columns: dict[Rows, dict[str, Any]] = {
        "pairs": {**told, "chosen": messages, "rejected": messages, "weight": number, "distance": number},
        "unpaired": {**told, "completion": messages, "label": truth, "weight": number},
        "completions": {**told, "index": pa.int64(), "completion": text, "finished": truth},
        "rankings": {
            "prompt_id": text, "labeler": text, "ranks": pa.list_(text), "criterion": text, "simulated": truth,
            "ratings": pa.list_(pa.int64()), "flags": pa.list_(pa.list_(text)), "note": text, "decision": truth,
        },
    }  # fmt: skip
    return pa.schema(columns[kind])


def _card(name: str, configs: list[dict[str, Any]], rankings: Sequence[Ranking], count: Mapping[str, int]) -> str:
    given = opinions(rankings)
    found = agreement(given) if given else None
    told = lambda name: str(value) if found and (value := getattr(found, name)) is not None else "too little to tell it from"
    criteria = Counter(r.criterion or "none named" for r in rankings)
    simulated, decisions = sum(r.simulated for r in given), len(rankings) - len(given)
    others = (f", {simulated} of them simulated" if simulated else "") + (f", and {decisions} decisions of reviewers" if decisions else "")
    prompts, labelers = (len({getattr(r, name) for r in given}) for name in ("prompt_id", "labeler"))
    head = yaml.safe_dump({"pretty_name": name, "tags": ["preference", "rlhf", "accord"], "configs": configs}, sort_keys=False)
    return f"""---
{head}---

# {name}

{len(given)} rankings of {prompts} prompts by {labelers} labelers{others}, given by criterion {", ".join(f"{c} ({n})" for c, n in sorted(criteria.items()))}.

| table | rows | what |
|---|---|---|
| `pairs` | {count["pairs"]} | prompt, chosen, rejected; `weight` sums over labelers, `distance` is how many ranks apart. Ties are not among them |
| `unpaired` | {count["unpaired"]} | prompt, completion, label: above more of its prompt's others than below, or the reverse |
| `rankings` | {count["rankings"]} | as given: 1 is best, equal numbers are ties, `F` is nonsensical or unresponsive; of a prompt with a `decision` that alone is in the pairs |
| `completions` | {count["completions"]} | what the rankings speak of, by `id` and `index` |

Prompts, not pairs, are split: `train`, `validation`, `test` follow from the prompt's id.

Agreement (95% intervals over prompts): two labelers say the same of two completions {told("with_ties")}, without ties {told("without_ties")};
Krippendorff's alpha (ordinal) {told("alpha")}.

No licence is given here; add one before you share it.
"""
