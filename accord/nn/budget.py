"""How much is computed at once, and what happens where memory does not suffice for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from accord.errors import UserError
from accord.nn.memory import give_back_freed_memory

Result = TypeVar("Result")
LEAST = 64  # tokens; below, a micro-batch is a row whatever the budget


class TokenBudget:
    """Padded tokens computed at once. Where memory runs out they are halved, for good, and the work is done again.

    Attributes:
        tokens: the budget. Micro-batches change what is held at a time, not what is computed.
        halved: how often it was.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.halved = tokens, 0

    def fit(self, work: Callable[[int], Result]) -> Result:
        """``work(tokens)``, which must be able to start over.

        Raises:
            UserError: memory runs out with a row at a time too.
        """
        while True:
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Here the error's traceback is gone, and with it the tensors that its frames held.
            if self.tokens < LEAST:
                raise UserError(
                    "Memory runs out with as little as possible at a time, a single row or prompt; use shorter texts (--max-new-tokens), train "
                    "fewer layers (--top-layers), or take a smaller model."
                )
            self.tokens //= 2
            self.halved += 1
            give_back_freed_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: of Python, of torch on a CPU, or of a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("defaultcpuallocator", "can't allocate memory", "out of memory", "alloc_failed"))
