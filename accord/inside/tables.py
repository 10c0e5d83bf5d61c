"""What is read off a trace: nearest tokens, a map, what heads look at, what would follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accord.inside.trace import NEAREST, SHOWN, TEMPERATURES, Trace
from accord.nn.foreign import ForeignModel

PORTION = 8192  # vocabulary rows compared at once


def embeddings_of(trace: Trace) -> Tensor:
    """(V,D) the whole table."""
    model = trace.policy.model
    table = model.inner.get_input_embeddings().weight if isinstance(model, ForeignModel) else model.model.embed_tokens.weight
    return table.detach()


@torch.no_grad()
def nearest(trace: Trace) -> list[list[tuple[int, float]]]:
    """Of each token the tokens whose embeddings have the largest cosine with its own, itself left out: (id, cosine)."""
    table, own = embeddings_of(trace), torch.nn.functional.normalize(trace.embedded, dim=-1)
    parts = [own @ torch.nn.functional.normalize(part.float(), dim=-1).t() for part in table.split(PORTION)]
    cosines = torch.cat(parts, dim=1)
    cosines[torch.arange(len(own)), trace.ids] = -2.0
    best = cosines.topk(min(NEAREST, cosines.shape[1] - 1), dim=1)
    return [list(zip(ids, values, strict=True)) for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@torch.no_grad()
def plane(trace: Trace, others: list[int]) -> dict[int, tuple[float, float]]:
    """Where tokens lie in the plane of the two directions in which their embeddings, the text's and the others', differ most
    (principal components; Pearson 1901)."""
    ids = sorted({*trace.ids, *others})
    rows = embeddings_of(trace)[torch.tensor(ids, device=trace.embedded.device)].float()
    centred = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    flat = torch.zeros(len(ids), 2)
    found = centred @ directions[:2].t()
    flat[:, : found.shape[1]] = found.cpu()
    return {i: (x, y) for i, (x, y) in zip(ids, flat.tolist(), strict=True)}


def habits(attention: Tensor) -> list[dict[str, Any]]:
    """What each head looks at, over the tokens that have a choice (all but the first). attention (H,T,T).

    ``on_first``, ``on_itself``, ``on_previous``: mean attention to those; ``distance``: mean distance, tokens; ``entropy``: nats;
    ``words``: the largest of it in words.
    """
    H, T, _ = attention.shape
    places = torch.arange(T, device=attention.device)
    distance = (places[:, None] - places).clamp(min=0).float()
    rows = attention[:, 1:] if T > 1 else attention
    far = distance[1:] if T > 1 else distance
    at = places[1:] if T > 1 else places
    logs = torch.where(rows > 0, rows, torch.ones_like(rows)).log()
    out = []
    for head in range(H):
        own = rows[head]
        means = {
            "on_first": float(own[:, 0].mean()),
            "on_itself": float(own[torch.arange(len(own)), at].mean()),
            "on_previous": float(own[torch.arange(len(own)), (at - 1).clamp(min=0)].mean()),
        }
        name, share = max(means.items(), key=lambda pair: pair[1])
        words = {"on_first": "the first token", "on_itself": "the token itself", "on_previous": "the token before"}[name]
        out.append({
            **means, "distance": float((own * far).sum(-1).mean()), "entropy": float(-(own * logs[head]).sum(-1).mean()),
            "words": f"{words} ({share:.0%})" if share >= 0.3 else "many tokens",
        })  # fmt: skip
    return out


def following(logits: Tensor, decode: Any) -> list[dict[str, Any]]:
    """Of each place: the likeliest next tokens with their logits, and for each of :data:`TEMPERATURES` what makes them probabilities:
    ``normaliser`` log sum exp(z / T), and the ``entropy`` in nats. logits (T,V)."""
    best = logits.topk(min(SHOWN, logits.shape[1]), dim=-1)
    columns = []
    for temperature in TEMPERATURES:
        tempered = logits / temperature
        normaliser = tempered.logsumexp(-1)
        entropy = normaliser - (tempered.softmax(-1) * tempered).sum(-1)
        columns.append((normaliser.tolist(), entropy.tolist()))
    return [
        {
            "top": [[i, decode(i), z] for i, z in zip(best.indices[t].tolist(), best.values[t].tolist(), strict=True)],
            "normaliser": [normaliser[t] for normaliser, _ in columns],
            "entropy": [entropy[t] for _, entropy in columns],
        }
        for t in range(len(logits))
    ]


@torch.no_grad()
def lens(trace: Trace) -> list[list[tuple[int, float]]]:
    """What would follow if the model ended after each layer: (L,T) of the likeliest token and its probability (the logit lens,
    nostalgebraist 2020): the final norm and the output matrix read the residual stream there."""
    model = trace.policy.model
    out = []
    for layer in trace.layers:
        if isinstance(model, ForeignModel) or layer.after is None:
            break
        states = model.model.norm(layer.after)
        logits = states @ model.output_matrix.float().t()
        best = logits.log_softmax(-1).max(-1)
        out.append(list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)))
    return out
