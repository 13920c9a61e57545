"""Slow transcriptions of the published methods' equations, one pair of images at a time. Used by the tests alone.

Embeddings are lists of float64 vectors; ``views`` maps a role (``clean:0``, ``adv:0``, ...) to one vector an image.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Views = Mapping[str, Tensor]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def rows_of(views: Views, roles: Sequence[str]) -> list[tuple[str, int, Tensor]]:
    return [(role, n, vector) for role in roles for n, vector in enumerate(views[role])]


def general(
    views: Views,
    labels: Sequence[int],
    temperature: float,
    *,
    same: Callable[[int, int], bool],
    roles: Sequence[str] | None = None,
    anchors: Callable[[str], bool] = lambda role: True,
    weight: Callable[[str, str], float] = lambda mine, other: 1.0,
    constant: Callable[[str, str], bool] = lambda mine, other: False,
    keep_negative: Callable[[int, int], bool] = lambda i, k: True,
    keep_positive: Callable[[int, int], bool] = lambda i, k: True,
) -> Tensor:
    """l_i = -1/W sum_p w log(e^s_ip / sum_{k in C(i)} e^s_ik), mean over anchors that have a positive.

    ``keep_*`` get places in the list of rows.
    """
    rows = rows_of(views, roles or list(views))
    losses = []
    for i, (mine, n, z) in enumerate(rows):
        if not anchors(mine):
            continue
        scores, pulls = {}, {}
        for k, (other, m, other_z) in enumerate(rows):
            if k == i:
                continue
            positive = same(n, m)
            if not (keep_positive(i, k) if positive else keep_negative(i, k)):
                continue
            scores[k] = cosine(z, other_z.detach() if constant(mine, other) else other_z) / temperature
            if positive and weight(mine, other) > 0:
                pulls[k] = weight(mine, other)
        if not pulls:
            continue
        denominator = sum(torch.exp(score) for score in scores.values())
        losses.append(
            -sum(w * torch.log(torch.exp(scores[k]) / denominator) for k, w in pulls.items()) / sum(pulls.values())
        )
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR, eq. 1 and Algorithm 1."""
    z, count = [*first, *second], len(first)
    total = 0.0
    for i in range(2 * count):
        partner = i + count if i < count else i - count
        denominator = sum(torch.exp(cosine(z[i], z[k]) / temperature) for k in range(2 * count) if k != i)
        total = total - torch.log(torch.exp(cosine(z[i], z[partner]) / temperature) / denominator)
    return total / (2 * count)


def rocl(t1: Tensor, t2: Tensor, adv: Tensor, temperature: float, regularizer: float) -> Tensor:
    """RoCL's released loss: six (two) blocks of -log softmax, one side of every similarity detached.

    NTXent of c chunks of N rows: 1/(c N) times the sum over all pairs of different chunks of the diagonal entries.
    """

    def chunks(parts: Sequence[Tensor]) -> Tensor:
        z = [row for part in parts for row in part]
        count, total = len(parts[0]), 0.0
        for i in range(len(z)):
            weights = [
                torch.exp(cosine(z[i], z[k].detach()) / temperature) if k != i else torch.zeros((), dtype=z[i].dtype)
                for k in range(len(z))
            ]
            for k in range(len(z)):
                if k != i and k % count == i % count:
                    total = total - torch.log(weights[k] / sum(weights))
        return total / len(z)

    return chunks([t1, t2, adv]) + chunks([adv, t2]) / regularizer


def cross_entropy(logits: Tensor, labels: Sequence[int]) -> Tensor:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total = total - torch.log(torch.exp(row[label]) / sum(torch.exp(value) for value in row))
    return total / len(logits)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """mean_i sum_k p_k log(p_k / q_k)."""
    total = 0.0
    for p_row, q_row in zip(first, second, strict=True):
        p = [torch.exp(v) / sum(torch.exp(u) for u in p_row) for v in p_row]
        q = [torch.exp(v) / sum(torch.exp(u) for u in q_row) for v in q_row]
        total = total + sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(first)


def mart(clean: Tensor, attacked: Tensor, labels: Sequence[int], beta: float) -> Tensor:
    """MART, eq. 11."""
    total = 0.0
    for row, adversarial, label in zip(clean, attacked, labels, strict=True):
        p = [torch.exp(v) / sum(torch.exp(u) for u in adversarial) for v in adversarial]
        own = torch.exp(row[label]) / sum(torch.exp(u) for u in row)
        runner_up = max(float(v.detach()) for k, v in enumerate(p) if k != label)
        rival = next(v for k, v in enumerate(p) if k != label and float(v.detach()) == runner_up)
        boosted = -torch.log(p[label]) - torch.log(1 - rival)
        total = total + boosted + beta * kl(row[None], adversarial[None]) * (1 - own)
    return total / len(labels)


def a_infonce(
    anchor: Tensor, positive: Tensor, negatives: Sequence[Tensor], temperature: float, beta: float, tau_plus: float
) -> Tensor:
    """One anchor of Robinson et al. 2021, eq. 4, as A-InfoNCE uses it (HN)."""
    pull = torch.exp(cosine(anchor, positive) / temperature)
    push = [torch.exp(cosine(anchor, k) / temperature) for k in negatives]
    importance = [float(cosine(anchor, k)) / temperature for k in negatives]
    raised = [math.exp(beta * s) for s in importance]
    count = len(negatives)
    hard = sum(count * r / sum(raised) * s for r, s in zip(raised, push, strict=True))
    spread = (hard - tau_plus * count * pull) / (1 - tau_plus)
    floor = count * math.exp(-1 / temperature)
    spread = spread if float(spread) > floor else torch.full_like(spread, floor)
    return -torch.log(pull / (pull + spread))
