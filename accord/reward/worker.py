"""The process in which a user's reward function runs, so that a crash or a hang there harms nothing here.

Started as ``python -m accord.reward.worker package.module:function GIGABYTES PARENT`` (0 gigabytes: no limit): a fresh interpreter
that imports the function's module and nothing of the script that asked for it. It speaks over its standard input and
output; what the function prints goes to standard error. It ends with the process PARENT (0: when it next reads).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
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


def plain(scores: Any, count: int) -> list[Any]:
    """``count`` scores as floats or None; what is neither becomes ``{"returned": what it looks like}``.

    Raises:
        TypeError: it is not a list of that many scores, so that nobody can say which is whose.
    """
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, (list, tuple)):
        raise TypeError(f"it must return a list with a number for each completion; it returned {type(scores).__name__}")
    if len(scores) != count:
        raise TypeError(f"it returned {len(scores)} scores for {count} completions; return one for each, None to skip")
    return [_number(score) for score in scores]


def _number(score: Any) -> Any:
    if score is None:
        return None
    try:
        return float(score)
    except Exception:
        try:
            return {"returned": repr(score)[:100]}
        except Exception:
            return {"returned": f"a {type(score).__name__}"}


def serve(path: str, questions: Connection, answers: int) -> None:
    """Answer (prompts, completions) until the questions end: ["ok", scores], ["error", why], or ["wrong", why] if asking again
    with fewer completions would not tell more. An answer is a line of JSON: nothing of the function's own is opened by the process that asked.
    """

    def answer(kind: str, value: Any) -> None:
        line = json.dumps([kind, value]).encode() + b"\n"
        while line:
            line = line[os.write(answers, line) :]

    try:
        function = find_function(path)
        answer("ok", None)
    except BaseException as error:
        answer("error", f"could not be imported: {_told(error)}")
        return
    own = os.getpid()
    while True:
        try:
            prompts, completions = questions.recv()
        except (EOFError, OSError):
            return
        try:
            scores = function(list(prompts), list(completions))
        except BaseException as error:
            outcome: tuple[str, Any] = "error", f"it raised {_told(error)}"
        else:
            try:
                outcome = "ok", plain(scores, len(completions))
            except TypeError as error:
                outcome = "wrong", str(error)
            except BaseException as error:
                outcome = "error", f"what it returned raised {_told(error)}"
        if os.getpid() != own:  # the function forked, and this is the child: it has nothing to answer
            os._exit(0)
        answer(*outcome)


def _told(error: BaseException) -> str:
    try:
        text = str(error)[:500]
    except Exception:
        text = ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that ends: a function that hangs reads no end of questions."""
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os._exit(0)


def main() -> None:
    end_with(int(sys.argv[3]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    questions, answers = Connection(os.dup(0), writable=False), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function starts or reads must not touch the two pipes
    os.dup2(2, 1)
    if memory := float(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    serve(sys.argv[1], questions, answers)


if __name__ == "__main__":
    main()
