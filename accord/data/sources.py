"""Prompts and pairs from JSONL, JSON, Parquet, text files and Hugging Face datasets; every error names file, row and field."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import Any

from accord.data.records import Completion, Content, Example, Logged, Pair, PairGroup, Prompt, Ranking, Turn
from accord.disk import read_object, read_text
from accord.errors import UserError, did_you_mean, first_line
from accord.progress import console, several
from accord.text.tokenizer import ROLES

MOST_RANKS = 1000
PLAIN = (".txt", ".md")
PROMPT_FIELDS = ("prompt", "messages", "text", "question", "instruction")
RANKING_FIELDS = ("labeler", "criterion", "simulated", "ratings", "flags", "note", "decision")
ANSWER_FIELDS = ("completion", "answer", "response", "output")


def read_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file or dataset, each with its place (``file:row``) for error messages.

    ``source`` is a ``.jsonl``, ``.json`` (a list), ``.parquet``, ``.csv`` (with a header) or ``.txt`` (a prompt a line) file, or
    ``hf:ORG/NAME[:SPLIT]`` for a Hugging Face dataset (needs the ``datasets`` package).
    """
    name = str(source)
    if name.startswith("hf:"):
        yield from _hub_rows(name)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.jsonl"))
        raise UserError(f"{path} is a folder; give a file{' in it: ' + ', '.join(inside) if inside else ''}.")
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"File {path} does not exist.{did_you_mean(str(path), siblings)}")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text = read_text(path)
    if path.suffix == ".txt":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", {"prompt": line}
    elif path.suffix == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise UserError(f"{path} must hold a JSON list of objects; it holds a {type(rows).__name__}.")
        for number, row in enumerate(rows, 1):
            yield f"{path}:{number}", _object(row, f"{path}:{number}")
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _object(_json(line, place), place)
    elif path.suffix == ".csv":
        yield from _csv_rows(text, path)
    else:
        raise UserError(f"{path}: unknown kind of file '{path.suffix}'; use .jsonl, .json, .parquet, .csv or .txt.")


TEXTS = (
    *PROMPT_FIELDS, *ANSWER_FIELDS, "input", "id", "prompt_id", "chosen", "rejected", "labeler", "theme", "criterion", "note",
)  # fmt: skip
"""Fields of a CSV file that are taken as they are written; other cells are numbers, lists and such, as in JSON."""
CHATS = (*PROMPT_FIELDS, "chosen", "rejected")
"""Texts that may also be chat messages, as JSON."""


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{place} has {'more' if None in row else 'fewer'} cells than the header has names ({len(reader.fieldnames or [])})."
                )
            yield place, {name: _cell(name, value) for name, value in row.items() if value != "" or name == "completion"}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is no row of a CSV file: {error}.") from None


def _cell(name: str, value: str) -> Any:
    if name in TEXTS and not (name in CHATS and value.startswith("[{")):
        return value
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except (ValueError, RecursionError):
        return value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error}); fix or delete the row.") from None


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(
            f'{place} must be an object like {{"name": "value"}}; it is a {type(row).__name__}. (A list of objects goes into a .json file.)'
        )
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for number, row in enumerate(pq.read_table(path).to_pylist(), 1):
            yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {first_line(error)}") from None


def _hub_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{name} needs the datasets package: pip install 'accord[hub]'") from None
    _, dataset, *rest = name.split(":")
    try:
        rows = load_dataset(dataset, split=rest[0] if rest else "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", row
    except UserError:
        raise
    except Exception as error:  # the hub client raises a different family of errors in each version
        raise UserError(f"Dataset {name} cannot be read: {first_line(error)}") from None


def check_content(value: Any, place: str, field: str) -> Content:
    """A non-empty text, or messages that end with the user's turn and have known roles."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{place}: field '{field}' is empty; give the prompt some text or delete the row.")
        _check_unicode(value, place, field)
        return value
    if value == []:
        raise UserError(f"{place}: field '{field}' is empty; give at least the user's message or delete the row.")
    if not isinstance(value, list):
        raise UserError(f"{place}: field '{field}' must be text or a list of messages; it is {type(value).__name__}.")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{place}: field '{field}', message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(f"{where} must have a 'role' and a text 'content'.")
        role = str(message["role"])
        if role not in ROLES:
            raise UserError(f"{where} has the unknown role '{role}'; use {', '.join(ROLES)}.{did_you_mean(role, ROLES)}")
        _check_unicode(message["content"], place, field)
        messages.append({"role": role, "content": message["content"]})
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{place}: field '{field}' ends with '{messages[-1]['role']}'; a prompt ends with the user.")
    if not messages[-1]["content"].strip():
        raise UserError(f"{place}: field '{field}' ends with an empty message.")
    return messages


def _check_unicode(text: str, place: str, field: str) -> None:
    if not is_unicode(text):
        raise UserError(f"{place}: field '{field}' holds half of a surrogate pair, which is no character; repair the text.")


def is_unicode(text: str) -> bool:
    """Whether every character is one: JSON can hold half a surrogate pair, which no file or database can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_texts(sources: Sequence[str | Path], most: int | None = None) -> list[str]:
    """:func:`iter_texts` at once.

    Raises:
        UserError: there is no text.
    """
    found = list(iter_texts(sources, most))
    if not any(text.strip() for text in found):
        raise UserError(f"{', '.join(map(str, sources))}: there is no text.")
    return found


def iter_texts(sources: Sequence[str | Path], most: int | None = None) -> Iterator[str]:
    """Documents: a ``.txt`` or ``.md`` file is one, a folder all of those in it, and of rows (JSONL, Parquet, ``hf:``, which is
    streamed) each its field ``text``.

    Args:
        most: of each source; None is all.

    Raises:
        UserError: a file is no text, or a row has none.
    """
    if most is not None and most < 1:
        raise UserError(f"--most is {most}; it must be 1 or more.")
    for source in sources:
        yield from islice(_documents(source), most)


def text_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files behind the sources that are not streamed."""
    return [one for source in sources if not str(source).startswith("hf:") for one in _inside(source)]


def _inside(source: str | Path) -> list[Path]:
    path = Path(str(source)).expanduser()
    inside = sorted(p for p in path.rglob("*") if p.suffix in PLAIN and p.is_file()) if path.is_dir() else [path]
    if not inside:
        raise UserError(f"{path} is a folder without {' or '.join(PLAIN)} files; give files.")
    for one in inside:
        if not one.is_file():
            raise UserError(f"File {one} does not exist.{did_you_mean(str(one), [str(p) for p in one.parent.glob('*')])}")
    return inside


def _documents(source: str | Path) -> Iterator[str]:
    rows = str(source).startswith("hf:")
    for one in [Path(str(source))] if rows else _inside(source):
        if one.suffix in PLAIN and not rows:
            text = read_text(one)
            if "\0" in text:
                raise UserError(f"{one} holds NUL characters, so it is no text; leave it out.")
            yield text
            continue
        for place, row in read_rows(str(source) if rows else one):
            if not isinstance(row.get("text"), str):
                raise UserError(f"{place} has no field 'text'.{_mistyped(row, ['text'])}")
            _check_unicode(row["text"], place, "text")
            yield row["text"]


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts with ids (the row number where none is given) and themes.

    The prompt is the field ``prompt`` (or ``messages``, ``text``, ``question``, ``instruction``): text or
    chat messages.

    Raises:
        UserError: naming file, row and field of the first thing that is wrong.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(read_rows(source), 1):
        field = next((f for f in PROMPT_FIELDS if row.get(f) is not None), None)
        if field is None:
            hint = _mistyped(row, PROMPT_FIELDS)
            raise UserError(f"{place} has no field 'prompt'; it has {sorted(map(str, row))}.{hint}")
        content = check_content(row[field], place, field)
        prompt_id = str(row.get("id") or f"row-{number:05d}")
        if prompt_id in seen:
            raise UserError(f"{place}: the id '{prompt_id}' is used already at {seen[prompt_id]}; ids must be unique.")
        seen[prompt_id] = place
        prompts.append(Prompt(prompt_id, content, str(row.get("theme") or "")))
    if not prompts:
        raise UserError(f"{source} holds no prompts.")
    return prompts


def bundled_prompts() -> list[Prompt]:
    """Those that accord brings."""
    with as_file(files("accord.recipes") / "prompts.jsonl") as path:
        return read_prompts(path)


def read_pairs(source: str | Path) -> list[PairGroup]:
    """Preference pairs (``prompt``, ``chosen``, ``rejected``), those of one prompt grouped together; or the groups that
    ``accord export --as groups`` writes.

    ``chosen`` and ``rejected`` are texts, or chats whose last message is the assistant's. ``weight`` and ``distance`` are 1 where
    they are not given.
    """
    groups: dict[str, tuple[Prompt, list[Completion], list[Pair]]] = {}
    whole: list[PairGroup] = []
    for number, (place, row) in enumerate(read_rows(source), 1):
        if "completions" in row and "pairs" in row:
            whole.append(_group(row, place, number))
            continue
        for name in ("prompt", "chosen", "rejected"):
            if row.get(name) is None:
                hint = _mistyped(row, [name])
                raise UserError(f"{place} has no field '{name}'; a pair needs prompt, chosen and rejected.{hint}")
        content = check_content(row["prompt"], place, "prompt")
        sides = [_completion_text(row[name], place, name) for name in ("chosen", "rejected")]
        if sides[0] == sides[1]:
            raise UserError(f"{place}: chosen and rejected are equal, so the pair teaches nothing; delete the row.")
        key = json.dumps(content)
        prompt_id = str(row.get("id") or row.get("prompt_id") or f"row-{number:05d}")
        prompt, completions, pairs = groups.setdefault(key, (Prompt(prompt_id, content, str(row.get("theme") or "")), [], []))
        indices = []
        for text in sides:
            known = next((c.index for c in completions if c.text == text), None)
            if known is None:
                known = len(completions)
                completions.append(Completion(prompt, text, bool(row.get("finished", True)), known))
            indices.append(known)
        pairs.append(_pair({**row, "preferred": indices[0], "other": indices[1]}, len(completions), place))
    if not groups and not whole:
        raise UserError(f"{source} holds no pairs.")
    return [*whole, *(PairGroup(p, tuple(c), tuple(w)) for p, c, w in groups.values())]


def _group(row: dict[str, Any], place: str, number: int) -> PairGroup:
    prompt = Prompt(
        str(row.get("id") or f"row-{number:05d}"), check_content(row.get("prompt"), place, "prompt"), str(row.get("theme") or "")
    )
    completions = []
    for index, given in enumerate(_list(row["completions"], place, "completions")):
        text = given.get("text") if isinstance(given, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place}: completion {index} has no field 'text'.")
        _check_unicode(text, place, "completions")
        completions.append(Completion(prompt, text, bool(given.get("finished", True)), index))
    pairs, ties = (
        tuple(_pair(pair, len(completions), place) for pair in _list(row.get(name) or [], place, name)) for name in ("pairs", "ties")
    )
    if not pairs and not ties:
        raise UserError(f"{place} has neither pairs nor ties, so it teaches nothing; delete the row.")
    weight = 1.0 if row.get("weight") is None else row["weight"]
    if not _number(weight) or weight <= 0:
        raise UserError(f"{place}: field 'weight' is {weight!r}; it must be a number above 0.")
    return PairGroup(prompt, tuple(completions), pairs, ties, float(weight))


def _pair(given: Any, count: int, place: str) -> Pair:
    row = given if isinstance(given, dict) else {}
    sides = [row.get("preferred"), row.get("other")]
    if not all(type(side) is int and 0 <= side < count for side in sides) or sides[0] == sides[1]:
        raise UserError(
            f"{place}: a pair names 'preferred' and 'other', two different completions from 0 to {count - 1}; it is {given!r:.80}."
        )
    numbers = [1.0 if row.get(name) is None else row[name] for name in ("weight", "distance")]
    if not all(_number(value) and value > 0 for value in numbers):
        raise UserError(f"{place}: 'weight' and 'distance' must be numbers above 0; they are {numbers[0]!r} and {numbers[1]!r}.")
    return Pair(sides[0], sides[1], float(numbers[0]), float(numbers[1]))  # type: ignore[arg-type]


def _completion_text(value: Any, place: str, field: str) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: field '{field}' must be a non-empty text or a chat that ends with one.")
    return value


def read_completions(source: str | Path, with_tokens: bool = True) -> dict[str, list[Completion]]:
    """What ``accord sample`` wrote: completions by prompt id, in the order of their index.

    ``with_tokens`` keeps the sampled ids, which mean something to the model that sampled them alone.
    """
    found: dict[str, list[Completion]] = {}
    for place, row in read_rows(source):
        text = row.get("completion")
        if not isinstance(text, str):
            raise UserError(f"{place} has no text field 'completion'; was the file written by accord sample?")
        for name in ("id", "theme", "completion"):
            _check_unicode(str(row.get(name)), place, name)
        if row.get("prompt") is None:
            raise UserError(f"{place} has no field 'prompt'.{_mistyped(row, ['prompt'])}")
        prompt = Prompt(str(row.get("id") or place), check_content(row["prompt"], place, "prompt"), str(row.get("theme") or ""))
        tokens, index = row.get("tokens") or [], row.get("index") or 0
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens) or not isinstance(index, int) or abs(index) > 2**31:
            raise UserError(f"{place}: 'index' must be a whole number and 'tokens' a list of them; give a file that accord sample wrote.")
        if prompt.id in found and found[prompt.id][0].prompt.content != prompt.content:
            raise UserError(f"{place}: the id '{prompt.id}' is of another prompt already; completions of one id answer the same prompt.")
        found.setdefault(prompt.id, []).append(
            Completion(prompt, text, bool(row.get("finished", True)), index, tuple(tokens) if with_tokens else ())
        )
    if not found:
        raise UserError(f"{source} holds no completions.")
    return {key: sorted(group, key=lambda c: c.index) for key, group in found.items()}


def read_examples(source: str | Path) -> list[Example]:
    """Answers to imitate: ``messages`` that end with the assistant's, or a ``prompt`` (text or messages) with its ``completion``.

    ``question``, ``instruction`` and ``answer``, ``response``, ``output`` are other names of the two. Rows of ``accord sample`` that
    the length limit cut (``"finished": false``) are left out, and counted.
    """
    found: list[Example] = []
    cut = 0
    for number, (place, row) in enumerate(read_rows(source), 1):
        key = str(row.get("id") or f"row-{number:05d}")
        if row.get("finished") is False:
            cut += 1
            continue
        question, answer = _asked_and_answered(row, place)
        if question is None or not isinstance(answer, str) or not answer.strip():
            hint = _mistyped(row, [name for name in (*PROMPT_FIELDS, *ANSWER_FIELDS) if name not in row])
            raise UserError(f"{place} needs 'messages' that end with the assistant's, or a 'prompt' and a text 'completion'.{hint}")
        _check_unicode(answer, place, "completion")
        found.append(Example(key, check_content(question, place, "prompt"), answer))
    if cut:
        console.print(f"Cut by the length limit, and left out: {several(cut, 'completion')} in {source}.", soft_wrap=True, markup=False)
    if not found:
        raise UserError(f"{source} holds no examples.")
    return found


def _asked_and_answered(row: Mapping[str, Any], place: str) -> tuple[Any, Any]:
    """The prompt and the answer of an example's row, not yet checked.

    Raises:
        UserError: it holds what cannot be learned from here.
    """
    if row.get("tools"):
        raise UserError(f"{place} has 'tools', which are not written into examples here; delete the row, or put them into a message.")
    question = next((row[name] for name in PROMPT_FIELDS if row.get(name)), None)
    answer: Any = next((row[name] for name in ANSWER_FIELDS if row.get(name)), None)
    if isinstance(row.get("input"), str) and row["input"].strip() and isinstance(question, str):
        question = f"{question}\n\n{row['input']}"  # as Alpaca's rows have it
    if answer is None and isinstance(row.get("messages"), list):
        question, answer = [], row["messages"]
    if not isinstance(answer, list):
        return question, answer
    said = [{"role": "user", "content": question}] if isinstance(question, str) else list(question or [])
    *more, last = answer or [{}]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise UserError(f"{place}: the chat does not end with the assistant; what is imitated is an answer, so end it with one.")
    for message in (*said, *answer):
        for name, why in UNLEARNED.items():
            if isinstance(message, dict) and (message.get(name) == 0 if name == "weight" else message.get(name)):
                raise UserError(f"{place}: a message has '{name}', {why}; delete the row.")
    asked = [*said, *more]
    return (question if not more and isinstance(question, str) else asked), last.get("content")


UNLEARNED = {
    "tool_calls": "which are not written into examples here", "reasoning_content": "which would be left out; put it into 'content'",
    "weight": "0, which says not to learn it, and every answer of a chat is learned",
}  # fmt: skip


def read_logged(source: str | Path) -> list[Logged]:
    """Completions with scores, such as the ``completions.jsonl`` of a run: ``prompt``, ``completion``, ``score``.

    Rows whose score is null were skipped by their reward, and are left out. The rows of an environment's episodes have
    ``turns`` too, in ids of the model that played.
    """
    logged: list[Logged] = []
    for place, row in read_rows(source):
        text, score = row.get("completion"), row.get("score")
        if not isinstance(text, str):
            raise UserError(f"{place} has no text field 'completion'.")
        _check_unicode(text, place, "completion")
        if "score" not in row:
            raise UserError(f"{place} has no field 'score'; give scores, or say with --rankings how the completions were ranked.")
        if score is None:
            continue
        if not _number(score):
            raise UserError(f"{place}: field 'score' is {score!r}; it must be a finite number, or null for a row to be left out.")
        prompt = Prompt(str(row.get("id") or place), check_content(row.get("prompt"), place, "prompt"), str(row.get("theme") or ""))
        completion = Completion(prompt, text, bool(row.get("finished", True)), len(logged))
        turns = tuple(_turn(turn, place) for turn in _list(row.get("turns") or [], place, "turns"))
        if not turns and not text and not completion.finished:
            raise UserError(f"{place}: the completion is empty and did not finish, so there is no token to learn from; delete the row.")
        logged.append(Logged(completion, float(score), turns))
    if not logged:
        raise UserError(f"{source} holds no completions with scores.")
    return logged


def _mistyped(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """A field of the row whose name is nearly one of these."""
    key = next((str(key) for key in row if key not in names and did_you_mean(str(key), names)), None)
    return f" Did you mean{did_you_mean(key, names).removeprefix(' Did you mean').removesuffix('?')} by '{key}'?" if key is not None else ""


def _number(value: Any) -> bool:
    """A finite number, also in fp32."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 1e38


def _list(value: Any, place: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{place}: field '{field}' must be a list.")
    return value


def _turn(value: Any, place: str) -> Turn:
    given = value if isinstance(value, dict) else {}
    tokens, reward, reply = given.get("tokens"), given.get("reward"), given.get("reply")
    ids = all(isinstance(x, list) and all(type(i) is int for i in x) for x in (tokens, reply))
    if not ids or not tokens or not _number(reward):
        raise UserError(f"{place}: each of its 'turns' needs 'tokens' and 'reply', lists of ids, and a finite 'reward'.")
    return Turn(tuple(tokens), float(reward), tuple(reply))  # type: ignore[arg-type]


def read_weights(source: str | Path) -> dict[str, float]:
    """Labelers' weights: a JSON object of names and numbers from 0.

    Raises:
        UserError: it is something else.
    """
    weights = read_object(Path(source).expanduser())
    for name, value in weights.items():
        if not _number(value) or value < 0:
            raise UserError(f"{source}: the weight of '{name}' is {value!r}; it must be a number from 0.")
    return {name: float(value) for name, value in weights.items()}


def read_rankings(source: str | Path) -> list[Ranking]:
    """Raw rankings as ``accord`` writes them: ``prompt_id``, ``labeler``, ``ranks`` (numbers and ``"F"``), and what else :class:`Ranking` has."""
    rankings = []
    for place, row in read_rows(source):
        ranks = row.get("ranks")
        if isinstance(ranks, list):  # a table's column has one type, so that its ranks are texts
            ranks = [int(r) if isinstance(r, str) and r.isascii() and r.isdecimal() and len(r) < 5 else r for r in ranks]
        good = isinstance(ranks, list) and ranks and all(r == "F" or (type(r) is int and 1 <= r <= MOST_RANKS) for r in ranks)
        if not good or row.get("prompt_id") in (None, ""):
            hint = _mistyped(row, [name for name in ("prompt_id", "ranks") if not row.get(name)])
            raise UserError(f"{place} needs a prompt_id and 'ranks', a list of whole numbers from 1 to {MOST_RANKS} and \"F\".{hint}")
        others = {name: value for name, value in row.items() if name not in ("prompt_id", "ranks", *RANKING_FIELDS)}
        if hint := _mistyped(others, [name for name in RANKING_FIELDS if name not in row]):
            raise UserError(f"{place}:{hint}")
        for name in ("simulated", "decision"):
            if not isinstance(row.get(name), bool | None):
                raise UserError(f"{place}: '{name}' is {row[name]!r}; it must be true or false.")
        if not isinstance(row.get("note"), str | None) or "\0" in (row.get("note") or ""):
            raise UserError(f"{place}: 'note' must be a text.")
        for name in ("prompt_id", "labeler", "criterion", "note"):
            _check_unicode(str(row.get(name)), place, name)
        ratings, flags = (_of_each(row.get(name), len(ranks), place, name) for name in ("ratings", "flags"))  # type: ignore[arg-type]
        if any(r is not None and (type(r) is not int or not 1 <= r <= 7) for r in ratings):
            raise UserError(f"{place}: 'ratings' must be whole numbers from 1 to 7, or null where there is none.")
        if not all(isinstance(some, list) and all(isinstance(flag, str) and is_unicode(flag) for flag in some) for some in flags):
            raise UserError(f"{place}: 'flags' must be a list of texts for each completion.")
        rankings.append(
            Ranking(
                str(row["prompt_id"]),
                "unknown" if row.get("labeler") in (None, "") else str(row["labeler"]),
                tuple(None if r == "F" else r for r in ranks),  # type: ignore[union-attr]
                str(row.get("criterion") or ""),
                bool(row.get("simulated")),
                tuple(ratings),
                tuple(tuple(some) for some in flags),
                str(row.get("note") or ""),
                bool(row.get("decision")),
            )
        )
    return rankings


def _of_each(value: Any, count: int, place: str, field: str) -> list[Any]:
    """Nothing, or a value for each completion."""
    if value in (None, []):
        return []
    if not isinstance(value, list) or len(value) != count:
        raise UserError(f"{place}: '{field}' must be a list with a value for each of the {count} completions.")
    return value
