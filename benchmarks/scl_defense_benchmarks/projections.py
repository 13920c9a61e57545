"""Onto linearised boundaries inside the box, without sorting: what FAB does at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 64  # two to four are taken
FARTHEST = 1e12  # lengths from which on every coordinate is at its wall
SPARE = 5


class Planes:
    """Planes, one a point: the shortest moves onto them, inside the box (Croce & Hein 2020b, section 3.1 and app. A).

    normals: (N, D), finite, as their squares have to be under L2; norm: what is shortest, ``linf`` or ``l2``. spare:
    :data:`SPARE` tensors (N, D) to be written over.

    Every coordinate goes as far as the box lets it along a direction: the normal's sign, or the normal under L2. What
    a length along it gains is concave and piecewise linear, so that Newton's method ends at the solution itself.
    torchattacks sorts coordinates and searches among sums. Masks are numbers here: on a CPU ``torch.where`` and what
    gives booleans take three to fifty times as long as a product.
    """

    def __init__(self, normals: Tensor, norm: str, spare: Sequence[Tensor]):
        self.normals, self._spare = normals, spare[2:]
        self.direction = torch.sign(normals, out=spare[0]) if norm == "linf" else normals
        self.gains = torch.mul(normals, self.direction, out=spare[1])
        self.total = self.gains.sum(1)

    def moves(self, gaps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """(N, D), good until the next call: from each point, onto its plane. For a plane that misses the box the one
        into the nearest corner; zero where the normal is.

        gaps: (N,) by how much ``normal . point`` lies above the plane's, finite; low, high: (N, D) how far each
        coordinate may go down (at most 0) and up.
        """
        moves, wanted, product = self._spare
        exact, least = 32 * torch.finfo(gaps.dtype).eps, torch.finfo(gaps.dtype).tiny
        need, down = gaps.abs(), 1 - 2 * (gaps >= 0).to(gaps)
        length = (need / self.total.clamp(min=least)).clamp(max=FARTHEST)
        for _ in range(ROUNDS):
            torch.mul(self.direction, (down * length).unsqueeze(1), out=wanted)
            torch.clamp(wanted, low, high, out=moves)
            gained = torch.mul(self.normals, moves, out=product).sum(1).abs()
            short = (need - gained).abs() > exact * need
            if not bool((short & (length < FARTHEST)).any()):
                break
            free = torch.sub(wanted, moves, out=wanted).sign_().abs_().neg_().add_(1)  # 0 where a wall has stopped it
            slope = torch.mul(self.gains, free, out=product).sum(1)  # small beside the total: it is no difference
            better = length + (need - gained) / slope.clamp(min=least)
            length = torch.where(short, better.clamp(0, FARTHEST), length)
        return moves
