"""Where tokens stand in rows, so that each is computed once.

A layer computes most of what it computes for every token alone; only attention looks at rows. So activations are kept
as (N,D), one line a token, without padding; and because a token's state depends on the tokens before it and on nothing
else, a beginning that several rows have in common (a prompt and its K completions) is there once. Attention is given
(B,T) grids of heads: :func:`accord.nn.attention.lay_out` makes them, :func:`accord.nn.attention.collect` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Which of N tokens stands at each place of a (B,T) grid, and where each of them stands.

    Attributes:
        token: (B,T) int64, the number of the token at a place, -1 where there is none.
        places: (P,) int64, b * T + t of every place with a token, in the tokens' order.
        offsets: (N+1,) int64: token n stands at ``places[offsets[n]:offsets[n + 1]]``.
    """

    token: Tensor
    places: Tensor
    offsets: Tensor

    @classmethod
    def once(cls, places: Tensor, shape: torch.Size) -> Places:
        """Every token at one place. places (N,)."""
        numbers = torch.arange(len(places) + 1, device=places.device)
        token = torch.full((shape.numel(),), -1, dtype=torch.long, device=places.device)
        token[places] = numbers[:-1]
        return cls(token.view(shape), places, numbers)

    @property
    def single(self) -> bool:
        """Whether every token stands at one place."""
        return len(self.places) == len(self.offsets) - 1

    @property
    def owners(self) -> Tensor:
        """(P,) int64: the token at each of ``places``."""
        return self.token.flatten()[self.places]


@dataclass(frozen=True)
class Layout:
    """N different tokens of B rows of up to T.

    Attributes:
        tokens, positions: (N,) int64; a position counts from the start of the row.
        everywhere: all places of each token.
        home: the one place of each token where its own query looks from.
    """

    tokens: Tensor
    positions: Tensor
    everywhere: Places
    home: Places

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor) -> Layout:
        """Of right-padded rows. tokens (B,T), lengths (B,). Asks the device for the tokens."""
        B, T = tokens.shape
        device, sizes = tokens.device, lengths.tolist()
        rows: Sequence[list[int]] = [row[:size] for row, size in zip(tokens.tolist(), sizes, strict=True)]
        columns = torch.arange(T, device=device)
        order = torch.tensor(sorted(range(B), key=rows.__getitem__), dtype=torch.long, device=device)
        # In this order a row shares its longest beginning with the row before it; what is beyond that is new.
        ordered, exists = tokens[order], columns < lengths[order][:, None]
        common = (ordered[1:] == ordered[:-1]) & exists[1:] & exists[:-1]
        shared = torch.zeros(B, 1, dtype=torch.long, device=device)
        shared[1:, 0] = common.long().cumprod(1).sum(1)
        new = exists & (columns >= shared)
        number = (new.flatten().cumsum(0) - 1).view(B, T)
        owner = torch.where(new, torch.arange(B, device=device)[:, None], 0).cummax(0).values
        token = torch.empty_like(number)
        token[order] = number.gather(0, owner).masked_fill(~exists, -1)
        everywhere = home = Places.once((order[:, None] * T + columns)[new], token.shape)
        if len(home.places) < sum(sizes):
            flat = token.flatten()
            there = flat.sort(stable=True).indices[int((flat < 0).sum()) :]
            counts = torch.bincount(flat[there], minlength=len(home.places))
            everywhere = Places(token, there, torch.cat((counts.new_zeros(1), counts.cumsum(0))))
        return cls(ordered[new], columns.expand(B, T)[new], everywhere, home)

    @classmethod
    def apart(cls, tokens: Tensor, lengths: Tensor, widest: int) -> Layout:
        """Of rows one after the other, of which no beginnings are compared. tokens (N,), lengths (B,), of ``widest`` at most."""
        row = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths, output_size=len(tokens))
        positions = torch.arange(len(tokens), device=tokens.device) - (lengths.cumsum(0) - lengths)[row]
        places = Places.once(row * widest + positions, torch.Size((len(lengths), widest)))
        return cls(tokens, positions, places, places)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, x: Tensor) -> Tensor:
        """A line a token (N,...) -> a line a place (B,T,...), 0 where there is no token."""
        out = x.new_zeros(self.everywhere.token.numel(), *x.shape[1:])
        out[self.everywhere.places] = x[self.everywhere.owners]
        return out.unflatten(0, self.everywhere.token.shape)

    def lines(self, x: Tensor) -> Tensor:
        """A line a place (B,T,...) -> a line a token (N,...), from where its home is."""
        return x.flatten(0, 1).index_select(0, self.home.places)

    def home_of(self, wanted: Tensor) -> Places:
        """Home of some of the tokens. wanted (M,) numbers."""
        return Places.once(self.home.places[wanted], self.home.token.shape)


def select_lines(x: Tensor, index: Tensor) -> Tensor:
    """Lines of x, all of them used: (n,...) -> (len(index),...). Where some repeat, their gradients are summed in fp32, as the kernels do."""
    if len(index) == len(x):
        return x.index_select(0, index)
    return x.to(torch.promote_types(x.dtype, torch.float32)).index_select(0, index).to(x.dtype)
