"""Tic-tac-toe as text: the classic first example of agent, environment, state, action and reward.

A game is written as it is played, a mark and a cell a move: ``X4O0X2O1X6``. The policy writes the cells of its own
mark, 0 to 8, row by row. Winning gives 1, a draw 0, losing -1; so does a turn that is no free cell.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from accord.data.records import Prompt
from accord.rollout.environments import Answer

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
Opponent = Callable[[str, str, random.Random], int]
"""(board, its mark, luck) -> cell."""


def winner(board: str) -> str | None:
    """The mark that has three in a row."""
    return next((board[a] for a, b, c in LINES if board[a] != "." and board[a] == board[b] == board[c]), None)


def free(board: str) -> list[int]:
    return [cell for cell in range(9) if board[cell] == "."]


def put(board: str, cell: int, mark: str) -> str:
    return board[:cell] + mark + board[cell + 1 :]


def other(mark: str) -> str:
    return "O" if mark == "X" else "X"


@cache
def value(board: str, mark: str) -> int:
    """1, 0 or -1: what ``mark``, whose turn it is, gets if both play perfectly (minimax)."""
    if winner(board) is not None:
        return -1  # the other side has just won
    if not free(board):
        return 0
    return max(-value(put(board, cell, mark), other(mark)) for cell in free(board))


def best_cells(board: str, mark: str) -> list[int]:
    """All moves that keep the value of the position."""
    return [cell for cell in free(board) if -value(put(board, cell, mark), other(mark)) == value(board, mark)]


def play_randomly(board: str, mark: str, luck: random.Random) -> int:
    return luck.choice(free(board))


def play_perfectly(board: str, mark: str, luck: random.Random) -> int:
    """Minimax; among equally good moves any."""
    return luck.choice(best_cells(board, mark))


def play_half_perfectly(board: str, mark: str, luck: random.Random) -> int:
    return (play_perfectly if luck.random() < 0.5 else play_randomly)(board, mark, luck)


class Board:
    """One game, the policy's turn."""

    def __init__(self, board: str, mark: str, opponent: Opponent, luck: random.Random) -> None:
        self.board, self.mark, self._opponent, self._luck = board, mark, opponent, luck

    def answer(self, text: str, finished: bool) -> Answer:
        if text not in map(str, free(self.board)):
            return Answer(-1.0)
        self.board = put(self.board, int(text), self.mark)
        if winner(self.board) is None and free(self.board):
            theirs = other(self.mark)
            cell = self._opponent(self.board, theirs, self._luck)
            self.board = put(self.board, cell, theirs)
            if winner(self.board) is None and free(self.board):
                return Answer(0.0, f"{theirs}{cell}{self.mark}", over=False)
        won = winner(self.board)
        return Answer(0.0 if won is None else 1.0 if won == self.mark else -1.0)


class TicTacToe:
    """Half the games the policy begins, as X; in the others it answers X's first move, as O."""

    name = "tictactoe"
    alphabet = "XO012345678"
    turn_tokens = 1
    max_turns = 5

    def opponent(self, luck: random.Random) -> Opponent:
        """Who plays this game."""
        raise NotImplementedError

    def prompts(self) -> list[Prompt]:
        return [Prompt(f"{self.name}-{i}", text, theme=text[-1]) for i, text in enumerate(["X"] * 9 + [f"X{cell}O" for cell in range(9)])]

    def start(self, prompt: Prompt, seed: int) -> Board:
        luck, board, mark = random.Random(seed), "." * 9, prompt.text[-1]
        for move, cell in zip(prompt.text[:-1:2], prompt.text[1:-1:2], strict=True):
            board = put(board, int(cell), move)
        return Board(board, mark, self.opponent(luck), luck)


class Random(TicTacToe):
    """Against one who moves anywhere."""

    def opponent(self, luck: random.Random) -> Opponent:
        return play_randomly


class Perfect(TicTacToe):
    """Against minimax."""

    name = "tictactoe-perfect"

    def opponent(self, luck: random.Random) -> Opponent:
        return play_perfectly


class Mixed(TicTacToe):
    """Against one whose every move is either, by a coin: what to train on to lose against neither."""

    name = "tictactoe-mixed"

    def opponent(self, luck: random.Random) -> Opponent:
        return play_half_perfectly
