"""Auto-PGD under L1 (Croce & Hein 2021, "Mind the box"): neither library has an attack of fixed L1 radius that works.

ART's L1-PGD moves the one coordinate of the largest gradient; once that is at its wall it is chosen again and again
and nothing moves. Here a step moves many coordinates, only those that their wall still lets move, and the projection
is exact onto ball *and* box.
"""

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import Restarts, Steps
from scl_defense_benchmarks.native import LOSSES

_WIDE = ((3, 0.3), (2, 0.3), (1, 0.4))  # radius in eps and share of the steps: from outside inwards (section 4.3)
_SHARE = 0.2  # of the coordinates moved by a first step
_SHRINK = 1.5  # the step length and the sparsity are divided by it
_SHORTEST = 0.1  # step length in eps


@component
class APGDL1:
    """Auto-PGD in the L1 ball (Croce & Hein 2021, alg. 1 and section 4.3): sparse steepest steps, exact projection.

    A step moves the largest coordinates of the gradient equally; how many follows how sparse the best point is, and
    the length is cut where that no longer changes. The radius goes from three eps over two to one.
    """

    steps: Steps = 100
    restarts: Restarts = 1
    loss: Annotated[Literal["ce", "margin"], Field(description="loss to be maximised")] = "ce"

    norms: ClassVar[frozenset[str]] = frozenset({"l1"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "native"
    family: ClassVar[str] = "apgd-l1"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the L1 ball, shaped as ``images``.

        A wrong iterate, else that of the highest loss; the image itself where no gradient was ever seen.
        """
        best, labels = images.clone(), labels.long()
        if threat.radius == 0 or len(images) == 0:
            return best
        left = torch.arange(len(images), device=images.device)
        highest = torch.full((len(images),), -torch.inf, device=images.device)
        with frozen(classifier), torch.enable_grad():
            for _ in range(self.restarts):
                climb = _Climb(classifier, images[left], labels[left], self.loss)
                point, loss, wrong = climb.inwards(threat, self.steps, rng)
                better = wrong | (climb.seen & (loss > highest[left]))
                best[left] = torch.where(better.view(-1, 1, 1, 1), point, best[left])
                highest[left] = torch.where(better, loss, highest[left])
                left = left[~wrong]
                if len(left) == 0:
                    break
        return best


class _Climb:
    """The ascent of one batch; what it has seen of the network's gradients."""

    def __init__(self, classifier: nn.Module, images: Tensor, labels: Tensor, loss: str):
        self.classifier, self.images, self.labels, self.loss = classifier, images, labels, LOSSES[loss]
        self.seen = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def inwards(self, threat: ThreatModel, steps: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(point, loss, wrong) in the ball of ``threat``, by way of larger balls."""
        rounds = [(factor, max(round(share * steps), 1)) for factor, share in _WIDE] if steps >= 10 else [(1, steps)]
        point = None
        for factor, count in rounds:
            ball = ThreatModel("l1", repr(factor * threat.radius)) if factor != 1 else threat
            point = ball.random_start(self.images, rng) if point is None else ball.project(self.images, point)
            point, loss, wrong = self.climb(point, ball, count)
        return point, loss, wrong

    def measure(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (N,), whether the label is wrong (N,), and the gradient; not finite counts as zero."""
        point = point.detach().requires_grad_()
        logits = self.classifier(point)
        loss = self.loss(logits, self.labels)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        gradient = torch.where(gradient.isfinite().flatten(1).all(1).view(-1, 1, 1, 1), gradient, 0)
        self.seen |= (gradient != 0).flatten(1).any(1)
        return loss.detach().float(), (logits.argmax(1) != self.labels).detach(), gradient

    def climb(self, point: Tensor, ball: ThreatModel, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        column = (-1, 1, 1, 1)
        size = self.images[0].numel()
        loss, found, gradient = self.measure(point)
        best, highest, best_gradient, wrong = point, loss, gradient, point
        share = torch.full_like(loss, _SHARE)
        length, before = torch.full_like(loss, ball.radius), torch.full_like(loss, size)
        every = max(int(0.04 * steps), 1)
        for step in range(1, steps + 1):
            point = ball.project(self.images, point + length.view(column) * _sparse(gradient, point, share))
            loss, fooled, gradient = self.measure(point)
            wrong = torch.where(fooled.view(column), point, wrong)
            found = found | fooled
            higher = loss > highest
            best = torch.where(higher.view(column), point, best)
            best_gradient = torch.where(higher.view(column), gradient, best_gradient)
            highest = torch.where(higher, loss, highest)
            if step % every == 0:
                sparsity = (best != self.images).flatten(1).sum(1).to(loss)
                sparser = sparsity < 0.95 * before
                share, before = sparsity / size / _SHRINK, sparsity
                length = torch.where(sparser, ball.radius, length / _SHRINK).clamp(min=_SHORTEST * ball.radius)
                point = torch.where(sparser.view(column), best, point)
                gradient = torch.where(sparser.view(column), best_gradient, gradient)
        return torch.where(found.view(column), wrong, best), highest, found


def _sparse(gradient: Tensor, point: Tensor, share: Tensor) -> Tensor:
    """The direction of L1 norm 1 with the ``share`` (N,) largest movable coordinates of ``gradient``, all equal."""
    flat, at = gradient.flatten(1), point.flatten(1)
    movable = torch.where(flat > 0, at < 1, at > 0)
    size = flat.abs() * movable
    count = (share * flat.shape[1]).long().clamp(1, flat.shape[1])
    threshold = size.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    chosen = ((size >= threshold) & (size > 0)).to(flat)
    return (flat.sign() * chosen / chosen.sum(1, keepdim=True).clamp(min=1)).view_as(gradient)
