"""A corpus in tokens, in a file that is mapped into memory, and the rows that a model is trained on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from accord.disk import disk_error, read_object
from accord.errors import UserError
from accord.nn.layout import Layout
from accord.progress import console, safe_point
from accord.text.tokenizer import Tokenizer

TOGETHER = 2**22
"""Characters that are encoded at once."""
FEW = 20
"""Documents below which the held-out part is the end of the text."""
MEASURED = 100_000
"""Tokens that are held out, about, and at most a twentieth."""


@dataclass(frozen=True)
class Tokens:
    """Documents in tokens, each between two end tokens.

    Attributes:
        ids: (N,) all tokens, one document after the other, on the disk.
        starts: (D+1,) where each document begins, and where the last one ends.
        sizes: (D,) bytes of each document's text (UTF-8).
        digest: of all of that.
    """

    ids: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    digest: str

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: Tokenizer, folder: Path, key: str) -> Tokens:
        """Those in ``folder``, where they are written first if they are not there.

        Args:
            key: what they are made of; a folder that holds others is an error.

        Raises:
            UserError: there is no text, or the folder cannot be written.
        """
        if not folder.is_dir():
            _make(texts, tokenizer, folder, key)
        about = read_object(folder / "about.json")
        if about.get("key") != key:
            raise UserError(f"{folder} holds the tokens of something else; delete it.")
        ids = np.memmap(folder / "ids.bin", dtype=about["dtype"], mode="r")
        starts, sizes = np.load(folder / "starts.npy"), np.load(folder / "sizes.npy")
        if len(ids) != starts[-1]:
            raise UserError(f"{folder} is damaged; delete it.")
        return cls(ids, starts, sizes, about["digest"])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def whole(self) -> Rows:
        """All of it."""
        return Rows(self, np.stack((self.starts[:-1], self.starts[1:]), 1))

    def split(self) -> tuple[Rows, Rows]:
        """What is trained on, and what is held out: whole documents by their place, a twentieth of the tokens at most; where they are few
        or long, the end of the text.

        Raises:
            UserError: there is too little of it.
        """
        count, total = len(self), len(self.ids)
        most = min(MEASURED, total // 20)
        lengths, chosen, so_far = np.diff(self.starts), np.zeros(count, dtype=bool), 0
        for i in sorted(range(count), key=lambda i: hashlib.sha256(str(i).encode()).digest())[: count // FEW + 1]:
            if so_far + lengths[i] <= most:
                chosen[i], so_far = True, so_far + lengths[i]
        if total < 4:
            raise UserError("There is too little text to learn from and to hold some of it out; give more.")
        if count < FEW or so_far < most // 4:
            cut = total - max(most, 2)
            begin = int(np.searchsorted(self.starts, cut, "right")) - 1
            spans = [(a, b) for a, b in zip(self.starts[:begin], self.starts[1 : begin + 1], strict=True)]
            held = [(cut, self.starts[begin + 1]), *zip(self.starts[begin + 1 : -1], self.starts[begin + 2 :], strict=True)]
            return Rows(self, [*spans, (self.starts[begin], cut)]), Rows(self, held)
        every = np.stack((self.starts[:-1], self.starts[1:]), 1)
        return Rows(self, every[~chosen]), Rows(self, every[chosen])


def _make(texts: Iterable[str], tokenizer: Tokenizer, folder: Path, key: str) -> None:
    """Write the folder, whole or not at all. Two may be at it: the first to end makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(texts, tokenizer, aside, key)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(texts: Iterable[str], tokenizer: Tokenizer, folder: Path, key: str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.size <= 2**16 else np.uint32)
    end = tokenizer.eos_ids[0]
    starts, sizes, total, found = [0], list[int](), 0, hashlib.sha256()
    with (folder / "ids.bin").open("wb") as out:
        for some in _together(texts):
            safe_point("Nothing is kept of the tokens.")
            for text, ids in zip(some, tokenizer.encode_texts(some), strict=True):
                row = np.array([end, *ids, end], dtype=dtype)
                out.write(data := row.tobytes())
                found.update(data)
                total += len(row)
                starts.append(total)
                sizes.append(len(text.encode()))
            console.print(f"  Tokens: {total / 1e6:.1f} M of {len(sizes)} documents", soft_wrap=True)
    if not sizes:
        raise UserError("There is no text to learn from.")
    np.save(folder / "starts.npy", np.array(starts))
    np.save(folder / "sizes.npy", np.array(sizes))
    about = {"key": key, "dtype": dtype.name, "digest": found.hexdigest()[:16]}
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def _together(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents that have a text, as many at once as have :data:`TOGETHER` characters."""
    some, size = list[str](), 0
    for text in texts:
        if not text.strip():
            continue
        some.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield some
            some, size = [], 0
    if some:
        yield some


class Rows:
    """Documents as rows that a model is trained on: the parts of a document have at most ``context`` tokens to read, each token after a
    document's first is told once, and no row has tokens of two documents.

    Args:
        spans: (S,2) where each document, or part of one, begins and ends among ``tokens.ids``.
    """

    def __init__(self, tokens: Tokens, spans: Sequence[tuple[int, int]] | np.ndarray) -> None:
        self.tokens, self.spans = tokens, np.array(spans, dtype=np.int64).reshape(-1, 2)

    @property
    def told(self) -> int:
        """Tokens that are told, in all."""
        return int((self.spans[:, 1] - self.spans[:, 0] - 1).sum())

    @property
    def digest(self) -> str:
        """Of the texts and of which parts of them."""
        return hashlib.sha256(self.tokens.digest.encode() + self.spans.tobytes()).hexdigest()[:16]

    @cached_property
    def bytes(self) -> int:
        """Of their texts: of whole documents known, of parts by their share of the document's tokens."""
        which = np.searchsorted(self.tokens.starts, self.spans[:, 0], "right") - 1
        whole = np.diff(self.tokens.starts)[which]
        return round(float((self.tokens.sizes[which] * ((self.spans[:, 1] - self.spans[:, 0]) / whole)).sum()))

    def cut(self, context: int) -> Parts:
        """Rows of at most ``context`` tokens to read."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        counts = np.maximum(-(-(lengths - 1) // context), 0)
        owner = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = self.spans[owner, 0] + place * context
        return Parts(self.tokens.ids, begins, np.minimum(self.spans[owner, 1] - begins - 1, context))


@dataclass(frozen=True)
class Parts:
    """Rows of tokens to read and, one place on, to tell: row i reads ``ids[begins[i] : begins[i] + sizes[i]]``."""

    ids: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, numbers: Sequence[int] | np.ndarray, device: torch.device) -> Batch:
        """These rows, filled up to one of few shapes."""
        own = self.sizes[numbers]
        longest = int(own.max())
        lengths = np.concatenate((own, filling(len(own), int(own.sum()), longest)))
        pieces = [self.ids[b : b + n + 1].astype(np.int64) for b, n in zip(self.begins[numbers], own, strict=True)]
        nothing = np.zeros(int(lengths.sum() - own.sum()), dtype=np.int64)
        read, told = (
            torch.from_numpy(np.concatenate([*(piece[side] for piece in pieces), nothing])) for side in (slice(-1), slice(1, None))
        )
        layout = Layout.apart(read.to(device), torch.from_numpy(lengths).to(device), -(-longest // PLACES) * PLACES)
        return Batch(layout, told.to(device), int(own.sum()))


class Batch(NamedTuple):
    """Where tokens stand, and (N,) the tokens that follow them. The first ``own`` are of documents; what follows fills up."""

    layout: Layout
    told: Tensor
    own: int


LINES, ROWS, PLACES = 256, 8, 16
"""Batches have multiples of so many tokens, rows and places a row: of each shape its products are compiled anew, and what is kept of them
lies about in memory (bench/LOG.md)."""


def filling(rows: int, tokens: int, longest: int) -> np.ndarray:
    """Lengths of the rows that fill up a batch: a token or more each, and ``longest`` at most."""
    more, room = -rows % ROWS, -tokens % LINES
    while not more <= room <= more * longest:
        more, room = (more, room + LINES) if room < more else (more + ROWS, room)
    return np.array([room // more + (k < room % more) for k in range(more)], dtype=np.int64) if more else np.zeros(0, dtype=np.int64)
