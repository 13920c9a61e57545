"""Our own check of what an attack returns: finite, box, ball, label. The attack's opinion is never asked."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scl_defense.errors import ComponentError
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.shims import into_box

BOX_TOLERANCE = 1e-6  # float32 rounding of x + d, cut off without being called a violation
STILL = 1e-3  # in units of eps: closer to its image than this, an example is no attempt
STILL_MINIMAL = 1e-6  # the same for attacks without a radius


def check_returned(returned: object, images: Tensor) -> Tensor:
    """``returned`` as detached float32 images; raises :class:`ComponentError` when it is no such thing at all."""
    if not isinstance(returned, Tensor):
        raise ComponentError(f"it returned a {type(returned).__name__}, not a tensor of images")
    if returned.shape != images.shape:
        raise ComponentError(f"it returned shape {tuple(returned.shape)} for images {tuple(images.shape)}")
    if not returned.is_floating_point():
        raise ComponentError(f"it returned {returned.dtype}; images are float32 in [0, 1]")
    return returned.detach().to(images.device, torch.float32, copy=True)


@dataclass(frozen=True)
class Verdict:
    """One attack's examples after our check; every field is per attacked image, (M,).

    examples: (M, C, H, W) what was judged: inside the box, and inside the ball unless the attack is minimal.
    predicted: the label that our own forward pass gives; fooled: it is another one. distance: float64, in the attack's
    norm. moved: a real attempt.
    """

    examples: Tensor
    fooled: Tensor
    distance: Tensor
    moved: Tensor
    outside_box: Tensor
    outside_ball: Tensor
    nonfinite: Tensor
    predicted: Tensor


def judge(
    network: nn.Module, images: Tensor, labels: Tensor, returned: Tensor, threat: ThreatModel, *, minimal: bool
) -> Verdict:
    """Judge ``returned`` (M, C, H, W) against ``images`` in float32 on ``network``, which must be in eval mode.

    What is not finite is replaced by the image itself: not fooled, not moved. What lies outside the box, or outside
    the ball of an attack that has one, is pulled back to the nearest point inside and judged there.
    """
    # Least and largest alone are asked for: on a CPU comparisons and torch.where cost several times as much.
    usable, (low, high) = returned, _ends(returned)
    finite = low.isfinite() & high.isfinite()
    if not bool(finite.all()):
        usable = torch.where(finite.view(-1, 1, 1, 1), returned, images)
        low, high = _ends(usable)
    outside_box = (low < -BOX_TOLERANCE) | (high > 1 + BOX_TOLERANCE)
    distance = threat.distance(images, usable)
    outside_ball = torch.zeros_like(outside_box) if minimal else distance > threat.tolerance()
    examples = usable
    if bool(((low < 0) | (high > 1) | outside_ball).any()):
        boxed = into_box(images, usable)
        pulled = outside_ball.view(-1, 1, 1, 1)
        examples = boxed if minimal else torch.where(pulled, threat.project(images, usable), boxed)
        distance = threat.distance(images, examples)
    predicted = decide(logits_of(network, examples))
    still = STILL_MINIMAL if minimal else STILL * threat.radius
    return Verdict(
        examples=examples,
        fooled=finite & (predicted != labels),
        distance=distance,
        moved=finite & (distance >= still),
        outside_box=outside_box,
        outside_ball=outside_ball,
        nonfinite=~finite,
        predicted=predicted,
    )


def _ends(images: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each image, (N,): not a number where one is not."""
    if images[:1].numel() == 0:
        return images.new_zeros(len(images)), images.new_zeros(len(images))
    flat = images.flatten(1)
    return flat.amin(1), flat.amax(1)
