"""The process in which a user's reward function runs, so that a crash or a hang there harms nothing here.

Started as ``python -m accord.reward.worker package.module:function``: a fresh interpreter that imports the
function's module and nothing of the script that asked for it. It speaks over its standard input and output;
what the function prints goes to standard error.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def find_function(path: str) -> Callable[..., Any]:
    """``package.module:function``, looked up from the current folder too."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module_name), name)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def plain(scores: Any) -> Any:
    """Scores as Python numbers: an array or tensor, or a list that may hold them. What they are is checked where they arrive."""
    if hasattr(scores, "tolist"):
        return scores.tolist()
    if not isinstance(scores, (list, tuple)):
        raise TypeError(f"it must return a list with a number for each completion; it returned {type(scores).__name__}")
    return [score.tolist() if hasattr(score, "tolist") else score for score in scores]


def serve(path: str, questions: Connection, answers: Connection) -> None:
    """Answer (prompts, completions) with ("ok", scores) or ("error", message) until the questions end."""
    try:
        function = find_function(path)
        answers.send(("ok", None))
    except BaseException as error:
        answers.send(("error", f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            prompts, completions = questions.recv()
        except (EOFError, OSError):
            return
        try:
            answers.send(("ok", plain(function(prompts, completions))))
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            answers.send(("error", f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})"))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    questions, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function starts or reads must not touch the two pipes
    os.dup2(2, 1)
    serve(sys.argv[1], questions, answers)


if __name__ == "__main__":
    main()
