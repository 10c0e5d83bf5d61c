"""Rankings and their completions as what others read: grouped pairs, pairs, single completions, a Hugging Face dataset.

| format     | a row is                                                                     | for                          |
|------------|------------------------------------------------------------------------------|------------------------------|
| `groups`   | a prompt: its completions, pairs and ties with weights, fails, criteria      | ``accord reward --pairs``; loses the labelers alone |
| `pairs`    | prompt, chosen, rejected, weight, distance                                   | TRL's reward and DPO trainers, ``accord reward --pairs`` |
| `unpaired` | prompt, completion, label, weight                                            | TRL's KTO trainer            |
| `dataset`  | a folder: `pairs`, `unpaired`, raw `rankings` and `completions` as Parquet, with a card | ``datasets.load_dataset`` |

Chat prompts give chat rows (``[{"role": "assistant", ...}]``), texts give texts, as TRL has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from accord.data.pairs import group_pairs, rankings_by_prompt, scored_by_rank
from accord.data.records import Completion, PairGroup, Prompt, Ranking, split_of
from accord.disk import whole_folder, write_lines
from accord.errors import UserError
from accord.feedback.agreement import agreement

Format = Literal["groups", "pairs", "unpaired", "dataset"]
SPLITS = {"train": "train", "validation": "validation", "heldout": "test"}
"""accord's name of a split -> the one that others use."""


def export(
    completions: Mapping[str, list[Completion]],
    rankings: Sequence[Ranking],
    kind: Format,
    out: Path,
    fail_weight: float = 1.0,
    labeler_weights: Mapping[str, float] | None = None,
) -> int:
    """Write a file, or for ``dataset`` a folder; returns how many rows, of a dataset how many pairs.

    Raises:
        UserError: rankings and completions do not belong together, nothing follows from them, ``out`` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out or delete it.")
    if kind != "dataset" and out.suffix != ".jsonl":
        raise UserError(f"{out} does not end in .jsonl, which is what is written; give --out {out}.jsonl.")
    given = dict(completions)
    groups = group_pairs(given, rankings, fail_weight, labeler_weights)
    if not groups:
        raise UserError("No pair and no tie follows from these rankings, so there is nothing to write.")
    if kind != "groups" and not any(group.pairs for group in groups):
        raise UserError("These rankings hold ties only, and no pair follows from them; --as groups keeps ties.")
    if kind == "dataset":
        pairs = list(pair_rows(groups))
        with whole_folder(out) as aside:
            _write_dataset(aside, out.name, given, rankings, pairs, list(unpaired_rows(given, rankings, labeler_weights)))
        return len(pairs)
    rows = {
        "groups": lambda: group_rows(groups, rankings),
        "pairs": lambda: pair_rows(groups),
        "unpaired": lambda: unpaired_rows(given, rankings, labeler_weights),
    }[kind]()
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    write_lines(out, counted())
    return count


def group_rows(groups: Sequence[PairGroup], rankings: Iterable[Ranking]) -> Iterator[dict[str, Any]]:
    """A row a prompt. ``fails``: how many labelers marked a completion ``F``; ``rankings``: how many there are, by criterion."""
    by_prompt = rankings_by_prompt(rankings)
    for group in groups:
        own = by_prompt[group.prompt.id]
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
    completions: dict[str, list[Completion]], rankings: Sequence[Ranking], labeler_weights: Mapping[str, float] | None = None
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


def _write_dataset(
    folder: Path,
    name: str,
    completions: dict[str, list[Completion]],
    rankings: Sequence[Ranking],
    pairs: list[dict[str, Any]],
    unpaired: list[dict[str, Any]],
) -> None:
    ranked = {r.prompt_id for r in rankings}
    chats = {isinstance(group[0].prompt.content, list) for key, group in completions.items() if key in ranked}
    if len(chats) > 1:
        raise UserError("Some prompts are chats and some are texts, which one table cannot hold; export groups, or make them all one kind.")
    configs: list[dict[str, Any]] = []
    for kind, rows in (("pairs", pairs), ("unpaired", unpaired)):
        files = []
        for split in SPLITS.values():
            some = [{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == split]
            if some:
                _write_parquet(folder / kind / f"{split}.parquet", some)
                files.append({"split": split, "path": f"{kind}/{split}.parquet"})
        if files:
            configs.append({"config_name": kind, "data_files": files})
    raw = [c.to_json() for key, group in completions.items() if key in ranked for c in group]
    for kind, rows in (("rankings", [_flat_ranking(r) for r in rankings]), ("completions", raw)):
        _write_parquet(folder / kind / "train.parquet", rows)
        configs.append({"config_name": kind, "data_files": [{"split": "train", "path": f"{kind}/train.parquet"}]})
    configs[0]["default"] = True
    (folder / "README.md").write_text(_card(name, configs, rankings, pairs, unpaired), encoding="utf-8")


def _flat_ranking(ranking: Ranking) -> dict[str, Any]:
    """With ranks as texts, because ``F`` is among them."""
    row = ranking.to_json()
    return {**row, "ranks": [str(rank) for rank in row["ranks"]]}


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _card(name: str, configs: list[dict[str, Any]], rankings: Sequence[Ranking], pairs: Sequence[Any], unpaired: Sequence[Any]) -> str:
    found = agreement(rankings)
    told = lambda value: str(value) if value is not None else "nothing to tell it from"
    criteria = Counter(r.criterion or "none named" for r in rankings)
    simulated = sum(r.simulated for r in rankings)
    head = yaml.safe_dump({"pretty_name": name, "tags": ["preference", "rlhf", "accord"], "configs": configs}, sort_keys=False)
    return f"""---
{head}---

# {name}

{len(rankings)} rankings of {found.prompts} prompts by {len(found.labelers)} labelers{f", {simulated} of them simulated" if simulated else ""}, given by criterion {", ".join(f"{c} ({n})" for c, n in sorted(criteria.items()))}.

| table | rows | what |
|---|---|---|
| `pairs` | {len(pairs)} | prompt, chosen, rejected; `weight` sums over labelers, `distance` is how many ranks apart. Ties are not among them |
| `unpaired` | {len(unpaired)} | prompt, completion, label: above more of its prompt's others than below, or the reverse |
| `rankings` | {len(rankings)} | as given: 1 is best, equal numbers are ties, `F` is nonsensical or unresponsive |
| `completions` | | what the rankings speak of, by `id` and `index` |

Prompts, not pairs, are split: `train`, `validation`, `test` follow from the prompt's id.

Agreement (95% intervals over prompts): two labelers say the same of two completions {told(found.with_ties)}, without ties {told(found.without_ties)};
Krippendorff's alpha (ordinal) {told(found.alpha)}.

No licence is given here; add one before you share it.
"""
