"""Square Attack's search under Linf: torchattacks' own, number by number, with arithmetic on the square alone.

The library builds, clips and compares whole images for every query, a tenth of a narrow ResNet's time and more beside
passes over the squares alone. The draws, their order and every number that is computed are the library's, but
for an image with logits that are not finite: the library loses it, here it is searched on.
"""

import math
from typing import Any

import torch
from torch import Tensor

from scl_defense_benchmarks.patches import Patches


@torch.no_grad()
def best_found(attack: Any, images: Tensor, labels: Tensor, patches: Patches | None) -> Tensor:
    """The best point tried for every image, right or wrong.

    attack: a ``torchattacks.Square`` under Linf that knows its images' shape (``init_hyperparam``), whose draws, step
    sizes and loss are used. images: (N, C, H, W) in [0, 1]; labels: (N,). patches: what its network remembers the best
    points with, or ``None``. A point is better when its loss is lower, or when it is wrong; what is wrong is asked
    about no more.
    """
    channels, height, width = images.shape[1:]
    numbers = channels * height * width
    best = torch.clamp(images + attack.eps * attack.random_choice([len(images), channels, 1, width]), 0.0, 1.0)
    margins, losses = attack.margin_and_loss(best, labels)
    left = torch.arange(len(images), device=images.device)
    if patches is not None:
        patches.settle(torch.ones_like(left, dtype=torch.bool), margins > 0)
    for query in range(attack.n_queries):
        left = left[margins[left] > 0]
        if len(left) == 0:
            break
        side = max(round(math.sqrt(attack.p_selection(query) * numbers / channels)), 1)
        top, start = int(attack.random_int(0, height - side)), int(attack.random_int(0, width - side))
        square = (slice(None), slice(None), slice(top, top + side), slice(start, start + side))
        change = 2.0 * attack.eps * attack.random_choice([channels, 1, 1])
        tried, clean = best[left], images[square][left]
        inside = tried[square] + change
        tried[square] = torch.min(torch.max(inside, clean - attack.eps), clean + attack.eps).clamp(0.0, 1.0)
        if patches is not None and 0 <= top <= height - side and 0 <= start <= width - side:
            patches.expected = (top, start, side, side)
        margin, loss = attack.margin_and_loss(tried, labels[left])
        lower, wrong = loss < losses[left], margin <= 0
        better = lower | wrong
        rows = left[better]
        losses[left[lower]] = loss[lower]
        margins[rows] = margin[better]
        best[rows] = tried[better]
        if patches is not None:
            patches.settle(better, margins[left] > 0)
    return best
