"""The stories' grammar: it reads what it writes, in one way; its entropy and length are exact; what is asked for is measured."""

import math
import random
from collections import Counter
from itertools import product

import pytest

from accord.data.records import Completion, Prompt
from accord.errors import UserError
from accord.feedback.criteria import Stories, criterion
from accord.feedback.panel import simulated_panel
from accord.stories.grammar import Again, Depending, Hidden, OneOf, Text, Word, readings, sequence
from accord.stories.stories import ANIMALS, ASKING, MOODS, PLACES, STORY, Wish, ask, read_story, read_wish, stories, wishes, write_story

TINY = sequence(
    Hidden("mood", ("up", "down")),
    Depending("mood", {"up": Word(("yes", "yea")), "down": Word(("no", "nay"))}),
    OneOf({"one": sequence(" a", Word(("x", "y"), "thing")), "two": sequence(" b", Word(("x", "y"), "thing"), Word(("z", "zzz")))}, "kind"),
    " ", Again("thing", ("x", "y")),
)  # fmt: skip


def everything():
    """TINY's texts and their probabilities, by hand."""
    found = Counter()
    for word, thing in product(("yes", "yea", "no", "nay"), ("x", "y")):
        found[f"{word} a{thing} {thing}"] += 1 / 16
        for other in ("z", "zzz"):
            found[f"{word} b{thing}{other} {thing}"] += 1 / 32
    return found


def test_entropy_and_length_of_a_small_grammar_by_enumeration():
    every = everything()
    assert math.fsum(every.values()) == 1
    assert TINY.bits == pytest.approx(-math.fsum(p * math.log2(p) for p in every.values()))
    assert TINY.length == pytest.approx(math.fsum(p * len(text) for text, p in every.items()))
    luck = random.Random(0)
    drawn = Counter(TINY.write(luck, {}) for _ in range(4000))
    assert set(drawn) == set(every) and all(abs(drawn[text] / 4000 - p) < 0.02 for text, p in every.items())
    for text in every:
        (bound,) = readings(TINY, text)
        assert bound["mood"] == ("up" if text[0] == "y" else "down") and bound["kind"] == ("one" if " a" in text else "two")
    for wrong in ("yes ax y", "yes bxx x", "yes bxz y", "no", "yes ax x ", ""):
        assert readings(TINY, wrong) == []


def test_what_depends_on_something_must_be_as_uncertain_everywhere():
    with pytest.raises(ValueError, match="different entropies"):
        Depending("mood", {"up": Word(("a", "b")), "down": Text("c")})


def test_every_story_is_read_back_in_one_way():
    for text in stories(400, seed=3):
        assert len(readings(STORY, text)) == 1, text
    assert list(stories(5, seed=3)) == list(stories(400, seed=3))[:5] != list(stories(5, seed=4))


def test_the_stories_entropy_is_that_of_their_choices():
    """-log2 of a story's probability, counted choice by choice while it is read back, has STORY.bits as its mean."""
    size, bits = [], []
    for text in stories(2000, seed=1):
        (bound,) = readings(STORY, text)
        scenes = int(bound["scenes"])
        size.append(len(text))
        bits.append(
            math.log2(4) + 1 + math.log2(6 * 16 * 16 * 8) + math.log2(3) + scenes * math.log2(8 * 4 * 8) + math.log2(16 * 8) + 1
            + (math.log2(4 * 4) if bound["speech"] == "yes" else 0) + 1 + math.log2(16 * 4) + math.log2(3) + 2
        )  # fmt: skip
    mean = lambda some: sum(some) / len(some)
    error = lambda some: (sum((x - mean(some)) ** 2 for x in some) / len(some)) ** 0.5 / len(some) ** 0.5
    assert abs(mean(bits) - STORY.bits) < 4 * error(bits) and abs(mean(size) - STORY.length) < 4 * error(size)
    assert STORY.bits == pytest.approx(
        math.log2(4) + 1 + math.log2(6 * 16 * 16 * 8 * 3) + 2 * 8 + math.log2(16 * 8) + 1 + 2 + 1 + 6 + math.log2(3) + 2
    )


def test_a_story_that_is_none():
    good = next(stories(1))
    story = read_story(good)
    assert story is not None and read_story(" " + good + "\n") == story
    name = good.split(" called ")[1].split()[0] if " called " in good else good.split("its name was ")[1].split(".")[0]
    other = "Milo" if name != "Milo" else "Nora"
    head, _, tail = good.rpartition(name)
    assert read_story(head + other + tail) is None  # the hero's name changes on the way
    assert read_story(good[:-1]) is None and read_story(good + " More.") is None and read_story("") is None


def test_wishes():
    forms = {ask(Wish("calm", "fox", "near the sea"), random.Random(i)) for i in range(50)}
    assert len(forms) == len(ASKING) and all(read_wish(f) == Wish("calm", "fox", "near the sea") for f in forms)
    assert read_wish("Tell a calm story about a fox.") == Wish("calm", "fox") and read_wish("Tell me a joke.") is None
    for wish, text, story in wishes(100, seed=2):
        assert read_wish(text) == wish and wish.fulfilled(read_story(story))
    assert len({wish.id for wish, _, _ in wishes(12000)}) == len(MOODS) * len(ANIMALS) * (1 + len(PLACES))
    story = read_story(write_story(random.Random(0), Wish("sad", "hen", "in the forest")))
    assert (story.mood, story.animal, story.place) == ("sad", "hen", "in the forest")
    assert (
        not Wish("calm", "hen").fulfilled(story)
        and not Wish("sad", "cat").fulfilled(story)
        and not Wish("sad", "hen", "near the sea").fulfilled(story)
    )
    endings = Counter(read_story(write_story(random.Random(i), Wish("sad", "hen"))).ending for i in range(600))
    assert all(150 < n < 250 for n in endings.values()) and len(endings) == 3


def test_the_criterion_and_its_labelers():
    calm = Wish("calm", "fox")
    of = lambda ending, wish=calm: next(t for i in range(1000) if read_story(t := write_story(random.Random(i), wish)).ending == ending)
    prompt = Prompt("p", ask(Wish("calm", "fox"), random.Random(0)))
    texts = [of("kind"), of("plain"), of("selfish"), of("kind", Wish("sad", "fox")), "Once upon a time.", of("kind")]
    group = [Completion(prompt, text, k != 5, k) for k, text in enumerate(texts)]
    judged = criterion("stories").judge(group)
    assert [j.gold for j in judged] == [1.0, 0.7, 0.5, 0.5, 0.0, 0.0] and [j.nonsense for j in judged] == [False] * 4 + [True] * 2
    assert judged[3].measures == {"parses": 1.0, "follows": 0.0, "kind": 1.0}  # a story, but another than was asked for
    ranked = simulated_panel("stories", 0).rank({"p": group}).rankings
    assert all(r.simulated and r.criterion == Stories.version and r.ranks[4:] == (None, None) for r in ranked)
    firsts = [simulated_panel("stories", seed).rank({"p": group}).rankings[0].ranks for seed in range(20)]
    assert sum(r[0] == 1 for r in firsts) > 15 and len(set(firsts)) > 1
    with pytest.raises(UserError, match="Did you mean 'stories'"):
        criterion("storys")
