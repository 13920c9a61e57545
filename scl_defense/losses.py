"""The contrastive losses, each with its equation. Inputs need not be normalised; log-sum-exp runs in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

# F.normalize's default 1e-12 gives a gradient of 1e12 at an all-zero vector.
NORM_FLOOR = 1e-6


def unit(embed: Tensor) -> Tensor:
    """Rows divided by their L2 length (at least 1e-6), in float32 or wider."""
    wide = embed if embed.dtype == torch.float64 else embed.float()
    return F.normalize(wide, dim=-1, eps=NORM_FLOOR)


def supcon(embed: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss, the L_out form (Khosla et al. 2020, eq. 2), without base temperature.

    For anchor i among R rows, A(i) = all rows but i, P(i) = {p in A(i): y_p = y_i}, s_ij = z_i.z_j / temperature::

        l_i = -1/|P(i)| * sum_{p in P(i)} log( exp(s_ip) / sum_{a in A(i)} exp(s_ia) )

    The mean runs over anchors with a positive; the others are left out (not counted as zero). No anchor with a
    positive: the loss is 0 (with a graph, so that backward works).

    embed: (R, D) all views stacked; labels: (R,) integers, a view's label repeated; temperature > 0. Returns a scalar.
    """
    _check_rows(embed, labels)
    z = unit(embed)
    similarity = _products(z, z) / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    # The mean over positives needs no R x R mask: it is z_i . (sum of z over the class - z_i) / (count - 1).
    _, group = labels.unique(return_inverse=True)
    member = F.one_hot(group).to(z.dtype)  # a product with it is deterministic on every device, index_add is not
    sums = _products(member.T, z.T)
    positives = member.sum(0)[group] - 1
    attraction = ((z * sums[group]).sum(1) - z.square().sum(1)) / positives.clamp(min=1) / temperature
    return _mean_of(similarity.logsumexp(1) - attraction, positives > 0)


def ntxent(views: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1): every view of the same image is a positive, all else is a negative.

    views: (V, N, D) embeddings, V >= 2. With V = 2 this is SimCLR's loss over both directions and 2N anchors; with
    more views the log-probabilities of an anchor's V - 1 positives are averaged. Returns a scalar.
    """
    if views.dim() != 3 or views.shape[0] < 2:
        raise ValueError(f"ntxent needs embeddings (V, N, D) of at least two views, not {tuple(views.shape)}")
    identity = torch.arange(views.shape[1], device=views.device).repeat(views.shape[0])
    return supcon(views.flatten(0, 1), identity, temperature)


def margin(embed: Tensor, labels: Tensor, gap: float = 1.0) -> Tensor:
    """Margin-based contrastive loss (Hadsell, Chopra & LeCun 2006, eq. 4) on unit-length embeddings.

    Over ordered pairs i != j with d = ||z_i - z_j||::

        L = mean_{i != j} [ y_i = y_j ] d^2 + [ y_i != y_j ] max(0, gap - d)^2

    (the paper's factor 1/2 is left to the loss weight). embed: (R, D); labels: (R,); gap in (0, 2]. Returns a scalar.
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


def infonce(embed: Tensor, references: Tensor, temperature: float = 0.5, *, exclude: Tensor | None = None) -> Tensor:
    """One-sided InfoNCE per row (van den Oord et al. 2018): row i must find reference i among all references::

        l_i = -z_i.r_i / temperature + log sum_k exp(z_i.r_k / temperature)

    Separable in i: no row's value depends on another row of ``embed``. embed, references: (N, D), N >= 2;
    exclude: (N, N) bool, pairs left out of the sum (false negatives), never the diagonal. Returns (N,) in float32.
    """
    if len(embed) < 2:
        raise ValueError("infonce needs at least two images: with one there is no negative and no gradient")
    scores = _products(unit(embed), unit(references)) / temperature
    own = scores.diagonal()
    if exclude is not None:
        scores = scores.masked_fill(
            exclude & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device), -torch.inf
        )
    return scores.logsumexp(1) - own


def _check_rows(embed: Tensor, labels: Tensor) -> None:
    if embed.dim() != 2 or labels.shape != embed.shape[:1]:
        raise ValueError(f"need embeddings (R, D) and labels (R,), not {tuple(embed.shape)} and {tuple(labels.shape)}")


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    # Autocast would compute the similarities in bfloat16: off by 0.02 at temperature 0.1, and so the loss.
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.T
