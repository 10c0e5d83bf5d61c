"""The process in which a user's reward function runs, so that a crash or a hang there harms nothing here."""

from __future__ import annotations

import importlib
import os
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


def serve(path: str, pipe: Connection) -> None:
    """Answer (prompts, completions) with ("ok", scores) or ("error", message) until the pipe closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    try:
        function = find_function(path)
        pipe.send(("ok", None))
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            prompts, completions = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            scores = function(prompts, completions)
            pipe.send(("ok", list(scores)))
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(("error", f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})"))
