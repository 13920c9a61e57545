"""The contract of generators: what the core, and everybody who compares methods, relies on."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.errors import UserError
from scl_defense.models import Network
from scl_defense.runtime import stream
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import (
    COMPONENT_CHECKS,
    Check,
    CheckResult,
    Fault,
    applies_if,
    examine,
    expect,
    expect_unmoved,
    one_line,
    same,
    several,
)
from scl_defense.testing._generator_trials import Trials
from scl_defense.threat import ThreatModel
from scl_defense.types import NEEDS, Batch


def check_generator(component: Any, name: str | None = None) -> list[CheckResult]:
    """Run the contract test on a generator: an instance, or a class (with its default options)."""
    return examine(component, name, GENERATOR_CHECKS, Trials)


# -- what comes back


def check_needs_declared(trials: Trials) -> None:
    """``needs`` is a subset of {"embed", "logits", "labels", "checkpoint"} and nothing else is touched: what the table
    of results calls model-free or label-free must be so.
    """
    needs: Any = getattr(trials.component, "needs", None)
    legal = isinstance(needs, (set, frozenset)) and needs <= NEEDS
    expect(legal, f"needs is {needs!r}; it must be a frozenset out of {', '.join(sorted(NEEDS))}")
    undeclared = sorted(trials.touched(frozenset(needs)) - needs)
    if undeclared:
        raise Fault(f"it used context.{undeclared[0]}, which its needs do not declare")


def check_returns_views(trials: Trials) -> None:
    """The output is (A, N, C, H, W): adversarial view a belongs to ``batch.views[a % V]``."""
    for trial in trials.grid:
        got = tuple(trial.output.shape) if isinstance(trial.output, Tensor) else type(trial.output).__name__
        wanted = f"(A, {', '.join(map(str, trial.views.shape[1:]))})"
        expect(trial.shaped, f"it returned {got}, not {wanted} ({trial.where})")


def check_dtype_and_device(trials: Trials) -> None:
    """The output has the views' dtype and lies on their device: it is put beside them without a conversion."""
    for trial in trials.tensors:
        out, views = trial.output, trial.views
        matches = out.dtype == views.dtype and out.device == views.device
        expect(matches, f"it returned {out.dtype} on {out.device}, not {views.dtype} on {views.device}")


def check_finite(trials: Trials) -> None:
    """No NaN, no infinity: one of them ends the run."""
    for trial in trials.tensors:
        expect(bool(trial.output.isfinite().all()), f"it returned NaN or infinite images ({trial.where})")


def check_inside_box(trials: Trials) -> None:
    """Every pixel lies in [0, 1]: what is outside is no image."""
    for trial in trials.shaped:
        flat = trial.flat
        inside = flat.numel() == 0 or bool(flat.min() >= 0 and flat.max() <= 1)
        expect(inside, f"it left the box [0, 1] ({trial.where})")


def check_inside_ball(trials: Trials) -> None:
    """Every adversarial view lies in the threat ball around its view: the eps that is reported is the one used."""
    for trial in trials.shaped:
        if trial.flat.numel():
            furthest = float(trial.threat.distance(trial.origin, trial.flat).max())
            expect(furthest <= trial.threat.tolerance(), f"it left the ball: distance {furthest:.6g} ({trial.where})")


def check_detached(trials: Trials) -> None:
    """The output carries no graph: training must not differentiate through the attack by accident."""
    for trial in trials.tensors:
        expect(not trial.output.requires_grad, f"the output is attached to a graph; return it detached ({trial.where})")


# -- what is left alone


def check_batch_untouched(trials: Trials) -> None:
    """Views, images, indices, labels and the calibration sample are not written to: the trainer still needs them."""
    for trial in trials.grid:
        if trial.mutated:
            raise Fault(f"it wrote into {several(trial.mutated)} ({trial.where})")


def check_network_untouched(trials: Trials) -> None:
    """Weights, gradients, requires_grad, buffers (batch-norm statistics) and every layer's train/eval mode stay."""
    applies_if(trials.needs & {"embed", "logits"})
    for trial in trials.grid:
        if trial.disturbed:
            raise Fault(f"it changed {several(trial.disturbed)} ({trial.where})")


def check_global_state(trials: Trials) -> None:
    """Randomness comes from ``context.rng`` and ``context.stream`` alone: global generators are neither moved nor read
    (two runs of one seed would differ), and torch's settings stay.
    """
    for trial in trials.grid:
        expect_unmoved(trial.moved)
    first, again = (trials.call(worlds.batch_of(), global_seed=seed) for seed in (1, 2))
    applies_if(trials.repeatable)
    expect(same(first.output, again.output), "its output depends on a global random state; draw from context.rng")


# -- repeating


def check_deterministic(trials: Trials) -> None:
    """The same batch, context and seed give the same bits: a run can be repeated."""
    expect(trials.repeatable, "two calls with the same seed differ; draw from context.rng and keep no state")


def check_cache_is_no_state(trials: Trials) -> None:
    """A step gives the same with a fresh ``context.cache`` as after other steps: the cache is not in the checkpoint, so
    a resumed run starts with an empty one and must end with the same weights.
    """
    applies_if(trials.repeatable)
    cache: dict[Any, Any] = {}
    for epoch, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        trials.call(worlds.batch_of(seed=10 + step), epoch=epoch, step=step, cache=cache)
    warm = trials.output(worlds.batch_of(), epoch=1, step=2, cache=cache)
    fresh = trials.output(worlds.batch_of(), epoch=1, step=2)
    expect(same(warm, fresh), "its output depends on what earlier steps left in context.cache; a resumed run has none")


def check_seed_matters(trials: Trials) -> None:
    """Where chance plays a part, another seed gives another result: seeds are what studies average over.

    A generator that treats equal images equally is deterministic by nature, and passes.
    """
    first, again = (trials.call(worlds.batch_of(copies=True), seed=seed, global_seed=seed) for seed in (0, 1))
    applies_if(trials.repeatable and first.shaped and again.shaped and len(first.output))
    moved = (first.flat - first.origin).view(first.output.shape)
    spread = (moved - moved[:, :1]).abs().mean()
    by_chance = bool(spread > 0.1 * moved.abs().mean())
    fixed = by_chance and same(first.output, again.output)
    expect(not fixed, "equal images are changed differently, yet another seed changes nothing; draw from context.rng")


# -- limits


def check_eps_zero_is_identity(trials: Trials) -> None:
    """With eps = 0 the views come back unchanged, whatever the norm."""
    for norm in ("linf", "l2", "l1"):
        trial = trials.call(worlds.batch_of(), ThreatModel(norm, "0"))
        if trial.shaped and trial.flat.numel():
            furthest = float((trial.flat - trial.origin).abs().max())
            expect(furthest <= 1e-6, f"with {trial.threat} it moved a pixel by {furthest:.6g}")


def check_model_free(trials: Trials) -> None:
    """With ``needs`` empty of embed and logits, no network has any say: the same output for two networks and for none,
    so it works before the first step and what it makes can be stored.
    """
    applies_if(not trials.needs & {"embed", "logits"} and trials.repeatable)
    without = trials.output(worlds.batch_of(), network=None)
    for seed in (1, 2):
        other = trials.output(worlds.batch_of(), network=worlds.lived_in_network(worlds.GREY, seed=seed))
        expect(same(without, other), "it declares no network, yet its output changes with the network")


def check_label_free(trials: Trials) -> None:
    """Without ``labels`` in ``needs`` the output does not change with the labels."""
    applies_if("labels" not in trials.needs and trials.repeatable)
    batch = worlds.batch_of()
    relabelled = replace(batch, labels=(batch.labels + 1) % worlds.CLASSES)
    equal = same(trials.output(worlds.batch_of()), trials.output(relabelled))
    expect(equal, "it declares no labels, yet its output changes with them")


def check_constant_images(trials: Trials) -> None:
    """Black, white and grey images, all alike, give finite images: gradients vanish there and lengths become zero."""
    for threat in worlds.THREATS:
        for value in (0.0, 1.0, 0.5):
            batch = worlds.batch_of(4)
            views, images = torch.full_like(batch.views, value), torch.full_like(batch.images, value)
            output = trials.output(replace(batch, views=views, images=images), threat)
            finite = not isinstance(output, Tensor) or bool(output.isfinite().all())
            expect(finite, f"on images that are {value:g} everywhere it returned NaN or infinite values ({threat})")


def check_by_row(trials: Trials) -> None:
    """With ``by_row`` an image gets the same adversarial views whether all images are there or, as under ``torchrun``,
    some of them: others are looked at through ``context.gather`` alone, and draws are one row an image.
    """
    applies_if(getattr(trials.component, "by_row", False) and trials.repeatable)
    for threat in worlds.THREATS:
        batch, told = worlds.batch_of(7), list[Tensor]()

        def gather(values: Tensor, told: list[Tensor] = told) -> Tensor:
            told.append(values)
            return values

        whole = trials.call(batch, threat, gather=gather)
        applies_if(whole.shaped and len(whole.output))
        some = Batch(batch.views[:, 3:], batch.labels[3:], batch.images[3:], batch.indices[3:])
        theirs = iter(told)

        def again(values: Tensor, theirs: Iterator[Tensor] = theirs) -> Tensor:
            return next(theirs, values)

        part = trials.call(some, threat, gather=again, rows=(3, 7))
        alike = part.shaped and len(part.output) == len(whole.output)
        # A sign may turn where a gradient is next to nothing: a pixel, never an image.
        moved = (whole.flat - whole.origin).abs().mean()
        apart = (part.output - whole.output[:, 3:]).abs().mean() if alike else moved
        expect(
            alike and bool(apart <= 0.02 * moved + 1e-7),
            f"by_row is declared, but what it makes of an image changes with the others ({threat}); use gather, "
            "draw a row an image from context.rng, or leave by_row out",
        )


def check_one_view(trials: Trials) -> None:
    """With a single view (as for a plain classifier) it works, or says in one line of :class:`UserError` what to do."""
    _works_or_explains(trials, worlds.batch_of(views=1), "a batch with one view")


def check_one_image(trials: Trials) -> None:
    """With a single image it works, or says in one line of :class:`UserError` what to do."""
    _works_or_explains(trials, worlds.batch_of(1), "a batch of one image")


def _works_or_explains(trials: Trials, batch: Batch, what: str) -> None:
    try:
        trials.call(batch)
    except UserError as error:
        expect("\n" not in str(error).strip(), f"for {what} its error has several lines")
    except Exception as error:
        raise Fault(f"for {what} {one_line(error)}; raise UserError saying what is needed") from None


# -- doing its job


def check_beats_corner_noise(trials: Trials) -> None:
    """A generator that needs the network moves it further than random corner noise of the same eps does: it raises the
    cross-entropy (logits and labels), or moves the logits or the embedding further from those of the image.
    """
    applies_if(trials.needs & {"embed", "logits"})
    network = worlds.linear_network(worlds.GREY, worlds.CLASSES)
    batch = worlds.batch_of(16)
    with torch.no_grad():
        batch = replace(batch, labels=network(batch.views[0]).argmax(1))
    trial = trials.call(batch, network=network)
    applies_if(trial.shaped and len(trial.output))
    view, rng = batch.views[0], stream(0, "corner noise")
    corners = [worlds.LINF.random_corner(view, rng) for _ in range(8)]
    noise = sum(_moved(trials.needs, network, view, batch.labels, corner) for corner in corners) / len(corners)
    reached = _moved(trials.needs, network, view, batch.labels, trial.flat[: len(view)])
    expect(reached > noise, f"it reaches {reached:.4g} where random corner noise reaches {noise:.4g}")


@torch.no_grad()
def _moved(needs: frozenset[str], network: Network, images: Tensor, labels: Tensor, adversarial: Tensor) -> float:
    if {"logits", "labels"} <= needs:
        return float(F.cross_entropy(network(adversarial), labels))
    forward = network.logits if "logits" in needs else network.embed
    return float((forward(adversarial) - forward(images)).norm(dim=1).mean())


def check_linear_optimum(trials: Trials) -> None:
    """On a linear classifier of two classes the best Linf point is known (every pixel goes eps against its weight, up
    to the box): with ten steps a generator that uses logits and labels gains at least 99 % of it.
    """
    iterative = is_dataclass(trials.component) and "steps" in {option.name for option in fields(trials.component)}
    applies_if({"logits", "labels"} <= trials.needs and iterative)
    ten = Trials(replace(trials.component, steps=10), trials.name)
    network = worlds.linear_network(worlds.GREY, 2)
    batch = worlds.batch_of(8)
    batch = replace(batch, labels=torch.arange(8) % 2)
    trial = ten.call(batch, network=network)
    applies_if(trial.shaped and len(trial.output))
    slope = worlds.slopes(network)[1] - worlds.slopes(network)[0]
    upward = torch.where(batch.labels[:, None] == 0, slope, -slope).sign().view_as(batch.views[0])
    best = (batch.views[0] + worlds.LINF.radius * upward).clamp(0, 1)
    clean, reached, limit = (worlds.margins(network, at, batch.labels) for at in (batch.views[0], trial.flat[:8], best))
    share = float(((reached - clean) / (limit - clean)).mean())
    expect(share >= 0.99, f"after ten steps it has gained {share:.1%} of the optimum on a linear classifier, not 99 %")


GENERATOR_CHECKS: tuple[Check, ...] = (
    *COMPONENT_CHECKS,
    check_needs_declared,
    check_returns_views,
    check_dtype_and_device,
    check_finite,
    check_inside_box,
    check_inside_ball,
    check_detached,
    check_batch_untouched,
    check_network_untouched,
    check_global_state,
    check_deterministic,
    check_cache_is_no_state,
    check_seed_matters,
    check_eps_zero_is_identity,
    check_model_free,
    check_label_free,
    check_constant_images,
    check_by_row,
    check_one_view,
    check_one_image,
    check_beats_corner_noise,
    check_linear_optimum,
)
