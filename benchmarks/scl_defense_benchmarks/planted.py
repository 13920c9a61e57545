"""Can our ascent find an adversarial example that is known to be there? (Zimmermann et al. 2022)

The binarised decision-boundary test of "Increasing confidence in adversarial robustness evaluations": around each image
a new binary problem is posed on the network's own penultimate features. Many points inside the ball are class 0, one
point on its surface is class 1, and a linear readout separates the two, its boundary close to the planted point. An
example of class 1 therefore exists inside the ball by construction. An attack whose gradients are worth something
finds one; random points of the same ball do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scl_defense.ascent import ascend
from scl_defense.threat import ThreatModel, parse_eps

INNER = 200  # points of class 0 for each image
RANDOM = 200  # points that chance is given
INSIDE = 0.8  # of the radius: where class 0 ends
CLOSENESS = 0.95  # of the way from class 0 to the planted point: where the boundary lies
RIDGE = 1.0  # of the mean variance of a feature; a small one poses problems that no ascent can solve
STEPS, REL_STEP = 40, 0.1
BATCH = 200


@dataclass(frozen=True)
class Planted:
    """posed: images for which the readout separates the classes. found: of those, by the ascent. chance: by noise."""

    posed: int
    found: int
    chance: int


def readout_of(network: nn.Module, images: Tensor) -> nn.Linear | None:
    """The linear layer that makes the logits, or ``None``: the last one called, if its output is the network's."""
    called: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: called.append((module, output)))
        for module in network.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            network(images[:2])
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1][0] if called and called[-1][1].ndim == 2 else None


def plant(network: nn.Module, images: Tensor, threat: ThreatModel, rng: torch.Generator) -> Planted | None:
    """Pose the problem for every image and try to solve it by ascent, and by chance.

    network: in eval mode, frozen; (N, C, H, W) in [0, 1] -> logits. threat: the ball, in Linf, L2 or L1, of a radius
    above 0. rng: every draw comes from it. ``None``: no linear layer makes the logits (a traced network, another kind
    of head), so that there are no features to read.
    """
    layer = readout_of(network, images)
    if layer is None:
        return None
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def features(points: Tensor) -> Tensor:
        seen.clear()
        network(points)
        return seen[-1].flatten(1).float()

    try:
        return _solve(features, images, threat, rng)
    finally:
        hook.remove()


def _solve(features: Callable[[Tensor], Tensor], images: Tensor, threat: ThreatModel, rng: torch.Generator) -> Planted:
    inner = ThreatModel(threat.norm, f"{float(INSIDE * parse_eps(threat.eps)):.6g}")
    weights, limits, kept, chance = [], [], [], 0

    def many(image: Tensor, ball: ThreatModel, count: int, edge: bool = False) -> Tensor:
        copies = image.expand(count, *image.shape[1:])
        points = ball.random_start(copies, rng)
        return _surface(ball, copies, points) if edge else points

    for place in range(len(images)):
        image = images[place : place + 1]
        with torch.no_grad():
            zero = features(torch.cat([image, many(image, inner, INNER)])).double()
            one = features(many(image, threat, 1, edge=True)).double()[0]
            centre = zero.mean(0)
            spread = (zero - centre).T @ (zero - centre) / len(zero)
            ridge = RIDGE * spread.diagonal().mean().clamp(min=torch.finfo(spread.dtype).tiny)
            eye = torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
            weight = torch.linalg.solve(spread + ridge * eye, one - centre)
            weight = weight / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)
            highest, planted = (zero @ weight).max(), one @ weight
            if not bool(planted > highest):  # not separable: nothing was planted
                continue
            limit = highest + CLOSENESS * (planted - highest)
            tried = torch.cat([many(image, threat, RANDOM // 2), many(image, threat, RANDOM // 2, edge=True)])
            chance += int(((features(tried).double() @ weight) > limit).any())
        weights.append(weight)
        limits.append(limit)
        kept.append(place)
    if not kept:
        return Planted(0, 0, 0)
    normals, bounds, attacked = torch.stack(weights), torch.stack(limits), images[kept]
    found = torch.zeros(len(kept), dtype=torch.bool, device=images.device)
    for start in range(0, len(kept), BATCH):
        rows = slice(start, start + BATCH)
        hit = found[rows]

        def objective(points: Tensor, rows: slice = rows, hit: Tensor = hit) -> Tensor:
            above = (features(points).double() * normals[rows]).sum(1) - bounds[rows]
            hit.logical_or_(above.detach() > 0)
            return above.float()

        end = ascend(objective, attacked[rows], threat, steps=STEPS, rel_step=REL_STEP, start="uniform", rng=rng)
        with torch.no_grad():
            objective(end)
    return Planted(len(kept), int(found.sum()), chance)


def _surface(threat: ThreatModel, images: Tensor, points: Tensor) -> Tensor:
    """``points`` pushed outwards to the surface of the ball (Linf: to a corner), then back into the box."""
    move = points - images
    if threat.norm == "linf":
        move = torch.where(move >= 0, 1.0, -1.0) * threat.radius
    else:
        order = 2 if threat.norm == "l2" else 1
        length = move.flatten(1).norm(p=order, dim=1).clamp(min=torch.finfo(move.dtype).tiny)
        move = move * (threat.radius / length)[:, None, None, None]
    return threat.project(images, images + move)
