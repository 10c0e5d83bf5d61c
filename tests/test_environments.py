"""Environments: the games themselves, episodes as rollouts, and learning in them."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accord.api import load_start, play_episodes, train_rl
from accord.cli import main
from accord.data.records import Prompt
from accord.errors import UserError
from accord.rollout.engine import Engine
from accord.rollout.environments import Answer, checked, make_environment
from accord.rollout.environments.tictactoe import Board, best_cells, free, other, play_perfectly, play_randomly, put, value, winner
from accord.rollout.episodes import play
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import score

# Tic-tac-toe.


def test_minimax_against_every_reply():
    """Whoever plays best_cells, and any of them, never loses from the start: every line of play is walked."""
    seen = set()

    def walk(board, mark, careful):
        if winner(board) is not None:
            assert winner(board) == careful
            return
        if not free(board) or (board, careful) in seen:
            return
        seen.add((board, careful))
        for cell in best_cells(board, mark) if mark == careful else free(board):
            walk(put(board, cell, mark), other(mark), careful)

    walk("." * 9, "X", "X")
    walk("." * 9, "X", "O")
    assert len(seen) > 500
    assert value("." * 9, "X") == 0  # the game is a draw
    assert value("XX.OO....", "X") == 1 and best_cells("XX.OO....", "X") == [2]
    assert value("XX..O....", "O") == 0 and best_cells("XX..O....", "O") == [2]


def test_a_game_by_hand():
    luck = random.Random(0)
    board = Board("." * 9, "X", lambda board, mark, luck: free(board)[0], luck)  # the opponent fills the first free cell
    assert board.answer("4", True) == Answer(0.0, "O0X", over=False)
    assert board.answer("2", True) == Answer(0.0, "O1X", over=False)
    assert board.answer("6", True) == Answer(1.0)  # 2, 4, 6
    for wrong in ("0", "9", "44", "", "x", "²"):
        assert Board("X........", "O", play_randomly, luck).answer(wrong, True) == Answer(-1.0)
    lost = Board("OO..X...X", "X", play_perfectly, luck)
    assert lost.answer("3", True) == Answer(-1.0)  # it had to take 2
    drawn = Board("XOXXOOO.X", "X", play_perfectly, luck)
    assert drawn.answer("7", True) == Answer(0.0)


def test_arithmetic():
    env = make_environment("arithmetic")
    assert len(env.prompts()) == 55
    game = env.start(Prompt("p", "3+4="), 0)
    assert [game.answer(t, True).reward for t in ("7", " 7", "7+", "6", "77", "", "+7")] == [1, 1, 0, 0, 0, 0, 0]


# Episodes as rollouts.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    import os

    os.environ["ACCORD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield load_start("scratch", "float32", make_environment("tictactoe"))
    del os.environ["ACCORD_CACHE"]


class Echo:
    """Two turns and a half: says back what it was told, with a reward for each turn."""

    name, alphabet, turn_tokens, max_turns = "echo", "abc", 3, 4

    def prompts(self):
        return [Prompt("one", "abc"), Prompt("two", "cba")]

    def start(self, prompt, seed):
        return _Echo(seed)


class _Echo:
    def __init__(self, seed):
        self.turn, self.turns = 0, 1 + seed % 3

    def answer(self, text, finished):
        self.turn += 1
        return Answer(float(self.turn), f"<{text}>", over=self.turn >= self.turns)


def test_what_the_environment_says_is_context_and_nothing_else(tiny):
    """Chosen tokens, rewards at the turns' ends, and log-probabilities that the scoring path confirms over the whole row."""
    prompts = [Prompt(f"p{i}", "ab" * i) for i in range(1, 6)]
    rollout = play(Engine(tiny, 4), Echo(), prompts, 2, Sampling(0.9, seed=3))
    again = score(tiny.model, rollout, 0, 0.9, 64)
    mask = rollout.response_mask
    torch.testing.assert_close(again.logprobs[mask], rollout.engine_logprobs[mask], rtol=0, atol=2e-5)
    turns_seen = set()
    for row in range(len(rollout)):
        columns = torch.nonzero(mask[row])[:, 0].tolist()
        runs = np.split(np.array(columns), np.nonzero(np.diff(columns) > 1)[0] + 1)
        turns_seen.add(len(runs))
        given = rollout.step_rewards[row]
        assert [float(given[run[-1]]) for run in runs] == [1.0, 2.0, 3.0, 4.0][: len(runs)]
        assert int((given != 0).sum()) == len(runs) and all(1 <= len(run) <= 3 for run in runs)
        # The row is what the chat template makes of the conversation, token for token.
        texts = rollout.texts[row].split(" | ")
        ids = tiny.tokenizer.encode_prompt(prompts[row // 2].content)
        for run, said in zip(runs, [*texts[1::2], None], strict=False):
            chosen = rollout.tokens[row, run[0] : run[-1] + 1].tolist()
            ids += chosen
            if run[-1] != columns[-1]:
                ids += tiny.tokenizer.encode_turn(said, chosen[-1] in tiny.tokenizer.eos_ids)
        assert ids == rollout.tokens[row, : len(ids)].tolist() and len(ids) == int(rollout.lengths[row])
    assert turns_seen == {1, 2, 3}


def test_a_turn_in_a_chat_is_what_the_template_makes(tiny):
    before = tiny.tokenizer.inner.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    encoded = tiny.tokenizer.encode_prompt([{"role": "user", "content": "q"}])
    answer = tiny.tokenizer.encode_completion("a", True)
    whole = tiny.tokenizer.inner(before, add_special_tokens=False)["input_ids"]
    assert encoded + answer + tiny.tokenizer.encode_turn("r", True) == whole
    assert encoded + answer[:-1] + tiny.tokenizer.encode_turn("r", False) == whole  # the environment ends a turn that was cut


def test_luck_belongs_to_the_episode_not_to_the_batch(scratch):
    env = make_environment("tictactoe")
    prompts = env.prompts()
    whole = play(Engine(scratch, 64), env, prompts, 2, Sampling(1.0, seed=1))
    part = play(Engine(scratch, 3), env, prompts[5:7], 2, Sampling(1.0, seed=1))
    assert part.texts == whole.texts[10:14]
    assert play(Engine(scratch, 64), env, prompts, 2, Sampling(1.0, seed=2)).texts != whole.texts


def test_the_context_ends_an_episode(scratch):
    class Long(Echo):
        max_turns = 10**6

        def start(self, prompt, seed):
            return SimpleNamespace(answer=lambda text, finished: Answer(0.0, "X0", over=False))

    rollout = play(Engine(scratch), Long(), [Prompt("p", "X0")], 1, Sampling(1.0))
    assert not rollout.finished[0] and int(rollout.lengths[0]) <= 128


# Learning in them.


def test_addition_is_learned_from_nothing(scratch, tmp_path):
    """Half the sums are right after a minute, where guessing gets a twentieth; on the way everything is checked as ever."""
    env = make_environment("arithmetic")
    start = load_start("scratch", "float32", env)
    settings = dict(
        adaptation="full", top_layers=3, prompts_per_step=55, completions_per_prompt=4, max_steps=60, learning_rate=1e-3, entropy_coef=0.05,
        critic_learning_rate=1e-3, kl_coef=0.0, kl_warn=1e9, truncation="nothing", validate_every=50, dtype="float32",
    )  # fmt: skip
    outcome = train_rl(start, environment=env, out=tmp_path / "r", **settings)
    before, after = (play_episodes(p, env, 550).step_rewards.sum(-1).mean() for p in (start, outcome.policy))
    assert float(before) < 0.12 and float(after) > 0.3


def test_the_commands(scratch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--prompts-per-step", "16", "--max-steps", "2", "--kl-coef", "0", "--truncation", "nothing"]
    assert main(["rl", "--model", "scratch", "--environment", "tictactoe", "--algorithm", "rloo", *short, "--out", "r"]) == 0
    assert main(["resume", "r"]) == 0
    assert main(["play", "--model", "r/policy", "--environment", "tictactoe-perfect", "--episodes", "40", "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"40 episodes of tictactoe-perfect: mean reward -?[\d.]+ \[", out)
    (tmp_path / "mine.py").write_text("class Env:\n    name = 'mine'\n")
    for words, reason in (
        (["--environment", "tiktaktoe"], "Did you mean 'tictactoe'"),
        (["--environment", "mine:Env"], "lacks alphabet, turn_tokens"),
        (["--environment", "mine:Nothing"], "could not be made: AttributeError"),
        ([], "accord rl needs --prompts"),
        (["--prompts", "p.jsonl"], "accord rl needs --reward"),
    ):
        assert main(["rl", "--model", "scratch", *words, "--out", "x"]) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
    rl = ["rl", "--model", "scratch", "--out", "x"]
    assert main([*rl, "--environment", "tictactoe", "--adaptation", "lora"]) == 2
    assert "trains in full" in capsys.readouterr().err
    assert "adaptation: full" in (tmp_path / "r" / "config.yaml").read_text()  # as it is used
    (tmp_path / "p.jsonl").write_text('{"prompt": "1"}\n' * 32)
    assert main([*rl, "--environment", "arithmetic", "--prompts", "p.jsonl"]) == 2
    assert "cannot start from prompt" in capsys.readouterr().err
    assert main(["play", "--model", "scratch", "--environment", "tictactoe", "--episodes", "0"]) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_turns": 0}, "max_turns is 0"),
        ({"turn_tokens": "2"}, "turn_tokens is '2'"),
        ({"alphabet": None}, "alphabet is None"),
        ({"prompts": list}, "at least one"),
    ],
)
def test_an_environment_is_checked(changes, reason):
    env = Echo()
    for name, given in changes.items():
        setattr(env, name, given)
    with pytest.raises(UserError, match=reason):
        checked(env)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('x')", "failed on .*KeyError"),
        ("return (float('nan'), '', True)", "gave nan for"),
        ("return 3", "must return an Answer"),
        ("return (0.0, 'zz', False)", "answered what the model cannot read: 'zz' has 'z'"),
        ("return (0.0, 5, False)", "text is a string"),
    ],
)
def test_an_environment_that_breaks_is_one_sentence(scratch, body, reason):
    names = {}
    exec(f"def answer(self, text, finished):\n    {body}", names)
    env = Echo()
    env.start = lambda prompt, seed: type("Broken", (), {"answer": names["answer"]})()
    with pytest.raises(UserError, match=reason):
        play(Engine(scratch), env, [Prompt("p", "X0")], 1, Sampling(1.0))
