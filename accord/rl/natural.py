"""The natural gradient's linear algebra: products with the Fisher information matrix, and solving with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from accord.nn.fused import twice_differentiable
from accord.nn.logprobs import CHUNK, log_softmax_logits
from accord.rl.experience import Experience
from accord.rollout.policy import Policy
from accord.rollout.scoring import states_of


def conjugate_gradient(apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """x with A x = b for a symmetric positive definite A given by its products (Hestenes & Stiefel 1952)."""
    x, r = torch.zeros_like(b), b.clone()
    p, size = r.clone(), r @ r
    for _ in range(iterations):
        if float(size) <= tolerance:
            break
        Ap = apply(p)
        alpha = size / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        size, last = r @ r, size
        p = r + size / last * p
    return x


def fisher_vector_product(policy: Policy, e: Experience, v: Tensor, temperature: float, token_budget: int) -> Tensor:
    """F v, F = E_t[ J^T (diag(p) - p p^T) J ] over the response tokens, J the Jacobian of the logits / temperature.

    This is the Hessian of E_t[KL[pi_old, pi]] at pi = pi_old. J v up to the logits comes from differentiating
    J^T u by u (Pearlmutter 1994); logits exist for a few hundred positions at a time.

    Args:
        v: one number for each trainable parameter, in the order of ``policy.trainable()``.
    """
    parameters = list(policy.trainable().values())
    parts = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    out = [torch.zeros_like(p) for p in parameters]
    for index in e.rollout.micro_batches(token_budget):
        rows = e.select(index)
        with twice_differentiable():
            states = states_of(policy.model, rows.rollout, policy.split)
        matrix = policy.model.output_matrix
        ends = [states, matrix] if matrix.requires_grad else [states]
        pushes = [torch.zeros_like(end, requires_grad=True) for end in ends]
        pulled = torch.autograd.grad(ends, parameters, pushes, create_graph=True, allow_unused=True)
        linear = torch.stack([(g * part).sum() for g, part in zip(pulled, parts, strict=True) if g is not None]).sum()
        tangents = torch.autograd.grad(linear, pushes)
        kept = rows.mask[rows.rollout.response_mask]  # a skipped row is not among the tokens of the mean
        back = _through_softmax(states.detach(), matrix.detach(), list(tangents), kept, temperature)
        for total, g in zip(out, torch.autograd.grad(ends, parameters, back, allow_unused=True), strict=True):
            if g is not None:
                total += g
    return parameters_to_vector(out) / e.mask.sum()


@torch.no_grad()
def _through_softmax(states: Tensor, matrix: Tensor, tangents: list[Tensor], kept: Tensor, temperature: float) -> list[Tensor]:
    """diag(p) - p p^T on the logits' tangent, pulled back to states (N,D) and, if that trains, matrix (V,D)."""
    back = [torch.zeros_like(t) for t in tangents]
    weights = matrix.to(states.dtype)
    for start in range(0, len(states), CHUNK):
        rows = slice(start, start + CHUNK)
        logp = log_softmax_logits(states[rows], matrix, temperature)
        p, tangent = logp.exp(), tangents[0][rows] @ weights.t()
        if len(tangents) > 1:
            tangent = tangent + states[rows] @ tangents[1].to(states.dtype).t()
        t = tangent.to(p.dtype)
        s = p * (t - (p * t).sum(-1, keepdim=True)) / temperature**2 * kept[rows, None]
        back[0][rows] = s.to(states.dtype) @ weights
        if len(tangents) > 1:
            back[1] += (s.to(states.dtype).t() @ states[rows]).to(matrix.dtype)
    return back
