"""The supervised stage of Constitutional AI (Bai et al. 2022, section 3.1): answer, critique by a principle, revision, again with others.

Each prompt is a chain, one row of ``chains.jsonl``: first answer, then for each drawn principle the critique and the revision, all with the
probability that they are toxic. What comes last becomes an example for ``accord sft``, unless a check drops it. Revisions may also be asked
for directly, without critiques (the paper's figure 7).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from accord.constitution.principles import OURS, Constitution, Principle, read_constitution
from accord.constitution.rules import HARMFUL, declines
from accord.constitution.writers import Asked, Message, Writer
from accord.data.charts import line_chart
from accord.data.records import Content, Prompt, as_chat, split_of
from accord.data.sources import read_examples
from accord.data.statistics import Estimate, bootstrap_mean
from accord.disk import append_lines, read_lines, repair_lines
from accord.errors import UserError
from accord.feedback.criterion import FUNCTION_WORDS
from accord.feedback.toxicity import toxicity
from accord.progress import bar, safe_point

TOGETHER = 64
"""Prompts that are worked on at once, and then written down."""


@dataclass(frozen=True)
class Step:
    """A critique, empty where none is asked for, and the revision that follows from it. ``toxicity``: of the revision."""

    principle: str
    critique: str
    revision: str
    toxicity: float


@dataclass
class Chain:
    """What became of a prompt.

    Attributes:
        dropped: why its last revision is no example; empty if it is one.
        attempt: the first, or a later one after those before it were dropped.
        unwritten: the writer failed, so the chain is tried again when the command is given again.
    """

    id: str
    prompt: Content
    theme: str
    first: str
    toxicity: float
    steps: list[Step] = field(default_factory=list)
    dropped: str = ""
    attempt: int = 1
    unwritten: bool = False

    @property
    def name(self) -> str:
        """What its luck goes by."""
        return self.id if self.attempt == 1 else f"{self.id} attempt {self.attempt}"

    @property
    def last(self) -> str:
        return self.steps[-1].revision if self.steps else self.first

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "unwritten"}

    def fail(self, problem: str, otherwise: str) -> None:
        """``problem``: the writer's; if it has none, ``otherwise`` is wrong with what it wrote."""
        self.dropped, self.unwritten = problem or otherwise, bool(problem)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Chain:
        values = {name: row[name] for name in cls.__dataclass_fields__ if name != "unwritten"}
        return cls(**{**values, "steps": [Step(**step) for step in row["steps"]]})


def revise(
    path: Path,
    writer: Writer,
    prompts: Sequence[Prompt],
    constitution: Constitution,
    times: int,
    seed: int = 0,
    shots: Sequence[Message] = (),
    critiques: bool = True,
    declined: bool = False,
    attempts: int = 1,
) -> list[Chain]:
    """The chains of all prompts, one after another those of a prompt, written to ``path`` as they are done; those that are there already are taken from it.

    Args:
        times: revisions of each answer, each by another principle.
        shots: earlier turns of critiques and revisions, put before each that is asked for.
        critiques: ask for a critique before each revision.
        attempts: where a chain is dropped, begin another, with other luck and other principles, so often in all.
        declined: drop what does not decline a prompt whose theme is ``harmful`` (:func:`accord.constitution.rules.declines`).

    Raises:
        UserError: ``path`` holds chains of another constitution, writer, number of revisions, luck or shots, or none could be made.
    """
    about = {
        "writer": writer.about, "constitution": constitution.label, "revisions": times, "seed": seed, "shots": digest_of(shots),
        "critiques": critiques, "declined": declined, "attempts": attempts,
    }  # fmt: skip
    content = {p.id: p.content for p in prompts}
    repair_lines(path)
    done: dict[tuple[str, int], Chain] = {}
    for row in read_lines(path):
        for name, now in about.items():
            if row.get(name) != now:
                raise UserError(f"{path} was made with another {name} ({row.get(name)}; now {now}); choose another --out, or put it back.")
        if row["id"] in content and content[row["id"]] != row["prompt"]:
            raise UserError(f"{path} has another prompt '{row['id']}' than there is now; choose another --out, or put it back.")
        chain = Chain.of(row)
        done[chain.id, chain.attempt] = chain
    again = list(prompts)  # of which the attempts before came to nothing
    for attempt in range(1, attempts + 1):
        waiting = [p for p in again if (p.id, attempt) not in done]
        with bar("Revisions" if attempt == 1 else f"Revisions, attempt {attempt}", len(again)) as progress:
            progress.advance(len(again) - len(waiting))
            for start in range(0, len(waiting), TOGETHER):
                safe_point("Chains that are done are kept.")
                chains = _chains(writer, waiting[start : start + TOGETHER], attempt, constitution, times, seed, shots, critiques, declined)
                append_lines(path, [{**about, **chain.to_json()} for chain in chains if not chain.unwritten])
                done |= {(chain.id, attempt): chain for chain in chains}
                progress.advance(len(chains))
        again = [p for p in again if done[p.id, attempt].dropped and not done[p.id, attempt].unwritten]
        if not again:
            break
    found = [done[p.id, k] for p in prompts for k in range(1, attempts + 1) if (p.id, k) in done]
    if found and all(chain.dropped for chain in found):
        hint = " Give more --max-new-tokens, and a new --out." if "length limit" in found[0].dropped else ""
        raise UserError(f"Nothing came of {len(prompts)} prompts, such as '{found[0].id}': {found[0].dropped}.{hint}")
    return found


def _chains(
    writer: Writer, prompts: Sequence[Prompt], attempt: int, constitution: Constitution, times: int, seed: int, shots: Sequence[Message], critiques: bool, declined: bool
) -> list[Chain]:  # fmt: skip
    asked = [p.messages for p in prompts]
    chains = [Chain(p.id, p.content, p.theme, "", 0.0, attempt=attempt) for p in prompts]
    firsts = writer.write([Asked(f"{chain.name} answer", chat) for chain, chat in zip(chains, asked, strict=True)])
    for chain, w, toxic in zip(chains, firsts, toxicity([w.text for w in firsts]), strict=True):
        chain.first, chain.toxicity = w.text, toxic
    for chain, w in zip(chains, firsts, strict=True):
        if w.problem or not w.text:
            chain.fail(w.problem, "the first answer is empty")
    drawn = [constitution.draw(chain.name, times, seed) for chain in chains]
    cut = [not w.finished for w in firsts]
    for k in range(times):
        left = [i for i, chain in enumerate(chains) if not chain.dropped]
        chats = {i: [*after_system(asked[i], shots), said(chains[i].last)] for i in left}
        found = dict.fromkeys(left, "")
        if critiques:
            told = writer.write([Asked(f"{chains[i].name} critique {k}", [*chats[i], request(drawn[i][k].critique)]) for i in left])
            for i, critique in zip(left, told, strict=True):
                found[i] = critique.text
                chats[i] += [request(drawn[i][k].critique), said(critique.text)]
                if critique.problem or not critique.text:
                    chains[i].fail(critique.problem, "a critique is empty")
            left = [i for i in left if not chains[i].dropped]
        revisions = writer.write([Asked(f"{chains[i].name} revision {k}", [*chats[i], request(drawn[i][k].revision)]) for i in left])
        rude = toxicity([w.text for w in revisions])
        for i, revision, score in zip(left, revisions, rude, strict=True):
            text = unwrapped(revision.text)
            cut[i] = not revision.finished
            if revision.problem or not text:
                chains[i].fail(revision.problem, "a revision is empty")
            else:
                chains[i].steps.append(Step(drawn[i][k].id, found[i], text, score))
    shown = {m["content"] for m in shots}
    for i, chain in enumerate(chains):
        chain.dropped = chain.dropped or check(chain, drawn[i], cut[i], shown)
        if declined and not chain.dropped and chain.theme == HARMFUL and not declines(chain.last):
            chain.dropped = "the last revision does not decline what is harmful"
    return chains


def shots_of(source: str | None, critiques: bool) -> list[Message]:
    """The chats of a file, or accord's own, or none."""
    if source == OURS:
        return own_shots(critiques)
    return [m for example in read_examples(source) for m in example.messages] if source else []


def own_shots(critiques: bool) -> list[Message]:
    """Accord's own examples of revisions, with critiques before them or without."""
    principles = {p.id: p for p in read_constitution().principles}
    out: list[Message] = []
    for shot in yaml.safe_load((files("accord.constitution") / "shots.yaml").read_text()):
        principle = principles[shot["principle"]]
        out += [request(shot["question"]), said(shot["answer"])]
        if critiques:
            out += [request(principle.critique), said(shot["critique"])]
        out += [request(principle.revision), said(shot["revision"])]
    return out


def after_system(chat: list[Message], shots: Sequence[Message]) -> list[Message]:
    """The chat with the shots before it, but after what the system says, which templates want first."""
    first = 1 if chat and chat[0]["role"] == "system" else 0
    return [*chat[:first], *shots, *chat[first:]]


def digest_of(shots: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(list(shots)).encode()).hexdigest()[:12] if shots else ""


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def request(text: str) -> Message:
    return {"role": "user", "content": text}


PREFACE = re.compile(
    r"^\s*((sure|certainly|of course)\b[^:\n]{0,60}|(here|this)( is|'s)\b[^:\n]{0,60}|(the |my |a )?(revised|rewritten|new)\b[^:\n]{0,40})"
    r"\b(response|answer|revision|version|rewrite|reply)\b[^:\n]{0,30}:\s*",
    re.IGNORECASE,
)


def unwrapped(text: str) -> str:
    """A revision without the line that announces it, and without quotation marks around all of it."""
    text = PREFACE.sub("", text).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1] else text


def words(text: str) -> set[str]:
    """Those of English that carry content; none of a text in other letters."""
    return {word for word in re.findall(r"[a-z']{3,}", text.lower()) if word not in FUNCTION_WORDS}


RUN = 8
"""Words in a row that make a copy."""


def repeats(text: str, others: Iterable[str]) -> bool:
    """Whether it is one of the others, or has :data:`RUN` words in a row of one."""
    of = lambda words: {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
    split = lambda text: re.findall(r"\w+", text.lower())
    return any(of(split(text)) & of(split(other)) for other in others)


def check(chain: Chain, principles: Sequence[Principle], cut: bool, shown: Collection[str] = ()) -> str:
    """Why the last revision is no example to learn from; empty if it is one. ``shown``: what the writer saw as examples."""
    plain = lambda text: " ".join(text.lower().split())
    last = plain(chain.last)
    if not last:
        return "the last revision is empty"
    if cut:
        return "the last revision was cut by the length limit"
    if chain.steps and last == plain(chain.first):
        return "the last revision is a copy of the first answer"
    if any(last == plain(step.critique) for step in chain.steps) or any(last in (plain(p.critique), plain(p.revision)) for p in principles):
        return "the last revision is a copy of a critique or a request"
    if chain.steps and repeats(chain.last, shown):
        return "the last revision repeats an example"
    known = words(" ".join(m["content"] for m in as_chat(chain.prompt))) | words(chain.first)
    if chain.steps and known and words(chain.last) and not words(chain.last) & known and not declines(chain.last):
        return "the last revision leaves the prompt unanswered: it has no word of it, nor of the first answer"
    return ""


def examples(chains: Sequence[Chain], split: str | None = None) -> Iterator[dict[str, Any]]:
    """What ``accord sft`` learns from: the prompts, of one split or all, with their last revisions, those that are dropped left out."""
    for chain in chains:
        if not chain.dropped and split in (None, split_of(chain.id)):
            yield {"id": chain.id, "prompt": chain.prompt, "completion": chain.last, "theme": chain.theme}


SCORES: dict[str, Callable[[str, float], float]] = {
    "toxic": lambda text, toxic: toxic,
    "declines": lambda text, toxic: float(declines(text)),
}


def curve(chains: Sequence[Chain], score: str = "toxic") -> list[Estimate]:
    """The first answers and what came after each revision, of the chains that have all steps (the paper's figure 5, by other scores): mean
    probability of being ``toxic``, or the share that ``declines``. Of first attempts alone: whether there are others depends on what came of them."""
    chains = [chain for chain in chains if chain.attempt == 1]
    most = max((len(chain.steps) for chain in chains), default=0)
    whole = [chain for chain in chains if len(chain.steps) == most]
    names = [chain.id for chain in whole]
    at = [[(c.first, c.toxicity), *((step.revision, step.toxicity) for step in c.steps)] for c in whole]
    return [bootstrap_mean([SCORES[score](*texts[k]) for texts in at], names) for k in range(most + 1)] if whole else []


def revision_charts(toxic: Sequence[Estimate], declining: Sequence[Estimate]) -> list[str]:
    """Both curves over revisions with their intervals; empty texts where there are no revisions."""
    return [
        _chart("Toxic after so many revisions", toxic, "Mean probability by the bundled classifier; the same prompts at every point."),
        _chart("Declines after so many revisions", declining, "Share of answers that decline, by accord's rules; the same prompts at every point."),
    ]  # fmt: skip


def _chart(title: str, points: Sequence[Estimate], note: str) -> str:
    lines = {name: [(k, getattr(e, name)) for k, e in enumerate(points)] for name in ("value", "low", "high")}
    interval = [*lines["low"], *reversed(lines["high"])]
    return line_chart(title, {"mean": lines["value"], "95% interval": interval} if len(points) > 1 else {}, note, "revisions")


SHOWN = 200
"""Chains on a page."""


def page(chains: Sequence[Chain], writer: str, constitution: str) -> str:
    """A self-contained page: the curve over revisions, why chains were dropped, and the chains to open."""
    points = curve(chains)
    declining = curve(chains, "declines")
    why = Counter(chain.dropped.split(":")[0] for chain in chains if chain.dropped)
    template = jinja2.Environment(autoescape=True).from_string((files("accord.constitution") / "chains.html.j2").read_text())
    return template.render(
        chains=chains, shown=[{"asked": as_chat(c.prompt)[-1]["content"], "of": c} for c in chains[:SHOWN]], writer=writer,
        constitution=constitution, prompts=len({c.id for c in chains}), kept=sum(not c.dropped for c in chains), curve=points, declining=declining, charts=revision_charts(points, declining), dropped=why.most_common(),
        style=(files("accord.data") / "page.css").read_text(),
    )  # fmt: skip
