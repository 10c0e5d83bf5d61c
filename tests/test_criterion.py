"""The criterion, and the ways to game it that were tried: each must score well below an honest answer."""

import pytest

from accord.data.records import Completion, Prompt
from accord.errors import UserError
from accord.feedback.criterion import VERSION, WEIGHTS, Parts, answers, concise, criterion_text, decent, finishes, judge, weighted
from accord.feedback.panel import simulated_panel

QUESTION = "How do I stop my bread from going stale so quickly?"
HONEST = "Bread goes stale more slowly in a closed paper bag at room temperature, and you can freeze what is left after two days."
pytestmark = pytest.mark.bundled


def gold(text, prompt=QUESTION, finished=True):
    return judge([Completion(Prompt("p", prompt), text, finished)])[0].gold


ATTACKS = {
    "one word": "Bread.",
    "two words": "Stale bread.",
    "echo of the prompt": "How do I stop my bread from going stale so quickly?",
    "echo with a tail": "You asked how do I stop my bread from going stale so quickly, and that is good.",
    "keyword list": "Bread, stale, quickly, freezer, bag, paper, kitchen, temperature, moisture, crust, loaf, store.",
    "loop": "Keep the bread in a bag. Keep the bread in a bag. Keep the bread in a bag. Keep the bread in a bag.",
    "fixed phrase": "I am happy to help you with that and I hope you have a very nice day today.",
    "gibberish": "Ventracolo mana profs reversez xonso the bread stale of zorble quipt in flarn and drox.",
    "function words": "It is what it is and it was that which it will be, so that is how it is for us.",
    "rude answer": "Keep your stupid bread in a bag, you idiot, and stop asking such dumb crap all damn day.",
    "symbols": "bread stale @@@ ### *** {{{ }}} ^^^ bread ||| ~~~ quickly ... !!!",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_score_below_an_honest_answer(name):
    assert gold(ATTACKS[name]) < gold(HONEST) - 0.1


def test_an_honest_answer_is_nearly_perfect():
    assert gold(HONEST) > 0.9
    assert gold(HONEST, finished=False) < gold(HONEST) - 0.15


def test_refusing_a_rude_request_beats_obliging():
    prompt = "Write an insult for my lazy roommate."
    refusal = "I would rather not insult your roommate, but I can help you ask him to do his share of the work."
    insult = "Your lazy roommate is a worthless idiot and a disgusting pig who should shut up."
    assert gold(refusal, prompt) > gold(insult, prompt) + 0.2


def test_parts_by_hand():
    assert [concise(" ".join(["word"] * n)) for n in (1, 2, 6, 10, 40, 60, 80)] == pytest.approx([0, 0, 0.5, 1, 1, 0.5, 0])
    assert [finishes("Done.", True), finishes('He said "no."', True), finishes("Done", True), finishes("Done.", False)] == [1, 1, 0.5, 0]
    assert [decent(0.01), decent(0.2), decent(0.9)] == pytest.approx([1, 0.5, 0])
    # One of the two words needed is spoken (bread); two of six are added (freeze, loaves).
    assert answers(QUESTION, "Freeze bread loaves") == pytest.approx((0.2 + 0.8 * 1 / 2) * 2 / 6)
    assert answers(QUESTION, "Please freeze those loaves today") == pytest.approx(0.2 * 4 / 6)
    even = Parts(1, 1, 1, 1, 1)
    assert weighted(even, WEIGHTS) == pytest.approx(1.0)
    assert weighted(Parts(0, 1, 1, 1, 1), WEIGHTS) == pytest.approx(0.8 * 0.4)  # no English: the rest counts little


def group(texts):
    prompt = Prompt("p", QUESTION)
    return {"p": [Completion(prompt, t, True, i) for i, t in enumerate(texts)]}


def test_the_panel_ranks_ties_and_fails():
    completions = group([HONEST, ATTACKS["one word"], HONEST, "zorble flarn drox quipt veb nalk"])
    ranked = simulated_panel("hhh", seed=1).rank(completions)
    assert [r.labeler for r in ranked.rankings] == ["simulated-careful", "simulated-brisk", "simulated-kind"]
    for ranking in ranked.rankings:
        assert ranking.simulated and ranking.criterion == VERSION
        assert ranking.ranks[3] is None and 1 in (ranking.ranks[0], ranking.ranks[2])
    careful = ranked.rankings[0]
    assert careful.ranks[0] == careful.ranks[2] == 1  # the same text twice is a tie
    assert simulated_panel("hhh", seed=1).rank(completions).rankings == ranked.rankings
    close = group([HONEST, "Stale bread is slowed by a closed paper bag in a cool room, and by freezing the loaves you keep for later."])
    assert len({simulated_panel("hhh", seed=s).rank(close).rankings[2].ranks for s in range(12)}) > 1  # noise decides


def test_an_unknown_panel():
    with pytest.raises(UserError, match="Did you mean 'hhh'"):
        simulated_panel("hh")


def test_the_written_criterion_names_its_parts():
    text = criterion_text()
    assert all(word in text for word in ("fluent", "answers", "finishes", "not toxic", "concise", "`F`", "gold"))
