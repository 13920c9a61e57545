"""Active diagnostics: small attacks that tell whether gradients can be believed. A battery's numbers are not touched.

Every probe is an expectation that an honest network meets and a masked one does not. They run on few images, each
compares paired outcomes on the same images, and a difference counts when it passes its threshold *and* a paired test.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.ascent import Start, ascend
from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel, parse_eps
from scl_defense_benchmarks.catalogue import Flag, Severity, flagged, graded, one_sided
from scl_defense_benchmarks.forward import check_logits, decide, logits_of, margin
from scl_defense_benchmarks.native import Noise
from scl_defense_benchmarks.planted import plant

Depth = Literal["quick", "deep", "none"]
Loss = Callable[[Tensor, Tensor], Tensor]

ATTACKED = {"quick": 100, "deep": 200}  # images, rightly classified ones
BATCH = 50
STEPS, REL_STEP = 20, 0.25
FULL_RANGE_STEPS = 40
DRAWS = {"quick": 30, "deep": 10_000}
QUERIES = {"quick": 200, "deep": 1000}

ZERO_GRADIENT = (0.0, 0.05)  # share of images (auto-attack; Pintor et al. 2022)
NOT_RISING = (0.01, 0.10)
CONVERGED = (0.005, 0.02)  # Carlini et al. 2019
BEATEN_BY = 0.005
LOSSES = (0.03, 0.10)  # 0.025 seen on an honest adversarially trained network, 0.925 on logits x 1000
RESTARTS, MANY_RESTARTS = 0.05, 0.005
FULL_RANGE = 0.20
BLACK_BOX = (0.01, 0.05)
TOO_WEAK = 0.01
FEWEST = 3  # images: a share of fewer is an anecdote
NOISE_ONLY = 0.01
PLANTED = 0.80  # share that must be found; 0.96 is the lowest seen on an honest network
PLANTED_IMAGES = 50
SLOPES = (0.10, 0.50)  # share of images whose autograd gradient is not the slope
SLOPE_ERROR = 0.5
FINE, COARSE = 1e-3, 1e-2  # root mean square of a pixel's step in a finite difference
TINY = 1e-4  # the same for a change that a rounded input does not feel
STEPWISE = 0.10
SPREAD = 10.0  # largest minus smallest logit, where neither float32 nor the softmax is a problem
BY_CHANCE = 0.05  # of the paired tests


@torch.no_grad()
def probe(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: torch.Generator,
    depth: Depth = "quick",
    robust: Tensor | None = None,
) -> list[Flag]:
    """Attack a few images on purpose, to see whether gradients and attacks behave as they must.

    network: (N, C, H, W) in [0, 1] -> logits (N, K), given back unchanged. images, labels: those of the evaluation;
    the first 100 (``deep``: 200) that are classified rightly are used. threat: the main ball. rng: every draw comes
    from it. robust: (N,) bool, images that the battery has left unbroken in that ball: what the probes break of them,
    the battery was too weak for. A network that answers randomly is only called so: no comparison on it means anything.
    """
    if depth == "none" or len(images) == 0:
        return []
    with frozen(network):
        before = state_of(network)
        with _watch_autograd() as inner:
            logits = logits_of(network, images)
            repeated = logits_of(network, images)
        flags = same_state(before, state_of(network))
        if inner:
            flags.append(flagged("gradient-in-forward", f"The forward pass asked for gradients {len(inner)} times."))
        if not torch.equal(decide(logits), decide(repeated)):
            return [*flags, flagged("random-forward", "The network answers the same images differently each time.")]
        right = (decide(logits) == labels).nonzero().squeeze(1)[: ATTACKED[depth]]
        if len(right) == 0:
            return flags
        images, labels = images[right], labels[right]
        robust = None if robust is None else robust.to(images.device)[right]
        trial = _Trial(network, images, labels.long(), rng, logits.shape[1])
        flags += _gradients(trial)
        if any(flag.id == "cut-gradient" for flag in flags):
            return flags  # nothing can be climbed; the battery's own attacks without gradients decide
        try:
            flags += _slopes(trial)
            if threat.radius > 0 and threat.norm in ("linf", "l2", "l1"):
                flags += _behaviour(trial, threat, depth, robust)
        except Exception as error:  # an examination beside the battery must not end it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            flags.append(flagged("probe-failed", f"The probes stopped: {reason}."))
    return flags


@dataclass
class _Trial:
    """Images that are classified rightly, and what is needed to attack them. nonfinite: images that met a NaN."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    rng: torch.Generator
    classes: int
    nonfinite: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.nonfinite = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)

    def part(self, chosen: Tensor) -> "_Trial":
        return _Trial(self.network, self.images[chosen], self.labels[chosen], self.rng, self.classes)

    def broken(self, examples: Tensor) -> Tensor:
        return decide(logits_of(self.network, examples)) != self.labels


@dataclass
class _Climb:
    """One ascent. broken: at its last point. ever: at any point. first, last: loss at the images and at the end."""

    end: Tensor
    broken: Tensor
    ever: Tensor
    first: Tensor
    last: Tensor


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _unsaturated(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the logits brought to one spread: no temperature reaches it."""
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
    return _cross_entropy(logits * (SPREAD / spread.clamp(min=torch.finfo(logits.dtype).tiny)), labels)


def _climb(
    trial: _Trial,
    threat: ThreatModel,
    loss: Loss,
    steps: int | None = None,
    rel_step: float | None = None,
    start: Start = "uniform",
) -> _Climb:
    """Ascend, and look at every point on the way."""
    ever = torch.zeros_like(trial.labels, dtype=torch.bool)

    def objective(labels: Tensor, seen: Tensor) -> Callable[[Tensor], Tensor]:
        def values(points: Tensor) -> Tensor:
            logits = check_logits(trial.network(points), len(points)).float()
            seen.logical_or_(decide(logits.detach()) != labels)
            return loss(logits, labels)

        return values

    ends = []
    for place in range(0, len(trial.images), BATCH):
        images, labels = trial.images[place : place + BATCH], trial.labels[place : place + BATCH]
        begin: Start = start[place : place + BATCH] if isinstance(start, Tensor) else start
        found = ascend(
            objective(labels, ever[place : place + BATCH]),
            images,
            threat,
            steps=STEPS if steps is None else steps,
            rel_step=REL_STEP if rel_step is None else rel_step,
            start=begin,
            rng=trial.rng,
        )
        ends.append(found)
    end = torch.cat(ends)
    logits = logits_of(trial.network, end)
    trial.nonfinite |= ~logits.isfinite().all(1)
    broken = decide(logits) != trial.labels
    first = loss(logits_of(trial.network, trial.images), trial.labels)
    return _Climb(end, broken, ever | broken, first, loss(logits, trial.labels))


# -- gradients


def _gradient(trial: _Trial, points: Tensor, loss: Loss) -> Tensor | None:
    """d loss / d image per image, shaped as ``points``; ``None`` where no graph leads to the images."""
    found = []
    for place in range(0, len(points), BATCH):
        inputs = points[place : place + BATCH].detach().clone().requires_grad_()
        with torch.enable_grad():
            values = loss(trial.network(inputs).float(), trial.labels[place : place + BATCH])
            if not values.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
        if gradient is None:
            return None
        found.append(gradient)
    return torch.cat(found)


def _gradients(trial: _Trial) -> list[Flag]:
    """Cut, zero, NaN or infinite at the images."""
    try:
        gradient = _gradient(trial, trial.images, _cross_entropy)
    except (RuntimeError, NotImplementedError) as error:  # inference mode, an operator without a backward pass
        return [flagged("cut-gradient", f"The backward pass fails: {' '.join(str(error).split())[:120]}.")]
    if gradient is None:
        return [flagged("cut-gradient", "No gradient leads from the logits back to the images.")]
    flags, flat, n = [], gradient.flatten(1), len(gradient)
    if wrong := int((~flat.isfinite()).any(1).sum()):
        what = f"The loss has NaN or infinite gradients for {wrong} of {n} images."
        flags.append(flagged("not-finite-gradient", what, measured=wrong / n, threshold=0.0))
    zero = (flat == 0).all(1).double().mean().item()
    if grade := graded(zero, ZERO_GRADIENT):
        what = f"The gradient of the cross-entropy is exactly zero for {round(zero * n)} of {n} images."
        flags.append(flagged("zero-gradient", what, grade[0], measured=zero, threshold=grade[1]))
    return flags


def _slopes(trial: _Trial) -> list[Flag]:
    """Finite differences of the margin against autograd, and a change that a rounded input does not feel."""
    flags = []
    count = min(len(trial.images), BATCH)
    chosen = trial.part(torch.arange(count, device=trial.images.device))
    points = chosen.images.clamp(2 * COARSE, 1 - 2 * COARSE)  # a network may clamp: no step may leave the box
    noise = torch.randn(points.shape, generator=chosen.rng, device=chosen.rng.device).to(points)
    with torch.no_grad():
        still = logits_of(chosen.network, points)
        felt = [(logits_of(chosen.network, points + sign * TINY * noise) != still).any(1) for sign in (-1, 1)]
    unfelt = (~(felt[0] | felt[1])).double().mean().item()
    if unfelt > STEPWISE:
        what = (
            f"{round(unfelt * count)} of {count} images give the very same logits after a change of {TINY:g} a pixel."
        )
        flags.append(flagged("stepwise-output", what, measured=unfelt, threshold=STEPWISE))
    gradient = _gradient(chosen, points, margin)
    if gradient is None:
        return flags
    flat = gradient.flatten(1).double()
    length = flat.norm(dim=1)
    if not bool((length.isfinite() & (length > 0)).any()):
        return flags  # zero or NaN everywhere: said already
    wrong = torch.ones(count, dtype=torch.bool, device=points.device)
    for rms in (FINE, COARSE):
        step = rms * points[0].numel() ** 0.5
        direction = (flat / length.clamp(min=1e-300)[:, None]).nan_to_num()
        # No pixel further than the margin left above: the linear prediction is made for the step that is taken.
        move = (step * direction).clamp(-2 * COARSE, 2 * COARSE)
        up, down = ((points.flatten(1) + sign * move).to(points).view_as(points) for sign in (1, -1))
        rise = _margins(chosen, up) - _margins(chosen, down)
        expected = 2 * (flat * move).sum(1)
        error = (rise - expected).abs() / torch.maximum(rise.abs(), expected.abs()).clamp(min=1e-300)
        wrong &= ~(error <= SLOPE_ERROR)
    share = wrong.double().mean().item()
    if grade := graded(share, SLOPES):
        what = f"Autograd's gradient is not the slope of the margin for {int(wrong.sum())} of {count} images."
        flags.append(flagged("gradient-disagrees", what, grade[0], measured=share, threshold=grade[1]))
    return flags


def _margins(trial: _Trial, points: Tensor) -> Tensor:
    return margin(logits_of(trial.network, points).double(), trial.labels)


# -- how attacks behave


def _behaviour(trial: _Trial, threat: ThreatModel, depth: Depth, robust: Tensor | None) -> list[Flag]:
    flags, n = [], len(trial.images)
    nothing = ThreatModel(threat.norm, "0")
    if changed := int(trial.broken(nothing.random_start(trial.images, trial.rng)).sum()):
        what = f"With eps = 0 an attack breaks {changed} of {n} images."
        flags.append(flagged("zero-eps-not-clean", what, measured=changed / n, threshold=0.0))
    single = _climb(trial, threat, _cross_entropy, steps=1, rel_step=1.0, start="zero")
    entropy = _climb(trial, threat, _cross_entropy)
    flags += _worse("one-step-beats-many", single.broken, entropy.broken, (BEATEN_BY, BEATEN_BY), "One step", "PGD")
    flags += _rising(entropy)
    if silent := int((entropy.ever & ~entropy.broken).sum()):
        what = f"PGD passed a wrong label on {silent} of {n} images and lost it again."
        flags.append(flagged("silent-success", what, measured=silent / n, threshold=0.0))
    longer = _on_survivors(
        trial, entropy.ever, lambda rest, left: _climb(rest, threat, _cross_entropy, start=left), entropy
    )
    flags += _worse("steps-not-converged", longer, entropy.ever, CONVERGED, f"{2 * STEPS} steps", f"{STEPS}")
    by_margin = _climb(trial, threat, margin)
    flags += _losses(trial, threat, longer, by_margin.ever)
    white = single.broken | longer | by_margin.ever
    again = white.clone()
    starts = [again.clone()]
    for _ in range(9 if depth == "deep" else 3):
        again = _on_survivors(trial, again, lambda rest, left: _climb(rest, threat, margin))
        starts.append(again.clone())
    flags += _worse("restarts-matter", again, white, (RESTARTS, 1.0), f"{len(starts)} starts", "one")
    if depth == "deep":
        flags += _worse("restarts-matter", starts[-1], starts[4], (MANY_RESTARTS, 1.0), "10 starts", "5")
        flags += _planted(trial, threat)
    white = again
    double = _twice(threat)
    wider = _climb(trial, double, _cross_entropy).ever
    flags += _worse("budget-not-monotone", entropy.ever, wider, (BEATEN_BY, BEATEN_BY), f"eps {threat.eps}", double.eps)
    flags += _full_range(trial, threat)
    flags += _without_gradients(trial, threat, white, depth)
    if robust is not None:
        flags += _too_weak(white & robust)
    if met := int(trial.nonfinite.sum()):
        what = f"The network returns NaN or infinite logits inside the ball of {met} of {n} images."
        flags.append(flagged("not-finite-logits", what, "warning", measured=met / n, threshold=0.0))
    return flags


def _too_weak(missed: Tensor) -> Iterator[Flag]:
    """missed: (N,) images that the battery has left and a probe has broken, in the same ball."""
    share = missed.double().mean().item()
    if share > TOO_WEAK and int(missed.sum()) >= FEWEST:
        what = f"Short probes break {int(missed.sum())} of {len(missed)} images that the whole battery has left."
        yield flagged("battery-too-weak", what, measured=share, threshold=TOO_WEAK)


def _planted(trial: _Trial, threat: ThreatModel) -> Iterator[Flag]:
    """Examples that are known to be there, on the network's own features, and are not found."""
    outcome = plant(trial.network, trial.images[:PLANTED_IMAGES], threat, trial.rng)
    if outcome is None or outcome.posed < FEWEST:
        return
    share = outcome.found / outcome.posed
    if share < PLANTED:
        what = (
            f"The ascent finds a planted adversarial example for {outcome.found} of {outcome.posed} images "
            f"(noise: {outcome.chance})."
        )
        yield flagged("planted-not-found", what, measured=share, threshold=PLANTED)


def _on_survivors(
    trial: _Trial, broken: Tensor, attack: Callable[[_Trial, Tensor], _Climb], climb: _Climb | None = None
) -> Tensor:
    """``broken`` and what ``attack`` breaks of the rest; it is handed the rest, and where ``climb`` ended there."""
    left = (~broken).nonzero().squeeze(1)
    if len(left) == 0:
        return broken
    found = attack(trial.part(left), (trial.images if climb is None else climb.end)[left])
    together = broken.clone()
    together[left] |= found.ever
    return together


def _worse(
    id: str, winner: Tensor, loser: Tensor, limits: tuple[float, float], name: str, other: str
) -> Iterator[Flag]:
    """A flag when ``winner`` breaks more than ``loser`` does, both (N,) bool, and that is no chance."""
    gap = float(winner.double().mean() - loser.double().mean())
    grade = graded(gap, limits)
    only, lost = int((winner & ~loser).sum()), int((loser & ~winner).sum())
    if grade is None or one_sided(only, lost) >= BY_CHANCE:
        return
    what = f"{name} breaks {int(winner.sum())} of {len(winner)} images, {other} {int(loser.sum())}."
    yield flagged(id, what, _severity(id, grade[0]), measured=gap, threshold=grade[1])


def _severity(id: str, wanted: Severity) -> Severity:
    from scl_defense_benchmarks.catalogue import CATALOGUE

    return wanted if wanted in CATALOGUE[id].severities else CATALOGUE[id].severities[0]


def _rising(climb: _Climb) -> Iterator[Flag]:
    # Cross-entropy below the resolution of float32 cannot be seen to rise; the margin and the scale answer there.
    stuck = ~climb.ever & ~(climb.last > climb.first) & (climb.first > torch.finfo(torch.float32).eps)
    share = stuck.double().mean().item()
    grade = graded(share, NOT_RISING)
    if grade and int(stuck.sum()) >= FEWEST:
        what = f"After {STEPS} steps the loss is no higher than before on {int(stuck.sum())} of {len(stuck)} images."
        yield flagged("loss-not-rising", what, grade[0], measured=share, threshold=grade[1])


def _losses(trial: _Trial, threat: ThreatModel, entropy: Tensor, by_margin: Tensor) -> list[Flag]:
    """Cross-entropy against the margin; where they differ, the scale of the logits is tried as the reason."""
    flags = list(_worse("loss-disagreement", by_margin, entropy, LOSSES, "The margin loss", "cross-entropy"))
    logits = logits_of(trial.network, trial.images)
    spread = (logits.amax(1) - logits.amin(1)).median().item()
    if flags or not 0.1 * SPREAD <= spread <= 10 * SPREAD:
        scaled = _climb(trial, threat, _unsaturated).ever
        name = f"Cross-entropy of logits with spread {SPREAD:g}"
        flags += _worse("scaled-logits", scaled, entropy, LOSSES, name, f"of these (spread {spread:.3g})")
    return flags


def _twice(threat: ThreatModel) -> ThreatModel:
    eps = 2 * parse_eps(threat.eps)
    if threat.norm == "linf":
        eps = min(eps, parse_eps("1"))
    return ThreatModel(threat.norm, f"{float(eps):.6g}")


def _full_range(trial: _Trial, threat: ThreatModel) -> Iterator[Flag]:
    size = trial.images[0].numel()
    whole = ThreatModel(threat.norm, {"linf": "1", "l2": f"{size**0.5:.6f}", "l1": str(size)}[threat.norm])
    at = trial.images
    for _ in range(FULL_RANGE_STEPS):
        # By the gradient alone: the common ascent leaves a flat place in a random direction, and noise as large as
        # this breaks anything.
        gradient = _gradient(trial, at, _cross_entropy)
        if gradient is not None:
            at = whole.project(at, at + REL_STEP * whole.radius * whole.steepest(gradient.nan_to_num(), at))
    left = 1 - trial.broken(at).double().mean().item()
    chance = 1 / trial.classes
    limit = min(chance + 3 * (chance * (1 - chance) / len(trial.images)) ** 0.5, FULL_RANGE)
    if left > limit:
        what = f"PGD that may change an image into any other leaves {left:.1%} of {len(trial.images)} unbroken."
        yield flagged("full-range-not-zero", what, measured=left, threshold=limit)


def _without_gradients(trial: _Trial, threat: ThreatModel, white: Tensor, depth: Depth) -> list[Flag]:
    """Noise and a short Square attack on what every gradient attack left."""
    left = (~white).nonzero().squeeze(1)
    n = len(white)
    if len(left) == 0:
        return []
    rest, flags = trial.part(left), []
    noisy = rest.broken(Noise(draws=DRAWS[depth])(rest.network, rest.images, rest.labels, threat, trial.rng))
    if (alone := int(noisy.sum())) > NOISE_ONLY * n and alone >= 3:
        what = f"Random noise breaks {alone} of {n} images that no gradient attack breaks."
        stronger = alone > int(white.sum())
        severity: Severity = "error" if stronger else "warning"
        flags.append(flagged("noise-beats-gradient", what, severity, measured=alone / n, threshold=NOISE_ONLY))
    if threat.norm in ("linf", "l2"):
        from scl_defense_benchmarks.torchattacks_adapter import Square

        attack = Square(queries=QUERIES[depth])
        made = attack(rest.network, rest.images, rest.labels, threat, trial.rng)
        inside = threat.contains(rest.images, made)
        alone = int((rest.broken(made) & inside).sum())
        if alone >= 3 and (grade := graded(alone / n, BLACK_BOX)):
            what = f"A search without gradients breaks {alone} of {n} images that no gradient attack breaks."
            measured = {"measured": alone / n, "threshold": grade[1]}
            flags.append(flagged("black-box-beats-white-box", what, grade[0], **measured))
    return flags


# -- the network's state


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Every weight and buffer, copied."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[Flag]:
    """A flag where answering has changed what :func:`state_of` saw before."""
    names = [name for name in after if name not in before or not _equal(before[name], after[name])]
    if not names:
        return []
    what = f"Answering in eval mode changed {len(names)} weights or buffers, the first is '{names[0]}'."
    return [flagged("state-changes", what, measured=len(names), threshold=0.0)]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


@contextmanager
def _watch_autograd() -> Iterator[list[str]]:
    """Counts calls of autograd made inside (as auto-attack's check_dynamic does)."""
    calls: list[str] = []

    def watched(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    grad, backward = torch.autograd.grad, torch.autograd.backward
    torch.autograd.grad, torch.autograd.backward = watched("grad", grad), watched("backward", backward)  # type: ignore
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward = grad, backward
