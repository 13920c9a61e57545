"""The contrastive losses, each with its equation. Inputs need not be normalised; log-sum-exp runs in float32.

:func:`supcon`, :func:`ntxent` and a large :func:`infonce` run in blocks (:mod:`scl_defense.blocks`): their memory is
linear in the rows, and they have first derivatives only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.blocks import class_sums, logsumexp_all, logsumexp_others

# F.normalize's default 1e-12 gives a gradient of 1e12 at an all-zero vector.
NORM_FLOOR = 1e-6
# Up to so many rows one-sided InfoNCE is faster with all its scores in one matrix.
FEW = 256


def unit(embed: Tensor) -> Tensor:
    """Rows divided by their L2 length (at least 1e-6), in float32 or wider.

    >>> unit(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    wide = embed if embed.dtype == torch.float64 else embed.float()
    return F.normalize(wide, dim=-1, eps=NORM_FLOOR)


def supcon(embed: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss, the L_out form (Khosla et al. 2020, eq. 2), without base temperature.

    For anchor i among R rows, A(i) = all rows but i, P(i) = {p in A(i): y_p = y_i}, s_ij = z_i.z_j / temperature::

        l_i = -1/|P(i)| * sum_{p in P(i)} log( exp(s_ip) / sum_{a in A(i)} exp(s_ia) )

    The mean runs over anchors with a positive; the others are left out (not counted as zero). No anchor with a
    positive: the loss is 0 (with a graph, so that backward works).

    embed: (R, D) all views stacked; labels: (R,) integers, a view's label repeated; temperature > 0. Returns a scalar.

    >>> rows = torch.eye(2).repeat(2, 1)  # two views of two classes: log(e + 2) - 1
    >>> supcon(rows, torch.tensor([0, 1, 0, 1]), temperature=1)
    tensor(0.5514)
    """
    _check_rows(embed, labels)
    if len(embed) < 2:
        return embed.sum() * 0
    z = unit(embed)
    _, group, size = labels.unique(return_inverse=True, return_counts=True)
    # The sum over positives needs no pairs: over the anchors of a class it is |sum of z|^2 - sum of |z|^2.
    pull = torch.where(size > 1, 1 / (size - 1).to(z.dtype), 0)
    sums = class_sums(z, group, len(size))
    attraction = (sums.square().sum(1) * pull).sum() - (z.square().sum(1) * pull[group]).sum()
    anchors = size[group] > 1
    total = torch.where(anchors, logsumexp_others(z, temperature), 0).sum() - attraction / temperature
    mean: Tensor = total / anchors.sum().clamp(min=1)
    return mean


def ntxent(views: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1): every view of the same image is a positive, all else is a negative.

    views: (V, N, D) embeddings, V >= 2. With V = 2 this is SimCLR's loss over both directions and 2N anchors; with
    more views the log-probabilities of an anchor's V - 1 positives are averaged. Returns a scalar.

    >>> ntxent(torch.eye(2).repeat(2, 1, 1), temperature=1)  # log(e + 2) - 1
    tensor(0.5514)
    """
    if views.dim() != 3 or views.shape[0] < 2:
        raise ValueError(f"ntxent needs embeddings (V, N, D) of at least two views, not {tuple(views.shape)}")
    count, z = len(views), unit(views)
    attraction = (z.sum(0).square().sum() - z.square().sum()) / (count - 1)
    rows = z.flatten(0, 1)
    return (logsumexp_others(rows, temperature).sum() - attraction / temperature) / len(rows)


def margin(embed: Tensor, labels: Tensor, gap: float = 1.0) -> Tensor:
    """Margin-based contrastive loss (Hadsell, Chopra & LeCun 2006, eq. 4) on unit-length embeddings.

    Over ordered pairs i != j with d = ||z_i - z_j||::

        L = mean_{i != j} [ y_i = y_j ] d^2 + [ y_i != y_j ] max(0, gap - d)^2

    (the paper's factor 1/2 is left to the loss weight). embed: (R, D); labels: (R,); gap in (0, 2]. Returns a scalar.

    >>> margin(torch.eye(2), torch.tensor([0, 0])), margin(torch.eye(2), torch.tensor([0, 1]))
    (tensor(2.), tensor(0.))
    """
    _check_rows(embed, labels)
    z = unit(embed)
    squared = (2 - 2 * _products(z, z)).clamp(min=0)
    # sqrt has an infinite slope at 0; the floor keeps identical embeddings of two classes finite.
    distance = (squared + 1e-12).sqrt()
    same = labels[:, None] == labels[None, :]
    pairs = torch.where(same, squared, (gap - distance).clamp(min=0).square())
    off_diagonal = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return _mean_of(pairs.flatten(), off_diagonal.flatten())


def infonce(
    embed: Tensor, references: Tensor, temperature: float = 0.5, *, exclude: Tensor | None = None, first: int = 0
) -> Tensor:
    """One-sided InfoNCE per row (van den Oord et al. 2018): row i must find reference i among all references::

        l_i = -z_i.r_i / temperature + log sum_k exp(z_i.r_k / temperature)

    Separable in i: no row's value depends on another row of ``embed``. embed, references: (N, D), N >= 2;
    exclude: (N, N) bool, pairs left out of the sum (false negatives), never the diagonal. Returns (N,) in float32.
    ``embed`` may be some of the rows, (n, D), those whose references begin at ``first``; exclude is then (n, N).

    >>> infonce(torch.eye(2), torch.eye(2), temperature=1)  # log(e + 1) - 1
    tensor([0.3133, 0.3133])
    """
    if len(references) < 2:
        raise ValueError("infonce needs at least two images: with one there is no negative and no gradient")
    z, r = unit(embed), unit(references)
    if exclude is None and len(z) > FEW:
        return logsumexp_all(z, r, temperature) - (z * r[first : first + len(z)]).sum(1) / temperature
    scores = _products(z, r) / temperature
    own = scores.diagonal(first)
    if exclude is not None:
        pairs = torch.ones_like(scores, dtype=torch.bool)
        pairs.diagonal(first).fill_(False)
        scores = scores.masked_fill(exclude & pairs, -torch.inf)
    return scores.logsumexp(1) - own


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One term of the weighted multi-view contrastive loss, see :func:`multiview`.

    A view has a role, such as ``clean:0``, ``clean:1`` or ``adv:0``; the name ``adv`` means every role ``adv:*``.

    positives: views of the same image (``instance``) or of the same class (``class``). temperature > 0.
    views: roles that take part (empty: all). anchors: those of them that are anchors (empty: all that take part).
    weights: (anchor's role, positive's role) -> w >= 0, 1 where nothing is said. A weight of 0 takes the pair from the
    positives; it stays in the denominator.
    stop: pairs (anchor's role, other's role) in which the other embedding is a constant (a stop-gradient).
    select: which other-class rows are negatives, by the classifier's predictions (Bui et al. 2021, ASCL): ``all``;
    ``hard``: predicted as the anchor's class; ``soft``: predicted as the anchor is; ``leaked``: as soft, and positives
    must be predicted as the anchor is, too.
    beta >= 0: negatives are weighted by exp(beta * s_ik), normalised to a mean of 1 (Robinson et al. 2021; 0: alike).
    tau_plus in [0, 1): the assumed share of false negatives, taken out of the denominator (Chuang et al. 2020).
    """

    positives: Literal["instance", "class"] = "class"
    temperature: float = 0.1
    views: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    weights: Mapping[tuple[str, str], float] = field(default_factory=dict)
    stop: frozenset[tuple[str, str]] = frozenset()
    select: Literal["all", "hard", "soft", "leaked"] = "all"
    beta: float = 0.0
    tau_plus: float = 0.0


def multiview(
    views: Tensor,
    roles: Sequence[str],
    labels: Tensor,
    contrast: Contrast,
    *,
    predictions: Tensor | None = None,
) -> Tensor:
    """The weighted multi-view contrastive loss, of which SimCLR, SupCon, RoCL, ACL and ASCL are special cases.

    For anchor i, candidates C(i) (all rows that take part but i, less the negatives that ``select`` drops), positives
    P(i) in C(i), s_ij = z_i . sg_ij(z_j) / temperature, with sg_ij the stop-gradient where ``stop`` asks for it::

        l_i = -1/W_i * sum_{p in P(i)} w_ip * log( exp(s_ip) / D_i ),     W_i = sum_{p in P(i)} w_ip
        D_i = sum_{p in C(i), positive} exp(s_ip) + G_i

    with G_i the sum of exp(s_ik) over the negatives k or, with ``beta`` or ``tau_plus`` (A-InfoNCE, Yu et al. 2022,
    after Robinson et al. 2021, eq. 4), with M negatives::

        G_i = max( (sum_k n_ik exp(s_ik) - tau_plus * M * mean_p exp(s_ip)) / (1 - tau_plus),  M * exp(-1/temperature) )
        n_ik = M * exp(beta * s_ik) / sum_k exp(beta * s_ik),   not differentiated

    The mean runs over anchors with W_i > 0; there is none: 0, with a graph.

    views: (V, N, D) embeddings, not normalised; roles: V names; labels: (N,) integers; predictions: (V, N) classes,
    needed when ``select`` is not ``all``. Returns a scalar. Raises ``ValueError`` for shapes that do not fit.
    """
    if views.dim() != 3 or len(roles) != len(views) or labels.shape != views.shape[1:2]:
        raise ValueError(
            f"multiview needs embeddings (V, N, D), V roles and labels (N,), not {tuple(views.shape)}, "
            f"{len(roles)} and {tuple(labels.shape)}"
        )
    taking_part = [place for place, role in enumerate(roles) if not contrast.views or _named(role, contrast.views)]
    count, rows = views.shape[1], [roles[place] for place in taking_part]
    embed = views[taking_part].flatten(0, 1)
    identity = torch.arange(count, device=views.device) if contrast.positives == "instance" else labels
    identity = identity.repeat(len(rows))
    if len(rows) * count < 2:
        return views.sum() * 0
    plain = not (contrast.anchors or contrast.weights or contrast.stop or contrast.beta or contrast.tau_plus)
    if plain and contrast.select == "all":  # the same without R x R masks
        if contrast.positives == "instance" and len(rows) > 1:
            return ntxent(views[taking_part], contrast.temperature)
        return supcon(embed, identity, contrast.temperature)
    z = unit(embed)
    similarity = _products(z, z)
    if contrast.stop:
        # Role pairs as a (V', V') table, spread over the rows: which entries see the other row as a constant.
        stop = _table(rows, lambda mine, other: float(_pair(contrast.stop, mine, other)), z)
        similarity = torch.where(_spread(stop, count) > 0, _products(z, z.detach()), similarity)
    similarity = similarity / contrast.temperature
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (identity[:, None] == identity[None, :]) & others
    negative = (identity[:, None] != identity[None, :]) & others
    if contrast.select != "all":
        if predictions is None:
            raise ValueError(f"select={contrast.select} needs the classifier's predictions (V, N)")
        predicted = predictions[taking_part].flatten()
        # An instance's class-mates are no negatives of ASCL: it selects by class.
        negative = negative & (labels.repeat(len(rows))[:, None] != labels.repeat(len(rows))[None, :])
        anchor_is = labels.repeat(len(rows)) if contrast.select == "hard" else predicted
        negative = negative & (anchor_is[:, None] == predicted[None, :])
        if contrast.select == "leaked":
            positive = positive & (predicted[:, None] == predicted[None, :])
    weight = positive.to(z.dtype)
    if contrast.weights:
        weight = weight * _spread(_table(rows, lambda mine, other: _weight(contrast.weights, mine, other), z), count)
    total = weight.sum(1)
    anchors = torch.tensor([not contrast.anchors or _named(role, contrast.anchors) for role in rows], device=z.device)
    chosen = (total > 0) & anchors.repeat_interleave(count)
    if contrast.beta or contrast.tau_plus:
        denominator = _hard_denominator(similarity, positive, negative, contrast)
    else:
        # Rows that are no anchor stay unmasked: a row of -inf alone is a corner of logsumexp to keep out of.
        dropped = ~(positive | negative) & chosen[:, None]
        denominator = similarity.masked_fill(dropped, -torch.inf).logsumexp(1)
    attraction = (weight * similarity).sum(1) / total.clamp(min=torch.finfo(z.dtype).tiny)
    return _mean_of(denominator - attraction, chosen)


def kl(logits: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two classifiers' outputs, KL(p || q) = sum_k p_k log(p_k / q_k), one value a row.

    logits: (N, K) of p; other: (N, K) of q. Returns (N,) in float32 or wider.

    >>> kl(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log())  # p = (1/2, 1/2), q = (1/4, 3/4)
    tensor([0.1438])
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p, q = F.log_softmax(logits.to(wide), dim=1), F.log_softmax(other.to(wide), dim=1)
    return (p.exp() * (p - q)).sum(1)


def _hard_denominator(similarity: Tensor, positive: Tensor, negative: Tensor, contrast: Contrast) -> Tensor:
    """log D_i with weighted, debiased negatives; |s| <= 1/temperature, so the exponentials are taken relative to it."""
    top = 1 / contrast.temperature
    raised = (similarity - top).exp()
    count = negative.sum(1).to(similarity.dtype)
    exponent = (contrast.beta * similarity.detach()).masked_fill(~negative, -torch.inf)
    weight = torch.where(negative, count[:, None] * torch.nan_to_num(exponent.softmax(1)), 0)
    mean_positive = (positive * raised).sum(1) / positive.sum(1).clamp(min=1)
    spread = ((weight * raised).sum(1) - contrast.tau_plus * count * mean_positive) / (1 - contrast.tau_plus)
    floor = count * torch.exp(torch.tensor(-2 * top, dtype=similarity.dtype, device=similarity.device))
    total = (positive * raised).sum(1) + torch.maximum(spread, floor)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log() + top


def _named(role: str, names: Sequence[str]) -> bool:
    return any(role == name or role.startswith(name + ":") for name in names)


def _pair(pairs: frozenset[tuple[str, str]], mine: str, other: str) -> bool:
    return any(_named(mine, [first]) and _named(other, [second]) for first, second in pairs)


def _weight(weights: Mapping[tuple[str, str], float], mine: str, other: str) -> float:
    return next((w for (first, second), w in weights.items() if _named(mine, [first]) and _named(other, [second])), 1.0)


def _table(rows: Sequence[str], value: Callable[[str, str], float], like: Tensor) -> Tensor:
    return torch.tensor([[value(mine, other) for other in rows] for mine in rows], dtype=like.dtype, device=like.device)


def _spread(table: Tensor, count: int) -> Tensor:
    return table.repeat_interleave(count, 0).repeat_interleave(count, 1)


def _check_rows(embed: Tensor, labels: Tensor) -> None:
    if embed.dim() != 2 or labels.shape != embed.shape[:1]:
        raise ValueError(f"need embeddings (R, D) and labels (R,), not {tuple(embed.shape)} and {tuple(labels.shape)}")


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    # Autocast would compute the similarities in bfloat16: off by 0.02 at temperature 0.1, and so the loss.
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.T
