"""The page and the JSON of a look inside."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from torch import Tensor

from accord.inside.tables import following, habits, lens, nearest, plane
from accord.inside.trace import TEMPERATURES, Trace

WHOLE = 65535
"""What 1 is in a packed attention map."""


def contents(trace: Trace) -> dict[str, Any]:
    """All that is shown, in plain numbers but for the attention maps, which are tensors (H,T,T)."""
    tokenizer = trace.policy.tokenizer.inner
    decode = lambda i: str(tokenizer.decode([i]))
    near = nearest(trace)
    at = plane(trace, [i for some in near for i, _ in some[:3]])
    rows = trace.positions["rows"]
    return {
        "model": trace.model,
        "about": trace.about,
        "text": trace.text,
        "tokens": [{"id": i, "text": piece} for i, piece in zip(trace.ids, trace.pieces, strict=True)],
        "embedding": {
            "shape": list(trace.embedded.shape),
            "rows": _rounded(trace.embedded),
            "nearest": [[[i, decode(i), cosine] for i, cosine in some] for some in near],
            "plane": [[i, decode(i), x, y] for i, (x, y) in at.items()],
        },
        "positions": {**trace.positions, "rows": None if rows is None else _rounded(rows)},
        "layers": [
            {
                "shapes": layer.shapes,
                "window": layer.window,
                "habits": habits(layer.attention),
                "by_attention": None if layer.by_attention is None else layer.by_attention.tolist(),
                "by_mlp": None if layer.by_mlp is None else layer.by_mlp.tolist(),
                "residual": None if layer.after is None else layer.after.norm(dim=-1).tolist(),
                "attention": layer.attention,
            }
            for layer in trace.layers
        ],
        "lens": [[[i, decode(i), p] for i, p in some] for some in lens(trace)],
        "output": {"shape": list(trace.logits.shape), "temperatures": list(TEMPERATURES), "next": following(trace.logits, decode)},
    }


def as_json(trace: Trace) -> str:
    """Everything in numbers, attention maps included."""
    found = contents(trace)
    for layer in found["layers"]:
        layer["attention"] = layer["attention"].tolist()
    return json.dumps(found, ensure_ascii=False) + "\n"


def as_page(trace: Trace) -> str:
    """One self-contained page: no outside file, no outside request."""
    found = contents(trace)
    for layer in found["layers"]:
        layer["attention"] = packed(layer["attention"])
    page = jinja2.Environment(autoescape=True).from_string((files("accord.inside") / "page.html.j2").read_text())
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no text ends the script
    return page.render(name=trace.model, about=trace.about, data=data, script=(files("accord.inside") / "page.js").read_text())


def packed(attention: Tensor) -> str:
    """(H,T,T) below and on the diagonal, as 16-bit shares of :data:`WHOLE` in base64; each row's add up to it exactly.

    A row's shares are rounded down, and what is missing goes to those with the largest remainders.
    """
    exact = attention.double().cpu().numpy() * WHOLE
    down = np.floor(exact)
    missing = (WHOLE - down.sum(-1)).round().astype(int)
    order = np.argsort(-(exact - down), axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape).copy(), axis=-1)
    shares = (down + (rank < missing[..., None])).astype("<u2")
    below = np.tril_indices(attention.shape[-1])
    return base64.b64encode(np.ascontiguousarray(shares[:, below[0], below[1]]).tobytes()).decode()


def _rounded(rows: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows.float().tolist()]
