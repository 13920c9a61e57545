"""Sums over all pairs of embeddings without the matrix of their similarities: memory grows with the rows, not with
their square.

A block of similarities is made, summed and dropped; the backward pass makes it again. Only first derivatives.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Rows of a block: on a processor one that stays in the cache, on a card one that fills it.
ROWS, ROWS_ON_CARD = 256, 2048
#: Up to so many rows the blocks are kept for the backward pass (less than 4 MiB).
KEPT = 1024
#: Up to so many classes their sums are one product with an indicator matrix.
CLASSES = 128


def logsumexp_others(z: Tensor, temperature: float) -> Tensor:
    """log sum_{j != i} exp(z_i . z_j / temperature), (R,).

    z: (R, D) of length at most 1, float32 or float64, R >= 2. Every similarity is computed once for both of its rows.
    """
    # exp(s) itself must fit: no shift by a maximum is needed then, and exp(s_ij) serves rows i and j alike.
    if 1 / temperature + math.log(len(z)) > 0.95 * math.log(torch.finfo(z.dtype).max):
        value: Tensor = _LogSumExp.apply(z, z, temperature, True)
    else:
        value = _LogSumExpOthers.apply(z, temperature)
    return value


def logsumexp_all(z: Tensor, references: Tensor, temperature: float) -> Tensor:
    """log sum_k exp(z_i . r_k / temperature), (N,). z: (N, D); references: (M, D)."""
    value: Tensor = _LogSumExp.apply(z, references, temperature, False)
    return value


def class_sums(z: Tensor, group: Tensor, classes: int) -> Tensor:
    """Sums of the rows of each class, (K, D); the same on every device and in every run. group: (R,) in [0, K)."""
    value: Tensor = _ClassSums.apply(z, group, classes)
    return value


class _LogSumExpOthers(torch.autograd.Function):
    """With E_ij = exp(s_ij) off the diagonal, symmetric, S = its row sums and a = gradient / S::

    value = log S,    d value / d z = (E * (a_i + a_j)) z / temperature
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        keep = len(z) <= KEPT and z.requires_grad
        total, kept = z.new_zeros(len(z)), []
        with torch.autocast(z.device.type, enabled=False):
            scaled, room = z / temperature, _room(z)
            for mine, theirs in _pairs(z):
                block = _raised(scaled, z, mine, theirs, None if keep else room)
                total[mine] += block.sum(1)
                if mine != theirs:
                    total[theirs] += block.sum(0)
                if keep:
                    kept.append(block)
        ctx.save_for_backward(z, total, *kept)
        ctx.temperature = temperature
        return total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        z, total, *kept = ctx.saved_tensors
        share, result = gradient / total, torch.zeros_like(z)
        with torch.autocast(z.device.type, enabled=False):
            scaled, room = z / ctx.temperature, _room(z)
            for number, (mine, theirs) in enumerate(_pairs(z)):
                both = share[mine, None] + share[theirs]
                weight = both.mul_(kept[number] if kept else _raised(scaled, z, mine, theirs, room))
                result[mine].addmm_(weight, scaled[theirs])
                if mine != theirs:
                    result[theirs].addmm_(weight.T, scaled[mine])
        return result, None


class _LogSumExp(torch.autograd.Function):
    """For any temperature, by strips of rows; ``others``: without the diagonal."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, references: Tensor, temperature: float, others: bool) -> Tensor:
        ctx.temperature, ctx.others = temperature, others
        with torch.autocast(z.device.type, enabled=False):
            value = torch.cat([_strip(z, references, temperature, part, others).logsumexp(1) for part in _parts(z)])
        ctx.save_for_backward(z, references, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        z, references, value = ctx.saved_tensors
        by_z, by_references = torch.empty_like(z), torch.zeros_like(references)
        with torch.autocast(z.device.type, enabled=False):
            for part in _parts(z):
                weight = _strip(z, references, ctx.temperature, part, ctx.others)
                weight = weight.sub_(value[part, None]).exp_().mul_(gradient[part, None] / ctx.temperature)
                torch.mm(weight, references, out=by_z[part])
                if ctx.needs_input_grad[1]:
                    by_references.addmm_(weight.T, z[part])
        return by_z, by_references if ctx.needs_input_grad[1] else None, None, None


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Tensor, classes: int) -> Tensor:
        ctx.save_for_backward(group)
        with torch.autocast(z.device.type, enabled=False):
            if classes <= CLASSES:
                return _indicator(group, classes, z).T @ z
            # Sorted by class, a few classes at a time are a few rows: products again, and no order left to chance.
            order = group.argsort(stable=True)
            rows, group, sums = z[order], group[order], []
            edges = torch.arange(0, classes + CLASSES, CLASSES, device=group.device).clamp(max=classes)
            places = torch.searchsorted(group, edges).tolist()
            for number, (begin, end) in enumerate(pairwise(places)):
                first = number * CLASSES
                few = _indicator(group[begin:end] - first, min(CLASSES, classes - first), z)
                sums.append(few.T @ rows[begin:end])
            return torch.cat(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (group,) = ctx.saved_tensors
        return gradient[group], None, None


def _indicator(group: Tensor, classes: int, like: Tensor) -> Tensor:
    return (group[:, None] == torch.arange(classes, device=group.device)).to(like.dtype)


def _size(z: Tensor) -> int:
    return ROWS if z.device.type == "cpu" else ROWS_ON_CARD


def _parts(z: Tensor) -> list[slice]:
    return [slice(begin, min(begin + _size(z), len(z))) for begin in range(0, len(z), _size(z))]


def _pairs(z: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks on and above the diagonal."""
    parts = _parts(z)
    return ((mine, theirs) for place, mine in enumerate(parts) for theirs in parts[place:])


def _room(z: Tensor) -> Tensor:
    return z.new_empty(min(_size(z), len(z)) ** 2)


def _raised(scaled: Tensor, z: Tensor, mine: slice, theirs: slice, room: Tensor | None) -> Tensor:
    """exp(s_ij) of a block, 0 on the diagonal; in ``room`` if there is one."""
    rows, columns = scaled[mine], z[theirs]
    out = None if room is None else room[: len(rows) * len(columns)].view(len(rows), len(columns))
    block = torch.mm(rows, columns.T, out=out).exp_()
    return block.fill_diagonal_(0) if mine == theirs else block


def _strip(z: Tensor, references: Tensor, temperature: float, part: slice, others: bool) -> Tensor:
    strip = (z[part] / temperature) @ references.T
    if others:
        strip.diagonal(part.start).fill_(-torch.inf)
    return strip
