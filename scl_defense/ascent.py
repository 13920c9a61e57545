"""The one inner maximisation loop: projected steepest ascent of an objective inside a threat model.

Every PGD of the project is this loop with another objective. Standard references: Kurakin et al. 2017 (BIM),
Madry et al. 2018 (random start), Wong et al. 2020 (one step of 1.25 eps from a random start: FGSM-RS).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from scl_defense.errors import ComponentError, UserError
from scl_defense.losses import infonce
from scl_defense.threat import ThreatModel

Objective = Callable[[Tensor], Tensor]
Start = Literal["uniform", "gaussian", "zero"] | Tensor
GAUSSIAN_START = 0.001  # TRADES and MART start at x + 0.001 N(0, I)


def default_rel_step(steps: int) -> float:
    """2.5 / steps: the ball can be crossed more than twice (Madry et al. 2018, section 5)."""
    return 2.5 / max(steps, 1)


def ascend(
    objective: Objective,
    images: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    rel_step: float | None = None,
    start: Start = "uniform",
    rng: torch.Generator,
) -> Tensor:
    """Maximise ``objective`` over the ball around each image; returns the last iterate, detached, shaped as images.

    objective: (N, C, H, W) -> (N,), one value an image to be maximised; images must not interact unless that is
    meant (the gradient is that of the sum). steps >= 0 updates, each of length ``rel_step * eps`` (default
    2.5 / steps) along the steepest direction, followed by the projection. start: ``uniform`` in the ball,
    ``gaussian`` (0.001 N(0, I)), ``zero``, or a tensor (N, C, H, W).

    Gradients are taken with respect to the images alone: no parameter's ``.grad`` is touched. Train/eval mode is the
    caller's (see :func:`scl_defense.guard.frozen`). A sample whose gradient is zero or not finite everywhere gets a
    random direction. Only ``rng`` is drawn from. Raises :class:`ComponentError` when the objective has the wrong
    shape or does not depend on the images.
    """
    images = images.detach()
    if len(images) == 0:
        return images.clone()
    if isinstance(start, Tensor):
        if start.shape != images.shape:
            raise ComponentError(f"start must have the images' shape {tuple(images.shape)}, not {tuple(start.shape)}")
        adversarial = threat.project(images, start.detach().to(images))
    elif start == "uniform":
        adversarial = threat.random_start(images, rng)
    elif start == "gaussian":
        noise = torch.randn(images.shape, generator=rng, device=rng.device, dtype=torch.float32)
        adversarial = threat.project(images, images + GAUSSIAN_START * noise.to(images))
    elif start == "zero":
        adversarial = images.clone()
    else:
        raise ComponentError(f"start {start!r} must be uniform, gaussian, zero or a tensor")
    length = threat.radius * (default_rel_step(steps) if rel_step is None else rel_step)
    for _ in range(steps):
        gradient = _gradient(objective, adversarial)
        # NaN is no direction; an infinite slope is the largest there is.
        flat = torch.nan_to_num(gradient.flatten(1), nan=0.0)
        direction = threat.steepest(flat.view_as(images), adversarial)
        stuck = flat.abs().amax(1) == 0
        if stuck.any():  # drawn for the whole batch: the number drawn does not depend on which samples are stuck
            direction = torch.where(stuck.view(-1, 1, 1, 1), threat.random_direction(images, rng), direction)
        adversarial = threat.project(images, adversarial + length * direction)
    return adversarial


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
    perturb: Literal["one", "both"] = "one",
    temperature: float = 0.5,
    steps: int,
    rel_step: float | None = None,
    start: Literal["uniform", "gaussian", "zero"] = "uniform",
    rng: torch.Generator,
) -> Tensor:
    """Label-free contrastive PGD: maximise one-sided InfoNCE of a perturbed view against another view.

    For image i, view a_i and reference r_i = embed(b_i) of the next view b (of a itself when V = 1), the reference
    embeddings being computed once and held fixed::

        max_{delta in ball} -z(a_i + delta).r_i / temperature + log sum_k exp(z(a_i + delta).r_k / temperature)

    with unit-length z. It is separable in i; only r depends on the rest of the batch. The encoder in training as
    ``embed`` gives the label-free attack of RoCL (Kim et al. 2020), one-sided; a fixed feature map gives the
    model-free attack.

    embed: (N, C, H, W) -> (N, ...) features, flattened here. views: (V, N, C, H, W) in [0, 1]. Returns (A, N, C, H, W)
    with A = 1 (``perturb="one"``: view 0) or 2 (``"both"``: views 0 and 1). Raises :class:`UserError` for N = 1
    (without a negative the gradient vanishes) and for ``both`` with a single view.
    """
    count = {"one": 1, "both": 2}[perturb]
    if views.shape[1] < 2:
        raise UserError("contrastive PGD needs at least 2 images a batch: with one there is no negative, no gradient")
    if count > len(views):
        raise UserError("perturb=both needs a trainer with two views; write perturb=one")
    adversarial = []
    for index in range(count):
        with torch.no_grad():
            references = embed(views[(index + 1) % len(views)]).flatten(1)

        def objective(images: Tensor, references: Tensor = references) -> Tensor:
            return infonce(embed(images).flatten(1), references, temperature)

        adversarial.append(
            ascend(objective, views[index], threat, steps=steps, rel_step=rel_step, start=start, rng=rng)
        )
    return torch.stack(adversarial)
