"""The one inner maximisation loop: projected steepest ascent of an objective inside a threat model.

Every PGD of the project is this loop with another objective. Standard references: Kurakin et al. 2017 (BIM),
Madry et al. 2018 (random start), Wong et al. 2020 (one step of 1.25 eps from a random start: FGSM-RS).
"""

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from scl_defense.draws import Draws, Several
from scl_defense.errors import ComponentError, UserError
from scl_defense.losses import infonce, ntxent, unit
from scl_defense.runtime import anywhere, ranks
from scl_defense.threat import ThreatModel

Objective = Callable[[Tensor], Tensor]
#: (points (M, C, H, W), rows (M,)) -> values (M,), done (M,) bool: points of the images ``rows``, and a verdict.
StoppingObjective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Start = Literal["uniform", "gaussian", "zero"] | Tensor
Contrastive = Literal["infonce", "ntxent-joint", "align", "supcon"]
Negatives = Literal["all", "other-classes"]
SIZES = 8  # of a batch that shrinks, from any size to its half
GAUSSIAN_START = 0.001  # TRADES and MART start at x + 0.001 N(0, I)


def default_rel_step(steps: int) -> float:
    """2.5 / steps: the ball can be crossed more than twice (Madry et al. 2018, section 5)."""
    return 2.5 / max(steps, 1)


def ascend(
    objective: Objective | StoppingObjective,
    images: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    rel_step: float | None = None,
    start: Start = "uniform",
    stopping: bool = False,
    at_once: int | None = None,
    rng: Draws,
) -> Tensor:
    """Maximise ``objective`` over the ball around each image; returns the last iterate, detached, shaped as images.

    objective: (N, C, H, W) -> (N,), one value an image to be maximised; images must not interact unless that is
    meant (the gradient is that of the sum). steps >= 0 updates, each of length ``rel_step * eps`` (default
    2.5 / steps) along the steepest direction, followed by the projection. start: ``uniform`` in the ball,
    ``gaussian`` (0.001 N(0, I)), ``zero``, or a tensor (N, C, H, W).

    stopping: the objective also gets the places of its points in ``images``, and says which of them are done: those
    stay where they are and are passed no more. The batch that is left is filled up with a few of its points, passed
    twice, to one of eight sizes an octave: what prepares its kernels anew for every size of batch meets few of them.
    at_once: then, so many of those that are left are passed at a time; default: all of them.

    Gradients are taken with respect to the images alone: no parameter's ``.grad`` is touched. Train/eval mode is the
    caller's (see :func:`scl_defense.guard.frozen`). A sample whose gradient is zero or not finite everywhere gets a
    random direction. Only ``rng`` is drawn from. Raises :class:`ComponentError` when the objective has the wrong
    shape or does not depend on the images.
    """
    images = images.detach()
    if len(images) == 0 and not ranks().in_step:
        return images.clone()
    if isinstance(start, Tensor):
        if start.shape != images.shape:
            raise ComponentError(f"start must have the images' shape {tuple(images.shape)}, not {tuple(start.shape)}")
        adversarial = threat.project(images, start.detach().to(images))
    elif start == "uniform":
        adversarial = threat.random_start(images, rng)
    elif start == "gaussian":
        noise = rng.each(_gaussian, images) if isinstance(rng, Several) else _gaussian(images, rng)
        adversarial = threat.project(images, images + GAUSSIAN_START * noise)
    elif start == "zero":
        adversarial = images.clone()
    else:
        raise ComponentError(f"start {start!r} must be uniform, gaussian, zero or a tensor")
    length = threat.radius * (default_rel_step(steps) if rel_step is None else rel_step)
    if not stopping:
        for _ in range(steps):
            adversarial = _step(cast(Objective, objective), images, adversarial, threat, length, rng)
        return adversarial
    left = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        if not len(left):
            break
        how = cast(StoppingObjective, objective), images, threat, length
        left = _step_of(left, adversarial, *how, at_once=at_once or len(left), rng=rng)
    return adversarial


def _gaussian(images: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=rng, device=rng.device, dtype=torch.float32).to(images)


def filled_up(left: Tensor) -> Tensor:
    """``left``, and behind it as many of its places again as make 1 to 16, 18, 20, ..., 32, 36, 40, ...."""
    block = max(1, 2 ** (len(left).bit_length() - 1) // SIZES)
    return torch.cat([left, left[: -len(left) % block]])


def _step(
    objective: Objective, images: Tensor, points: Tensor, threat: ThreatModel, length: float, rng: Draws
) -> Tensor:
    """One step from ``points`` and back into the ball around ``images``."""
    if len(points) == 0:  # other processes have images: what they draw is drawn here too
        if anywhere(False):
            threat.random_direction(images, rng)
        return points
    direction, stuck = _direction(_gradient(objective, points), points, threat)
    # Drawn for the whole batch: the number drawn does not depend on which samples are stuck, nor on who has them.
    if anywhere(stuck.any()):
        direction = torch.where(stuck.view(-1, 1, 1, 1), threat.random_direction(images, rng), direction)
    return threat.project(images, points + length * direction)


def _step_of(
    left: Tensor,
    adversarial: Tensor,
    objective: StoppingObjective,
    images: Tensor,
    threat: ThreatModel,
    length: float,
    *,
    at_once: int,
    rng: Draws,
) -> Tensor:
    """One step of the images ``left``, written into ``adversarial``; which are left after it."""
    staying, stuck_ones = list[Tensor](), list[tuple[Tensor, Tensor]]()
    for part in left.tensor_split(-(-len(left) // at_once)):
        rows, done = filled_up(part), torch.zeros(len(part), dtype=torch.bool, device=images.device)

        def ask(points: Tensor, rows: Tensor = rows, done: Tensor = done) -> Tensor:
            values, verdict = objective(points, rows)
            done |= verdict[: len(done)]
            return values

        points = adversarial[rows]
        gradient, points = _gradient(ask, points)[: len(part)], points[: len(part)]
        direction, stuck = _direction(gradient, points, threat)
        moved = threat.project(images[part], points + length * direction)
        going = part[~done]
        adversarial.index_copy_(0, going, moved[~done])
        staying.append(going)
        if stuck.any():
            stuck_ones.append((part[stuck], points[stuck & ~done]))
    left = torch.cat(staying)
    if stuck_ones:
        # Drawn for the whole batch, or all of a part of it: how much does not depend on which samples are stuck.
        where = torch.cat([places for places, _ in stuck_ones])
        drawn = threat.random_direction(images, rng.alone(where) if isinstance(rng, Several) else rng)
        where = where[torch.isin(where, left)]
        points = torch.cat([points for _, points in stuck_ones])
        adversarial.index_copy_(0, where, threat.project(images[where], points + length * drawn[where]))
    return left


def _direction(gradient: Tensor, points: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """The steepest direction, and (N,) where there is none. NaN is no slope, an infinite one the largest there is."""
    flat = torch.nan_to_num(gradient.flatten(1), nan=0.0)
    return threat.steepest(flat.view_as(points), points), flat.abs().amax(1) == 0


def _gradient(objective: Objective, adversarial: Tensor) -> Tensor:
    point = adversarial.detach().requires_grad_()
    with torch.enable_grad():
        values = objective(point)
        if not isinstance(values, Tensor) or values.shape != (len(point),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ComponentError(f"the objective must return one value an image, shape ({len(point)},), not {got}")
        if not values.requires_grad:
            raise ComponentError("the objective does not depend on the images: its graph is cut (detach or no_grad?)")
        (gradient,) = torch.autograd.grad(values.sum(), point, allow_unused=True)
    if gradient is None:
        raise ComponentError("the objective does not depend on the images: their gradient is missing")
    return gradient.detach()


def ascend_contrast(
    embed: Callable[[Tensor], Tensor],
    views: Tensor,
    threat: ThreatModel,
    *,
    objective: Contrastive = "infonce",
    negatives: Negatives = "all",
    labels: Tensor | None = None,
    count: int = 1,
    temperature: float = 0.5,
    steps: int,
    rel_step: float | None = None,
    start: Literal["uniform", "gaussian", "zero"] = "uniform",
    rng: torch.Generator,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
    first: int = 0,
) -> Tensor:
    """Contrastive PGD: maximise a contrastive loss of perturbed views. Returns ``count`` of them, (A, N, C, H, W).

    Adversarial view a is made around ``views[a % V]`` from a start of its own, against the next view: with a_i image i
    of that view, z the unit-length embedding, r_i = z(b_i) of the view ``(a + 1) % V`` (of a itself when V = 1),
    computed once and held fixed, and s_ik = z(a_i + delta).r_k / temperature, the objectives are

    - ``infonce``:  -s_ii + log sum_k exp(s_ik). Separable in i, label-free: the attack of RoCL, one-sided.
      ``negatives="other-classes"`` leaves the class-mates k != i with y_k = y_i out of the sum (labels).
    - ``align``:  -s_ii alone, a cosine (SupRobCon): no negatives, and no gradient at delta = 0 against itself.
    - ``supcon``:  -1/|P_i| sum_{p in P_i} log( exp(s_ip) / sum_k exp(s_ik) ), P_i = {p: y_p = y_i}, i among them:
      Khosla et al. 2020, eq. 2, with the references in place of the other rows (labels).
    - ``ntxent-joint``:  NT-Xent (Chen et al. 2020) of the whole batch, everything perturbed jointly, so that the other
      images' adversarials stand in the denominators. A = 1: over the rows z(a + delta) and r (Kim et al. 2020, RoCL);
      A >= 2: over the A perturbed views alone (A = 2: Jiang et al. 2020, ACL).

    The encoder in training as ``embed`` gives the published online attacks; a fixed feature map the model-free one.

    Of several processes each has some of the images: ``gather`` gives the rows of all, of which the own ones begin at
    ``first`` (see :class:`scl_defense.types.Context`); not for ``ntxent-joint``, whose perturbed rows interact.

    embed: (N, C, H, W) -> (N, ...) features, flattened here. views: (V, N, C, H, W) in [0, 1]. labels: (N,). Raises
    :class:`UserError` for N = 1 (without a negative the gradient vanishes; ``align`` has none) and for ``align`` of a
    view against itself from a zero start.
    """
    if objective not in get_args(Contrastive):
        raise UserError(f"objective '{objective}' is unknown; it must be one of {', '.join(get_args(Contrastive))}")
    check_negatives(objective, negatives)
    if objective != "align" and views.shape[1] < 2:
        raise UserError("contrastive PGD needs at least 2 images a batch: with one there is no negative, no gradient")
    if objective == "align" and start == "zero" and len(views) == 1:
        raise UserError("objective=align has no gradient at a view against itself; use start=uniform, or two views")
    if labels is None and (objective == "supcon" or negatives == "other-classes"):
        raise ComponentError(f"objective {objective} with negatives {negatives} needs labels")
    places = [place % len(views) for place in range(count)]
    walk: dict[str, Any] = {"steps": steps, "rel_step": rel_step, "start": start, "rng": rng}
    if objective == "ntxent-joint":
        return _ascend_jointly(embed, views, places, threat, temperature, walk)
    mates = None if labels is None else labels[:, None] == gather(labels)[None, :]
    adversarial = []
    for place in places:
        with torch.no_grad():
            references = gather(embed(views[(place + 1) % len(views)]).flatten(1))

        def loss(images: Tensor, references: Tensor = references) -> Tensor:
            found = embed(images).flatten(1)
            if objective == "align":
                return -(unit(found) * unit(references[first : first + len(found)])).sum(1) / temperature
            if objective == "supcon" and mates is not None:
                return _one_sided_supcon(found, references, mates, temperature)
            exclude = mates if negatives == "other-classes" else None
            return infonce(found, references, temperature, exclude=exclude, first=first)

        adversarial.append(ascend(loss, views[place], threat, **walk))
    return torch.stack(adversarial)


def check_negatives(objective: str, negatives: str) -> None:
    """``negatives`` is a choice of InfoNCE alone. Raises :class:`UserError`."""
    if negatives not in get_args(Negatives):
        raise UserError(f"negatives '{negatives}' is unknown; it must be one of {', '.join(get_args(Negatives))}")
    if negatives != "all" and objective != "infonce":
        raise UserError(f"negatives={negatives} goes with objective=infonce, not with {objective}; leave one out")


def _ascend_jointly(
    embed: Callable[[Tensor], Tensor],
    views: Tensor,
    places: list[int],
    threat: ThreatModel,
    temperature: float,
    walk: dict[str, Any],
) -> Tensor:
    count, shape = len(places), views.shape[1:]
    fixed = []
    if count == 1:
        with torch.no_grad():
            fixed = [embed(views[1 % len(views)]).flatten(1)]

    def loss(images: Tensor) -> Tensor:
        rows = embed(images).flatten(1)
        mean = ntxent(torch.stack([*rows.chunk(count), *fixed]), temperature)
        return mean.expand(len(images))  # one number of the whole batch: only its gradient is asked for

    return ascend(loss, views[places].flatten(0, 1), threat, **walk).view(count, *shape)


def _one_sided_supcon(embed: Tensor, references: Tensor, mates: Tensor, temperature: float) -> Tensor:
    """(N,): the mean over positives is infonce's own term with the mean of the positives' references."""
    z, r = unit(embed), unit(references)
    with torch.autocast(z.device.type, enabled=False):  # as in losses: bfloat16 is off by 0.02 at temperature 0.1
        weight = mates.to(z.dtype)
        mean = (weight @ r) / weight.sum(1, keepdim=True)
        return (z @ r.T / temperature).logsumexp(1) - (z * mean).sum(1) / temperature
