"""Slow twins of the fast code, written from the papers' equations with plain loops. Used by the tests alone.

The losses work on float64 tensors one number at a time, so that automatic differentiation gives the reference
gradients too. The projections work on Python floats and find the dual variable by bisection, not by sorting.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def unit_rows(embed: Tensor) -> list[Tensor]:
    """z = x / ||x||, row by row."""
    rows = []
    for row in embed:
        length = sum(value * value for value in row) ** 0.5
        rows.append(row / length)
    return rows


def dot(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=a.dtype)
    for left, right in zip(a, b, strict=True):
        total = total + left * right
    return total


def supcon(embed: Tensor, labels: Sequence[int], temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2 (L_out). Mean over the anchors that have a positive."""
    z = unit_rows(embed)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if int(labels[p]) == int(labels[i])]
        if not positives:
            continue
        denominator = sum(torch.exp(dot(z[i], z[a]) / temperature) for a in others)
        inner = [torch.log(torch.exp(dot(z[i], z[p]) / temperature) / denominator) for p in positives]
        losses.append(-sum(inner) / len(positives))
    return sum(losses) / len(losses)


def ntxent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, eq. 1 and Algorithm 1: the mean of l(2k-1, 2k) + l(2k, 2k-1) over 2N anchors."""
    z = unit_rows(torch.cat([first, second]))
    count = len(first)

    def pair(i: int, j: int) -> Tensor:
        denominator = sum(torch.exp(dot(z[i], z[k]) / temperature) for k in range(2 * count) if k != i)
        return -torch.log(torch.exp(dot(z[i], z[j]) / temperature) / denominator)

    return sum(pair(k, k + count) + pair(k + count, k) for k in range(count)) / (2 * count)


def margin(embed: Tensor, labels: Sequence[int], gap: float) -> Tensor:
    """Hadsell et al. 2006, eq. 4 without the factor 1/2, mean over ordered pairs i != j."""
    z = unit_rows(embed)
    total, pairs = torch.zeros((), dtype=embed.dtype), 0
    for i in range(len(z)):
        for j in range(len(z)):
            if i == j:
                continue
            squared = sum((left - right) ** 2 for left, right in zip(z[i], z[j], strict=True))
            if int(labels[i]) == int(labels[j]):
                total = total + squared
            elif squared < gap**2:
                total = total + (gap - squared**0.5) ** 2
            pairs += 1
    return total / pairs


def infonce(embed: Tensor, references: Tensor, temperature: float, exclude: Tensor | None = None) -> Tensor:
    """van den Oord et al. 2018, eq. 4 with the score exp(z.r / temperature); one value a row."""
    z, r = unit_rows(embed), unit_rows(references)
    rows = []
    for i in range(len(z)):
        kept = [k for k in range(len(r)) if k == i or exclude is None or not bool(exclude[i, k])]
        denominator = sum(torch.exp(dot(z[i], r[k]) / temperature) for k in kept)
        rows.append(-torch.log(torch.exp(dot(z[i], r[i]) / temperature) / denominator))
    return torch.stack(rows)


def _bisect(norm_of, low: float, high: float, radius: float) -> float:
    """The point where a falling function meets the radius."""
    for _ in range(200):
        middle = (low + high) / 2
        if norm_of(middle) > radius:
            low = middle
        else:
            high = middle
    return high


def project(norm: str, image: Sequence[float], target: Sequence[float], radius: float) -> list[float]:
    """The point of {z: ||z - image|| <= radius, 0 <= z <= 1} nearest to ``target`` (Euclidean).

    Stationarity of ||z - target||^2 / 2 + lam * N(z - image) with the box kept as a constraint: each coordinate
    solves its own one-dimensional problem, and lam >= 0 is where the norm meets the radius.
    """
    moves = [t - x for x, t in zip(image, target, strict=True)]

    def point(lam: float) -> list[float]:
        result = []
        for x, move in zip(image, moves, strict=True):
            if norm == "linf":
                free = math.copysign(min(abs(move), lam), move)
            elif norm == "l2":
                free = move / (1 + lam)
            else:
                free = math.copysign(max(abs(move) - lam, 0.0), move)
            result.append(min(max(x + free, 0.0), 1.0))
        return result

    def size(lam: float) -> float:
        delta = [abs(z - x) for x, z in zip(image, point(lam), strict=True)]
        return math.sqrt(sum(d * d for d in delta)) if norm == "l2" else sum(delta)

    if norm == "linf":
        return point(radius)
    if size(0.0) <= radius:
        return point(0.0)
    if radius == 0:
        return list(image)
    widest = max(abs(move) for move in moves)
    high = widest if norm == "l1" else math.sqrt(sum(move * move for move in moves)) / radius
    return point(_bisect(size, 0.0, high, radius))


def dykstra(norm: str, image: np.ndarray, target: np.ndarray, radius: float, rounds: int = 20000) -> np.ndarray:
    """The same projection by Dykstra's alternating projections: knows the ball alone and the box alone, no more."""

    def ball(point: np.ndarray) -> np.ndarray:
        move = point - image
        if norm == "l2":
            length = np.linalg.norm(move)
            return image + move * min(1.0, radius / length) if length > 0 else point
        if np.abs(move).sum() <= radius:
            return point
        lam = _bisect(lambda value: np.maximum(np.abs(move) - value, 0).sum(), 0.0, float(np.abs(move).max()), radius)
        return image + np.sign(move) * np.maximum(np.abs(move) - lam, 0)

    point, in_ball, in_box = target.astype(float), np.zeros_like(target), np.zeros_like(target)
    for _ in range(rounds):
        moved = ball(point + in_ball)
        in_ball = point + in_ball - moved
        following = np.clip(moved + in_box, 0, 1)
        in_box = moved + in_box - following
        if np.abs(following - point).max() < 1e-14 and np.abs(following - moved).max() < 1e-14:
            return following
        point = following
    return point


def linear_optimum(norm: str, weights: np.ndarray, image: np.ndarray, radius: float) -> float:
    """The largest increase of w.z over ball and box, for ``linf`` and ``l1`` (a fractional knapsack, so greedy)."""
    room = np.where(weights > 0, 1 - image, image)
    if norm == "linf":
        return float((np.abs(weights) * np.minimum(room, radius)).sum())
    gained, left = 0.0, radius
    for index in np.argsort(-np.abs(weights)):
        step = min(left, room[index])
        gained += step * abs(weights[index])
        left -= step
    return float(gained)


def alignment(embed: Tensor, references: Tensor, temperature: float) -> Tensor:
    """Minus the cosine between row i and reference i, over the temperature; one value a row."""
    z, r = unit_rows(embed), unit_rows(references)
    return torch.stack([-dot(z[i], r[i]) / temperature for i in range(len(z))])


def one_sided_supcon(embed: Tensor, references: Tensor, labels: Sequence[int], temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2 with row i as anchor and all references as the other side; one value a row."""
    z, r = unit_rows(embed), unit_rows(references)
    rows = []
    for i in range(len(z)):
        denominator = sum(torch.exp(dot(z[i], r[k]) / temperature) for k in range(len(r)))
        positives = [p for p in range(len(r)) if int(labels[p]) == int(labels[i])]
        inner = [torch.log(torch.exp(dot(z[i], r[p]) / temperature) / denominator) for p in positives]
        rows.append(-sum(inner) / len(positives))
    return torch.stack(rows)
