"""FAB's search for the nearest example of a class: torchattacks' own steps, with every number computed once.

The library goes over whole batches dozens of times a step, a fifth of a narrow ResNet's time. Here a few images at a
time stay in a core's cache, and what two of its formulas share is shared. The steps are the library's to rounding, but
for an image without a finite slope: the library loses it, here it stays where it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scl_defense_benchmarks.projections import SPARE, Planes

#: So many numbers of each tensor at a time on a CPU; some ten of them are used together, and a core keeps 2 MiB.
NUMBERS = 1 << 15


@dataclass
class Found:
    """What a search has found, an image. nearest: the nearest wrong iterate, the image itself where there was none;
    distance: (N,) how far, infinite there; last: the last iterate; seen: (N,) whether there ever was a usable slope.
    """

    nearest: Tensor
    distance: Tensor
    last: Tensor
    seen: Tensor


@torch.no_grad()
def nearest_found(attack: Any, images: Tensor, labels: Tensor, targets: Tensor) -> Found:
    """Step onto the linearised boundary between each image's label and its target, pulled back towards the image, and
    back where that is wrong (Croce & Hein 2020b, alg. 1).

    attack: a ``torchattacks.FAB``, whose settings (``norm`` Linf or L2, ``steps alpha_max eta beta``) and logits are
    used. images: (N, C, H, W) in [0, 1], rightly classified; labels, targets: (N,).
    """
    images, count = images.contiguous(), len(images)
    search, far = _Search(attack, images), images.new_full((count,), torch.inf)
    found = Found(images.clone(), far, images, torch.zeros(count, dtype=torch.bool, device=images.device))
    rows, nearest = torch.arange(count, device=images.device), found.nearest.view(count, -1)
    for step in range(attack.steps):
        points = search.points.view_as(images).detach().requires_grad_()
        with torch.enable_grad():
            logits = attack.get_logits(points)
            gaps = logits[rows, targets] - logits[rows, labels]
            gaps.sum().backward()  # not autograd.grad, which some networks (reentrant checkpoints) refuse
        slopes = torch.zeros_like(points) if points.grad is None else points.grad
        found.seen |= search.step(gaps.detach().to(images), slopes.reshape(count, -1).to(images))
        if step == attack.steps - 1:
            found.last = search.points.view_as(images).clone()
        wrong = attack.get_logits(search.points.view_as(images)).argmax(1) != labels
        distance = search.measured()
        nearer = (wrong & (distance < found.distance)).nonzero().squeeze(1)
        found.distance[nearer], nearest[nearer] = distance[nearer], search.points[nearer]
        search.pull(wrong)
    return found


class _Search:
    """Where the images of a search are. points: (N, D)."""

    def __init__(self, attack: Any, images: Tensor):
        self.attack, self.norm = attack, {"Linf": "linf", "L2": "l2"}[attack.norm]
        self.images = images.reshape(len(images), -1).contiguous()
        self.points, self.away = self.images.clone(), torch.zeros_like(self.images)
        self._low, self._high = -self.images, 1 - self.images
        count, numbers = self.images.shape
        self.size = min(count, max(1, NUMBERS // numbers)) if images.device.type == "cpu" else count
        self._spare = [self.images.new_empty(self.size, numbers) for _ in range(SPARE + 4)]

    def _blocks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """A few images at a time, and room for as many."""
        for start in range(0, len(self.images), self.size):
            block = slice(start, min(start + self.size, len(self.images)))
            yield block, [spare[: block.stop - start] for spare in self._spare]

    def step(self, gaps: Tensor, slopes: Tensor) -> Tensor:
        """Move every point; ``gaps`` (N,) and ``slopes`` (N, D) are the boundary's there. Returns (N,) where the slope
        was usable: finite and not zero.
        """
        usable = torch.zeros(len(gaps), dtype=torch.bool, device=gaps.device)
        for block, spare in self._blocks():
            gap, slope = gaps[block], slopes[block]
            largest = torch.abs(slope, out=spare[0]).amax(1)
            finite = largest.isfinite() & gap.isfinite()
            usable[block] = finite & (largest > 0)
            scale = largest.clamp(min=torch.finfo(largest.dtype).tiny)  # the plane is the same, its squares are numbers
            gap, slope = gap / scale, torch.div(slope, scale.unsqueeze(1), out=spare[-1])
            if bool(finite.all()):
                self._step(block, gap, slope, spare)
            else:  # rows that stay where they are, among others that move
                kept = self.points[block].clone()
                self._step(block, gap.where(finite, 0), slope.where(finite.unsqueeze(1), 0), spare)
                self.points[block] = self.points[block].where(finite.unsqueeze(1), kept)
        return usable

    def _step(self, block: slice, gap: Tensor, slope: Tensor, spare: list[Tensor]) -> None:
        points, images = self.points[block], self.images[block]
        gap_there = gap - torch.mul(slope, self.away[block], out=spare[0]).sum(1)  # of the image, by the same plane
        planes, (near, low, high) = Planes(slope, self.norm, spare[:SPARE]), spare[SPARE:-1]
        torch.add(torch.neg(points, out=low), 1, out=high)
        near.copy_(planes.moves(gap, low, high))
        far = planes.moves(gap_there, self._low[block], self._high[block])
        short, long = (self._length(moves, low).clamp(min=1e-8) for moves in (near, far))
        back = (short / (short + long)).clamp(max=self.attack.alpha_max).unsqueeze(1)
        torch.add(points, near, alpha=self.attack.eta, out=near)
        torch.add(images, far, alpha=self.attack.eta, out=far)
        torch.lerp(near, far, back, out=points).clamp_(0.0, 1.0)

    def _length(self, moves: Tensor, spare: Tensor) -> Tensor:
        return torch.abs(moves, out=spare).amax(1) if self.norm == "linf" else moves.norm(dim=1)

    def measured(self) -> Tensor:
        """(N,): how far the points are from their images."""
        distance = self.images.new_empty(len(self.images))
        for block, spare in self._blocks():
            away = torch.sub(self.points[block], self.images[block], out=self.away[block])
            distance[block] = self._length(away, spare[0])
        return distance

    def pull(self, wrong: Tensor) -> None:
        """Back towards their images with those points, (N,), that are wrong; after :meth:`measured`."""
        for block, spare in self._blocks():
            back = wrong[block].to(self.images).unsqueeze(1)
            away = self.away[block].mul_(1 - (1 - self.attack.beta) * back)
            pulled = torch.add(self.images[block], away, out=spare[0])
            self.points[block].lerp_(pulled, back)  # exactly the one or the other
