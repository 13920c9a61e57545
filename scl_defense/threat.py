"""Threat models: the one home of norms, balls, projections, random starts and steepest steps.

Nobody outside this module clamps an adversarial image. All images are float tensors (N, C, H, W) in [0, 1].
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from scl_defense.draws import Draws, Several
from scl_defense.errors import UserError

NORMS = ("linf", "l2", "l1")  # those that have a direction of steepest ascent: what one can train in
ALL_NORMS = (*NORMS, "l0")  # those that can be attacked and judged in
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?:/\d+(?:\.\d+)?)?", re.ASCII)
# Share of coordinates that one steepest L1 step moves (SLIDE, Tramer & Boneh 2019: the top 1 % of the gradient).
L1_SHARE = 0.01


def parse_eps(text: str | float | int) -> Fraction:
    """``"8/255"``, ``"0.1"`` or a number as an exact fraction. Raises :class:`UserError` unless finite and >= 0.

    >>> parse_eps("8/255"), parse_eps(0.1)
    (Fraction(8, 255), Fraction(1, 10))
    """
    return _fraction(str(text).strip())


@lru_cache(maxsize=1024)  # asked in every step of every attack
def _fraction(written: str) -> Fraction:
    if len(written) > 50 or not _NUMBER.fullmatch(written):
        raise UserError(f"eps {written[:50]!r} is not a radius; it must be >= 0 and written like 8/255 or 0.1")
    top, _, bottom = written.partition("/")
    if bottom and Fraction(bottom) == 0:
        raise UserError(f"eps {written!r} divides by zero; write it like 8/255 or 0.1")
    value = Fraction(top) / Fraction(bottom or 1)
    if value > 10**9:
        raise UserError(f"eps {written!r} is too large; images lie in [0, 1], write it like 8/255 or 0.1")
    return value


@dataclass(frozen=True)
class ThreatModel:
    """A norm ball of radius ``eps`` around each image, within the box [0, 1].

    ``norm`` is one of ``linf``, ``l2``, ``l1``, ``l0``; ``eps`` is kept as written (``"8/255"``) and compared as a
    number. Under L0 it counts pixels: a pixel with one changed channel is a changed pixel. Raises :class:`UserError`
    for an unknown norm, a negative eps, an Linf eps above 1 (the whole box), or a broken number of pixels.

    >>> threat = ThreatModel("linf", "0.1")
    >>> images = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2)
    >>> threat.project(images, images + torch.tensor([0.5, -0.02])).flatten()
    tensor([0.1000, 0.4800])
    >>> str(threat), threat == ThreatModel("linf", "1/10")
    ('linf:0.1', True)
    """

    norm: str
    eps: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ThreatModel):
            return False
        return (self.norm, parse_eps(self.eps)) == (other.norm, parse_eps(other.eps))

    def __hash__(self) -> int:
        return hash((self.norm, parse_eps(self.eps)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", str(self.norm).lower())
        object.__setattr__(self, "eps", str(self.eps).strip())
        if self.norm not in ALL_NORMS:
            raise UserError(f"norm '{self.norm}' is unknown; it must be one of {', '.join(ALL_NORMS)}")
        if parse_eps(self.eps) > 1 and self.norm == "linf":
            raise UserError(
                f"eps {self.eps} is larger than the whole range: images lie in [0, 1]; write 8/255 instead of 8"
            )
        if self.norm == "l0" and parse_eps(self.eps).denominator != 1:
            raise UserError(f"eps {self.eps} is no number of pixels, which l0 counts; write a whole number like 10")

    @classmethod
    def parse(cls, text: str) -> "ThreatModel":
        """``"linf:8/255"`` -> a threat model."""
        norm, colon, eps = text.partition(":")
        if not colon:
            raise UserError(f"threat {text!r} must be written NORM:EPS, like linf:8/255")
        return cls(norm, eps)

    def __str__(self) -> str:
        return f"{self.norm}:{self.eps}"

    @property
    def radius(self) -> float:
        return float(parse_eps(self.eps))

    def check_fits(self, image_shape: Sequence[int]) -> None:
        """Raise :class:`UserError` when the ball holds the whole box of images (C, H, W) wherever its centre is.

        Such a radius (8 for 8/255, 255) constrains nothing; a radius of just that size is allowed.
        """
        channels, height, width = image_shape
        pixels = height * width
        numbers = channels * pixels
        largest = {"linf": 1.0, "l2": math.sqrt(numbers), "l1": float(numbers), "l0": float(pixels)}[self.norm]
        if self.radius > largest * (1 + 1e-9):
            raise UserError(
                f"eps {self.eps} under {self.norm} is the whole box of images {tuple(image_shape)}: nothing is farther "
                f"than {largest:g}; images lie in [0, 1], give a smaller radius"
            )

    # -- measuring

    def distance(self, images: Tensor, adversarial: Tensor) -> Tensor:
        """The norm of ``adversarial - images`` per image, (N,), computed in float64 where the device has it.

        L0: how many pixels differ at all; not a number differs.
        """
        if self.norm == "l0":
            changed = (
                (adversarial != images).any(1) if images.shape[1] else adversarial.new_zeros(len(images), 1).bool()
            )
            return _wide(changed.flatten(1).sum(1))
        if self.norm == "linf" and images[:1].numel():
            return _wide((adversarial - images).flatten(1).abs().amax(1))  # of float32: the same number
        delta = _wide(adversarial - images).flatten(1)
        if self.norm == "linf":
            return delta.sum(1)
        return delta.norm(p=2, dim=1) if self.norm == "l2" else delta.abs().sum(1)

    def tolerance(self) -> float:
        """Largest norm still counted as inside: float32 rounding of sums over many pixels is no violation."""
        if self.norm == "l0":
            return self.radius
        return self.radius * (1 + (1e-6 if self.norm == "linf" else 1e-5)) + 1e-6

    def contains(self, images: Tensor, adversarial: Tensor) -> Tensor:
        """(N,) bool: finite, inside the box, inside the ball (up to rounding)."""
        near = self.distance(images, adversarial) <= self.tolerance()
        if not adversarial[:1].numel():
            return near
        flat = adversarial.flatten(1)
        return near & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)  # of what is not a number both are none

    # -- moving

    def project(self, images: Tensor, adversarial: Tensor, radii: Tensor | None = None) -> Tensor:
        """The nearest point (Euclidean) to ``adversarial`` inside ball and box; exact for all norms.

        ``images`` must lie in the box. radii: (N,) >= 0, a radius an image in place of ``eps``. Linf: clamping. L2 and
        L1: the dual variable is found by sorting the breakpoints of a piecewise quadratic or linear function (L1 with
        box: Croce & Hein 2021, Prop. 2.1). L0: the pixels whose change brings most nearer, counted in squares within
        the box (Croce & Hein 2019, eq. 4).
        """
        if self.norm == "l0":
            return _keep_pixels(images, adversarial, self.radius if radii is None else radii[:, None])
        if self.norm == "linf":
            delta = adversarial - images
            if radii is None:
                return (images + delta.clamp(-self.radius, self.radius)).clamp(0, 1)
            own = radii.to(images).view(-1, 1, 1, 1)
            return (images + delta.clamp(-own, own)).clamp(0, 1)
        origin = _wide(images).flatten(1)
        delta = _wide(adversarial).flatten(1) - origin
        size = delta.abs()
        cap = torch.where(delta > 0, 1 - origin, origin).clamp(min=0)  # how far the box lets each coordinate go
        radius = size.new_full((len(size), 1), self.radius) if radii is None else radii.to(size)[:, None]
        moved = _shrink_l2(size, cap, radius) if self.norm == "l2" else _shrink_l1(size, cap, radius)
        projected = (origin + delta.sign() * moved).to(images.dtype)
        # Rounded outward: back by one step of the dtype. On flat images all errors have one sign and add up.
        outward = (_wide(projected) - origin).abs() > moved
        projected = torch.where(outward, projected.nextafter(images.flatten(1)), projected)
        return projected.view_as(images).clamp(0, 1)

    def random_start(self, images: Tensor, rng: Draws) -> Tensor:
        """A uniform point of the ball around each image, then projected into the box. L0: uniform pixels anew."""
        if isinstance(rng, Several):
            return rng.each(self.random_start, images)
        radius, (count, size) = self.radius, images.flatten(1).shape
        if self.norm == "l0":
            return self._repainted(images, _uniform(images.shape, images, rng), rng)
        if self.norm == "linf":
            delta = _uniform(images.shape, images, rng) * (2 * radius) - radius
            return self.project(images, images + delta)
        if self.norm == "l2":
            direction = _normal((count, size), images, rng)
            direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
            length = _uniform((count, 1), images, rng) ** (1 / size)
        else:  # d + 1 exponentials, the last one dropped: uniform in the L1 ball
            raw = -torch.log(_uniform((count, size + 1), images, rng).clamp(min=1e-12))
            direction = raw[:, :size] / raw.sum(1, keepdim=True)
            direction = direction * (_uniform((count, size), images, rng) * 2 - 1).sign()
            length = torch.ones((count, 1), dtype=images.dtype, device=images.device)
        return self.project(images, images + (direction * length * radius).view_as(images))

    def random_corner(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """A random extreme point of ball and box.

        Linf: +-eps in every coordinate. L2: a random direction at full length. L1: coordinates in random order, each
        moved to a wall of the box until eps is spent. L0: eps random pixels, each channel at a wall.
        """
        if self.norm == "l0":
            return self._repainted(images, (_uniform(images.shape, images, rng) < 0.5).to(images.dtype), rng)
        if self.norm == "linf":
            return self.project(images, images + self.radius * (_uniform(images.shape, images, rng) * 2 - 1).sign())
        if self.norm == "l2":
            return self.project(images, images + self.radius * self.random_direction(images, rng))
        origin = images.flatten(1)
        order = _uniform(origin.shape, images, rng).argsort(1)
        upward = _uniform(origin.shape, images, rng) < 0.5
        room = torch.where(upward, 1 - origin, -origin)
        room = torch.where(room == 0, 1 - 2 * origin, room)  # at that wall already: the other way
        spent = room.abs().gather(1, order).double().cumsum(1)
        share = (self.radius - spent + room.abs().gather(1, order)).clamp(min=0)
        moved = torch.zeros_like(origin).scatter_(1, order, share.to(origin.dtype))
        moved = torch.minimum(moved, room.abs()) * room.sign()
        return self.project(images, images + moved.view_as(images))

    def _repainted(self, images: Tensor, paint: Tensor, rng: torch.Generator) -> Tensor:
        """``images`` with ``eps`` random pixels (all channels) taken from ``paint``."""
        flat = images.flatten(2)
        order = _uniform((len(images), flat.shape[2]), images, rng).argsort(1).argsort(1)
        return torch.where((order < self.radius)[:, None], paint.flatten(2), flat).view_as(images)

    def random_direction(self, images: Tensor, rng: Draws) -> Tensor:
        """A random direction of norm 1 for each image; not for L0, which has none."""
        if isinstance(rng, Several):
            return rng.each(self.random_direction, images)
        noise = _normal(images.shape, images, rng)
        if self.norm == "linf":
            return noise.sign()
        length: Tensor = noise.flatten(1).norm(p=1 if self.norm == "l1" else 2, dim=1).clamp(min=1e-12)
        return noise / length.view(-1, 1, 1, 1)

    def steepest(self, gradient: Tensor, adversarial: Tensor) -> Tensor:
        """The direction of norm 1 along which a linear function with this gradient rises most.

        Linf: the sign. L2: the normalised gradient. L1: the largest coordinates *that the box still lets move*,
        equally weighted (a saturated coordinate chosen again and again is why boxed L1-PGD stalls elsewhere).
        A zero gradient gives the zero direction. L0 has no such direction and raises :class:`UserError`.
        """
        if self.norm == "l0":
            raise UserError("l0 has no direction of steepest ascent; train in linf, l2 or l1")
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        if self.norm == "l2":
            # Scaled first: the squares of tiny gradients underflow.
            flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
            unit: Tensor = (flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)).view_as(gradient)
            return unit
        at = adversarial.flatten(1)
        movable = torch.where(flat > 0, at < 1, at > 0)
        size = flat.abs() * movable
        count = max(1, math.ceil(L1_SHARE * flat.shape[1]))
        top = size.topk(count, dim=1)
        chosen = torch.zeros_like(size).scatter_(1, top.indices, (top.values > 0).to(size.dtype))
        chosen = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
        return (flat.sign() * chosen).view_as(gradient)


def _keep_pixels(images: Tensor, adversarial: Tensor, count: float | Tensor) -> Tensor:
    """``images`` with the at most ``count`` pixels of ``adversarial`` (in the box) that bring most nearer to it."""
    boxed = adversarial.clamp(0, 1)
    gain = ((_wide(adversarial) - images).square() - (_wide(adversarial) - boxed).square()).sum(1).flatten(1)
    rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = (rank < count).view(len(images), 1, *images.shape[2:])
    return torch.where(kept, boxed, images)


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.device.type in ("cpu", "cuda") else values.float()


def _uniform(shape: tuple[int, ...], like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float32).to(like.device, like.dtype)


def _normal(shape: tuple[int, ...], like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, device=rng.device, dtype=torch.float32).to(like.device, like.dtype)


def _shrink_l2(size: Tensor, cap: Tensor, radius: Tensor) -> Tensor:
    """min(s * size, cap) with the largest s <= 1 whose L2 norm is at most ``radius`` (N, 1); (N, D) each.

    KKT of the projection: every coordinate is scaled by one s = 1 / (1 + lambda) and cut at its cap. The squared
    norm g(s) is quadratic between the sorted breakpoints cap / size.
    """
    boxed = torch.minimum(size, cap)
    outside = (boxed.square().sum(1, keepdim=True) > radius.square()).squeeze(1)
    if not outside.any():
        return boxed
    size, cap, radius = size[outside], cap[outside], radius[outside]
    ratio = torch.where(size > 0, cap / size.clamp(min=1e-300), torch.inf).clamp(max=1.0)
    breaks, order = ratio.sort(dim=1)
    squares, caps = size.square().gather(1, order), cap.square().gather(1, order)
    free = squares.sum(1, keepdim=True) - squares.cumsum(1) + squares  # not yet cut below break k
    cut = caps.cumsum(1) - caps
    value_at_break = breaks.square() * free + cut
    reached = value_at_break >= radius.square()
    reached[:, -1] = True  # true but for rounding: at the last break nothing is scaled and the norm is too large
    index = reached.to(torch.uint8).argmax(1, keepdim=True)  # first break at or past the radius
    # Cancellation in the running sums must not make the radicand negative.
    scale = ((radius.square() - cut.gather(1, index)).clamp(min=0) / free.gather(1, index).clamp(min=1e-300)).sqrt()
    # ... nor carry the scale out of its interval: between equal breaks the quotient above is all rounding.
    low = torch.where(index > 0, breaks.gather(1, (index - 1).clamp(min=0)), 0)
    scale = torch.minimum(torch.maximum(scale, low), breaks.gather(1, index))
    result = boxed.clone()
    result[outside] = torch.minimum(scale * size, cap)
    return result


def _shrink_l1(size: Tensor, cap: Tensor, radius: Tensor) -> Tensor:
    """clamp(size - lam, 0, cap) with the smallest lam >= 0 whose sum is at most ``radius`` (N, 1); (N, D) each.

    The sum is piecewise linear in lam: its slope falls by one where a coordinate leaves its cap (size - cap) and
    rises by one where it reaches zero (size).
    """
    boxed = torch.minimum(size, cap)
    outside = (boxed.sum(1, keepdim=True) > radius).squeeze(1)
    if not outside.any():
        return boxed
    size, cap, radius = size[outside], cap[outside], radius[outside]
    breaks = torch.cat([(size - cap).clamp(min=0), size], dim=1)
    change = torch.cat([-torch.ones_like(size), torch.ones_like(size)], dim=1)
    breaks, order = breaks.sort(dim=1, stable=True)
    slope = change.gather(1, order).cumsum(1)
    step = breaks.diff(dim=1, append=breaks[:, -1:])
    start = torch.minimum(size, cap).sum(1, keepdim=True)
    after = start + (slope * step).cumsum(1)  # the sum at the end of each interval
    reached = after <= radius
    reached[:, -1] = True  # true but for rounding: past the last break everything is zero
    index = reached.to(torch.uint8).argmax(1, keepdim=True)
    before = after.gather(1, index) - (slope * step).gather(1, index)
    # slope is 0 only where the interval changes nothing, and such an interval is never the first to pass the radius.
    lam = breaks.gather(1, index) + (before - radius).clamp(min=0) / (-slope.gather(1, index)).clamp(min=1)
    result = boxed.clone()
    result[outside] = torch.minimum((size - lam).clamp(min=0), cap)
    return result
