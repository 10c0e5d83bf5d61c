"""The stages before a recipe's others, where its model is made from nothing: corpus, tokenizer, pretraining, instruction tuning."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from accord.config import Base, Gates
from accord.data.records import Prompt, split_of
from accord.data.sources import read_texts
from accord.data.statistics import Estimate, bootstrap_mean
from accord.disk import stream_lines, whole_folder, write_lines
from accord.feedback.criteria import Stories
from accord.progress import track
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.runs import Run
from accord.stages import Done, Gate, falls
from accord.stories.grammar import readings
from accord.stories.stories import STORY, ask, every_wish, read_story, stories, wishes
from accord.text.vocabulary import learn_tokenizer, statistics
from accord.tuning import carry_out, folder_of, prepare, train_sft

READ_BACK = 1000
SAMPLED = 400


class Beginning:
    """See the module's docstring. Each stage reads what the ones before it wrote."""

    def __init__(self, base: Base, gates: Gates, seed: int, run: Run) -> None:
        self.base, self.gates, self.seed, self.run = base, gates, seed, run

    @property
    def stages(self) -> Sequence[tuple[str, Callable[[], Done]]]:
        return (("corpus", self.corpus), ("tokenizer", self.tokenizer), ("pretrain", self.pretrain), ("sft", self.sft))

    @property
    def model(self) -> Path:
        """What the recipe's other stages begin with."""
        return self.run.folder / "sft/policy"

    @property
    def texts(self) -> list[str]:
        return self.base.text or [str(self.run.folder / "corpus.jsonl")]

    def corpus(self) -> Done:
        if self.base.text:
            texts = read_texts(self.base.text)
            size = sum(len(text.encode()) for text in texts)
            gate = Gate("some text", f"{size / 1e6:.1f} MB in {len(texts)} documents", True, "")
            return Done(gate, {"documents": len(texts), "bytes": size})
        count = self.base.documents
        stream_lines(self.run.folder / "corpus.jsonl", ({"text": t} for t in track(stories(count, self.seed), "Stories", count)))
        rows = (
            {"id": f"wish-{i:05d}", "prompt": wish, "completion": story}
            for i, (wish, story) in enumerate(asked(self.base.asked, self.seed), 1)
        )
        stream_lines(self.run.folder / "examples.jsonl", rows)
        ways = [len(readings(STORY, text)) for text in stories(READ_BACK, self.seed)]
        once = sum(n == 1 for n in ways)
        gate = Gate("every story can be read back in one way", f"{once} of {len(ways)}", once == len(ways), "Mend the grammar.")
        return Done(gate, {"documents": count, "bits_per_story": STORY.bits, "bytes_per_story": STORY.length, "bits_per_byte": rate()})

    def tokenizer(self) -> Done:
        texts = read_texts(self.texts)
        learned = learn_tokenizer(texts, "bpe", self.base.vocabulary)
        found = statistics(learned, texts[:READ_BACK])
        with whole_folder(self.run.folder / "tokenizer") as aside:
            learned.save_pretrained(str(aside))
        got = f"{found.coverage:.2%}, {found.bytes_per_token:.2f} bytes a token"
        return Done(Gate("a tokenizer that can tell every character", got, found.coverage == 1.0, ""), found._asdict())

    def pretrain(self) -> Done:
        folder, resume = folder_of("pretrain", self.run.folder / "pretrain", True)
        text, settings = self.base.text or ["../corpus.jsonl"], self.base.pretrain.model_dump()
        config = {"command": "pretrain", "tokenizer": "../tokenizer", "text": text, "pretrain": settings}
        found = {**config, "tokenizer": str(self.run.folder / "tokenizer"), "text": self.texts}  # where they are may change
        tuned = carry_out(folder, config, prepare(found, "pretrain"), resume, self.run.allow_changes)
        tokens = int(sum(row["tokens"] for row in rows_of(self.run.folder / "pretrain")))
        if self.base.text:
            return Done(falls(tuned.before, tuned.after, "bits_per_byte", "bits a byte"), tuned.after, tokens)
        policy = Policy.load(str(self.run.folder / "pretrain/policy"), self.base.pretrain.dtype)
        texts = self.told(policy, self.base.temperature)
        whole, parses = stories_among(texts)
        plain = parses if self.base.temperature == 1 else stories_among(self.told(policy, 1.0))[1]
        known = set(read_texts(self.texts))
        new = sum(text not in known for text in whole) / max(1, len(whole))
        write_lines(self.run.folder / "stories.jsonl", ({"story": text} for text in texts))
        ratio = tuned.after["bits_per_byte"] / rate()
        facts = {
            **tuned.after,
            "entropy_rate": rate(),
            "ratio": ratio,
            "parses": parses.to_json(),
            "parses_at_1": plain.to_json(),
            "new": new,
        }
        gate = Gate(
            f"bits a byte within {self.gates.entropy_ratio - 1:.0%} of the grammar's {rate():.4f}, and {self.gates.parses:.0%} of {SAMPLED} stories of the grammar at temperature {self.base.temperature:g}",
            f"{tuned.after['bits_per_byte']:.4f} ({ratio - 1:+.1%}), {parses} ({new:.0%} of them new; at temperature 1 {plain})",
            ratio <= self.gates.entropy_ratio and parses.value >= self.gates.parses,
            "In a new run, train on more (base.documents, base.pretrain.epochs) or a larger base.pretrain.size.",
        )  # fmt: skip
        return Done(gate, facts, tokens)

    def told(self, policy: Policy, temperature: float) -> list[str]:
        """:data:`SAMPLED` texts of the pretrained policy from nothing; empty where one did not end."""
        end, names = policy.tokenizer.eos_ids[0], [f"story-{i}" for i in range(SAMPLED)]
        sampling = Sampling(temperature, max_new_tokens=policy.context - 1, seed=self.seed)
        written = Engine(policy, 100).go_on([[end]] * SAMPLED, names, sampling)
        return [policy.tokenizer.decode(ids) if finished else "" for ids, _, finished in written]

    def sft(self) -> Done:
        start = Policy.load(str(self.run.folder / "pretrain/policy"), self.base.sft.dtype)
        start.source = "../pretrain/policy"  # where it is may change
        examples = self.base.examples or self.run.folder / "examples.jsonl"
        tuned = train_sft(
            start, examples, out=self.run.folder / "sft", resume=True, allow_changes=self.run.allow_changes, **self.base.sft.model_dump()
        )
        tokens = int(sum(row["tokens"] for row in rows_of(self.run.folder / "sft")))
        if self.base.examples:
            return Done(falls(tuned.before, tuned.after, "loss", "nats a token"), tuned.after, tokens)
        policy = Policy.load(str(self.model), self.base.sft.dtype)
        held = [p for p in story_prompts() if split_of(p.id) == "heldout"]
        room = policy.context - max(len(policy.tokenizer.encode_prompt(p.content)) for p in held)
        completions = (
            Engine(policy, 100).sample(held, 1, Sampling(self.base.temperature, max_new_tokens=room, seed=self.seed)).completions()
        )
        judged = Stories().judge(completions)
        found = {name: bootstrap_mean([j.measures[name] for j in judged], [p.id for p in held]) for name in ("parses", "follows", "kind")}
        gate = Gate(
            f"{self.gates.follows:.0%} of {len(held)} held-out wishes followed", str(found["follows"]), found["follows"].value >= self.gates.follows,
            "In a new run, give more examples (base.asked), or more epochs (base.sft.epochs).",
        )  # fmt: skip
        return Done(gate, {name: estimate.to_json() for name, estimate in found.items()}, tokens)


def asked(count: int, seed: int) -> list[tuple[str, str]]:
    """So many wishes and stories for them; none of a wish that is held out."""
    given = wishes(3 * count, seed)
    return list(islice(((text, story) for wish, text, story in given if split_of(wish.id) != "heldout"), count))


def rate() -> float:
    """The stories' entropy rate, bits a byte: of the texts, with what it takes to tell where they end."""
    return STORY.bits / STORY.length


def story_prompts() -> list[Prompt]:
    """Every wish once, in words that its id decides."""
    return [Prompt(wish.id, ask(wish, random.Random(wish.id)), wish.mood) for wish in every_wish()]


def stories_among(texts: Sequence[str]) -> tuple[list[str], Estimate]:
    """Those that are of the grammar, and their share."""
    are = [read_story(text) is not None for text in texts]
    return [text for text, is_one in zip(texts, are, strict=True) if is_one], bootstrap_mean(
        list(map(float, are)), list(map(str, range(len(texts))))
    )


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] >= 0]
