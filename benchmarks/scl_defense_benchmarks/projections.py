"""FAB's projection onto a linearised boundary inside the box, without sorting."""

import torch
from torch import Tensor

ROUNDS = 64  # two to four are taken; each ends in a longer step or is the last


def onto_plane_linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """The smallest Linf move of each point, inside [0, 1], onto its plane (Croce & Hein 2020b, eq. 4 and 5).

    points, normals: (N, D); offsets: (N,): the planes are ``normal . x = offset``. Returns the moves, (N, D); for a
    plane that misses the box the one into the nearest corner; zero where the normal is.

    Every coordinate moves by the same length, or as far as the box lets it: what a length gains along the normal is
    concave and piecewise linear, so that Newton's method from below ends at the solution itself. torchattacks sorts
    the coordinates and searches among sums, which takes three to four times as long (120 points of 3,072 numbers).
    """
    gap = (normals * points).sum(1) - offsets
    normals = torch.where((gap >= 0).view(-1, 1), normals, -normals)
    gap, upwards, weights = gap.abs(), normals < 0, normals.abs()
    room = torch.where(upwards, 1 - points, points)
    gains = weights * room
    length = gap / weights.sum(1)
    for _ in range(ROUNDS):
        free = room > length.view(-1, 1)
        slope = torch.where(free, weights, 0).sum(1)
        longer = (gap - torch.where(free, 0, gains).sum(1)) / slope
        longer = torch.where((slope > 0) & (longer > length), longer, length)
        if not bool((longer > length).any()):
            break
        length = longer
    length = torch.where(gap < gains.sum(1), length, torch.inf)
    moves = torch.minimum(room, length.view(-1, 1))
    return torch.where(upwards, moves, -moves) * (normals != 0)
