"""Small stories: an animal with a name and a mood, what it does, whom it meets, what they find, and how it ends.

Properties that can be asked for and measured: the animal, the mood (which shows in the words that are chosen and is never named), where
it lives, whether somebody speaks, and the ending: kind, selfish or plain.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from accord.stories.grammar import Again, Depending, Hidden, Node, OneOf, Text, Word, readings, sequence

ANIMALS = ("bear", "cat", "crow", "deer", "dog", "duck", "fox", "frog", "goat", "goose", "hare", "hen", "mole", "mouse", "toad", "wolf")
OTHERS = (
    "badger", "bee", "beetle", "cricket", "ladybird", "lizard", "moth", "pigeon", "rabbit", "raven", "seal", "snail", "sparrow", "spider", "squirrel",
    "turtle",
)  # fmt: skip
NAMES = ("Bela", "Cora", "Dima", "Enzo", "Fina", "Gus", "Hedda", "Ivo", "Juno", "Kasper", "Lumi", "Milo", "Nora", "Odo", "Pia", "Quinn")
PLACES = (
    "by the river", "in the forest", "on the hill", "near the sea", "under the bridge", "behind the mill", "in the meadow", "at the old farm",
)  # fmt: skip
MOODS = {
    "calm": {
        "is": ("quiet", "gentle", "patient", "mild", "peaceful", "steady"),
        "does": ("watched the clouds above", "listened to the rain on", "rested beside", "breathed slowly beneath"),
        "says": ("There is no hurry", "Let us sit a while", "How still it is today", "I like the silence"),
    },
    "merry": {
        "is": ("jolly", "cheerful", "playful", "lively", "laughing", "happy"),
        "does": ("danced around", "sang a song about", "laughed and jumped over", "played tricks behind"),
        "says": ("What a wonderful day", "Come and dance with me", "I have a new joke", "Let us make some music"),
    },
    "sad": {
        "is": ("lonely", "gloomy", "weary", "tearful", "mournful", "sorrowful"),
        "does": ("wept beside", "sighed and looked at", "thought of lost friends near", "cried softly under"),
        "says": ("Nobody remembers me", "My heart is heavy", "I miss the old times", "The days are so grey"),
    },
    "brave": {
        "is": ("bold", "daring", "fearless", "valiant", "mighty", "proud"),
        "does": ("climbed to the top of", "fought the wind at", "leapt across", "guarded"),
        "says": ("I fear no storm", "Follow me and be strong", "Nothing can stop us", "We will win this day"),
    },
}  # fmt: skip
THINGS = ("the tall tree", "the stone wall", "the broken fence", "the wide pond", "the mossy rock", "the narrow path", "the empty barn", "the fallen log")  # fmt: skip
TIMES = ("Every morning", "Every evening", "At noon", "Late at night", "After lunch", "Before sunrise", "On rainy days", "In the winter")
TRAITS = ("was very hungry", "had lost its way", "was looking for a friend", "told strange tales", "could not sleep", "came from far away", "wore a red scarf", "knew many songs")  # fmt: skip
REPLIES = ("You speak well", "I was hoping to hear that", "That is how I feel too", "Then I will stay with you")
FOUND = ("apple", "bell", "blanket", "candle", "coin", "drum", "feather", "honey jar", "key", "lantern", "loaf of bread", "map", "nut", "pear", "ribbon", "silver spoon")  # fmt: skip
WHERE = ("in the grass", "under a leaf", "beside the road", "in a hollow stump")
AFTER = ("slept well", "smiled for days", "felt warm inside", "became friends")

_name, _animal, _found = Again("name", NAMES), Again("animal", ANIMALS), Again("found", FOUND)
_other = Again("other", OTHERS)


def _of_mood(what: str) -> Node:
    return Depending("mood", {mood: Word(words[what]) for mood, words in MOODS.items()})


def _scenes(count: int) -> Node:
    scene = sequence(" ", Word(TIMES), ", ", _name, " ", _of_mood("does"), " ", Word(THINGS), ".")
    return sequence(*[scene] * count)


def _speech() -> Node:
    said = sequence(' "', _of_mood("says"), '," said ', _name, '. "', Word(REPLIES), '," said the ', _other, ".")
    return OneOf({"yes": said, "no": Text("")}, "speech")


STORY = sequence(
    Hidden("mood", tuple(MOODS)),
    OneOf({
        "once": sequence("Once there was a ", _of_mood("is"), " ", Word(ANIMALS, "animal"), " called ", Word(NAMES, "name"), " who lived ", Word(PLACES, "place"), "."),
        "place": sequence("A ", _of_mood("is"), " ", Word(ANIMALS, "animal"), " lived ", Word(PLACES, "place"), ", and its name was ", Word(NAMES, "name"), "."),
    }),
    OneOf({str(n): _scenes(n) for n in (1, 2, 3)}, "scenes"),
    " One day ", _name, " met a ", Word(OTHERS, "other"), " who ", Word(TRAITS), ".",
    _speech(),
    OneOf({
        "they": sequence(" They found a ", Word(FOUND, "found"), " ", Word(WHERE), "."),
        "name": sequence(" ", _name, " found a ", Word(FOUND, "found"), " ", Word(WHERE), "."),
    }),
    OneOf({
        "kind": sequence(" ", _name, " gave the ", _found, " to the ", _other, ", and they both ", Word(AFTER), "."),
        "selfish": sequence(" ", _name, " kept the ", _found, " and left the ", _other, " alone, but never ", Word(AFTER), "."),
        "plain": sequence(" The ", _animal, " and the ", _other, " looked at the ", _found, ", went home and ", Word(AFTER), "."),
    }, "ending"),
)  # fmt: skip
ASKING = ("Tell a {mood} story about a {animal}{place}.", "I would like a {mood} story about a {animal}{place}.", "Write me a {mood} story about a {animal}{place}.", "Please make up a {mood} story about a {animal}{place}.")  # fmt: skip


class Story(NamedTuple):
    """A story's properties. ``place`` in words, such as ``by the river``."""

    animal: str
    mood: str
    place: str
    speech: bool
    ending: str


class Wish(NamedTuple):
    """What a story is asked to be; an empty ``place`` is any."""

    mood: str
    animal: str
    place: str = ""

    @property
    def id(self) -> str:
        return "-".join((self.mood, self.animal, *self.place.split()))

    def fulfilled(self, story: Story) -> bool:
        return story.mood == self.mood and story.animal == self.animal and self.place in ("", story.place)


def write_story(luck: random.Random, wish: Wish | None = None) -> str:
    """A story by chance; with a wish, one of those that fulfil it, each as likely as it is among all that do."""
    asked = {} if wish is None else {"mood": wish.mood, "animal": wish.animal, **({"place": wish.place} if wish.place else {})}
    return STORY.write(luck, asked)


def read_story(text: str) -> Story | None:
    """Its properties; None if it is not of the grammar."""
    found = readings(STORY, text.strip())
    if not found:
        return None
    b = found[0]
    return Story(b["animal"], b["mood"], b["place"], b["speech"] == "yes", b["ending"])


def stories(count: int, seed: int = 0) -> Iterator[str]:
    """So many, the same for the same seed; the first of a larger count are those of a smaller one."""
    luck = random.Random(f"stories {seed}")
    for _ in range(count):
        yield write_story(luck)


def ask(wish: Wish, luck: random.Random) -> str:
    """A wish in words."""
    return _in_words(luck.choice(ASKING), wish)


def read_wish(text: str) -> Wish | None:
    """The wish behind :func:`ask`'s words; None if they are not its."""
    return _asked().get(text)


@cache
def _asked() -> dict[str, Wish]:
    """Every wish in every words."""
    return {_in_words(form, wish): wish for wish in every_wish() for form in ASKING}


def every_wish() -> list[Wish]:
    return [Wish(mood, animal, place) for mood in MOODS for animal in ANIMALS for place in ("", *PLACES)]


def _in_words(form: str, wish: Wish) -> str:
    return form.format(mood=wish.mood, animal=wish.animal, place=f" that lives {wish.place}" if wish.place else "")


def wishes(count: int, seed: int = 0) -> Iterator[tuple[Wish, str, str]]:
    """So many wishes, in words, with a story each: every wish that there is is as likely, so eight of nine ask for a place too."""
    luck = random.Random(f"wishes {seed}")
    for _ in range(count):
        wish = Wish(luck.choice(list(MOODS)), luck.choice(ANIMALS), luck.choice(("", *PLACES)))
        yield wish, ask(wish, luck), write_story(luck, wish)
