"""Every diagnostic: what it means, its threshold and where that comes from, and what to do. No torch is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Severity = Literal["error", "warning", "info"]
LETTERS = {"error": "E", "warning": "W", "info": "I"}


@dataclass(frozen=True)
class Diagnostic:
    """One kind of fault.

    severities: those it can have, the graver first. about: ``measurement`` (an error means that no number of this
    evaluation says anything), ``masking`` (the true robustness may be lower), ``attack`` (one attack's own number) or
    ``note``. threshold: in words. tests: the checks of the published checklists that it carries out, T1 to T28.
    """

    id: str
    severities: tuple[Severity, ...]
    about: Literal["measurement", "masking", "attack", "note"]
    threshold: str
    source: str
    why: str
    remedy: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """severity: ``error`` invalidates a number, ``warning`` makes it doubtful, ``info`` should be known.

    attacks: labels it is about, or none. measured, threshold: the value and the limit it passed, where it is a number.
    """

    id: str
    severity: Severity
    what: str
    why: str
    remedy: str
    attacks: tuple[str, ...] = ()
    measured: float | None = None
    threshold: float | None = None


_CARLINI = "Carlini et al. 2019, On evaluating adversarial robustness"
_IOAF = "Pintor et al. 2022, Indicators of attack failure"
_AUTOATTACK = "Croce & Hein 2020, auto-attack/checks.py"
_OWN = "ours, from a calibration on small networks (see the page)"

_ENTRIES = (
    # The network and its images
    Diagnostic(
        "not-finite-logits", ("error", "warning"), "measurement",
        "any clean image (error), any point inside the ball (warning)", "no comparison with NaN is true",
        "No comparison with such an output means anything.",
        "Check the weights and the range and normalisation of the images.", ("T1",),
    ),
    Diagnostic(
        "clean-accuracy-at-chance", ("error",), "measurement", "chance + 3 sigma", _CARLINI,
        "Nothing can be said about the robustness of a network that does not work on these images.",
        "Check the weights, the order of the classes, the pixel range and the normalisation.", ("T2",),
    ),
    Diagnostic(
        "clean-accuracy-not-as-recorded", ("error",), "measurement", "0.02 + 3 sigma", _CARLINI,
        "The network, its data or its preparation is not the one that was trained.",
        "Check data, weights, pixel range and normalisation against the training run.", ("T2",),
    ),
    Diagnostic(
        "image-range", ("warning",), "measurement", "largest pixel at most 0.05", _OWN,
        "Images that were divided by 255 twice are nearly black, and eps then covers them whole.",
        "Give pixels in [0, 1], divided by 255 once.", ("T2",),
    ),
    Diagnostic(
        "label-order", ("error",), "measurement",
        "0.10 more on images that did not choose the order, p < 0.01 over all trials", _OWN,
        "The classes stand in another order in the network than in the data: right answers are counted as wrong.",
        "Give the order with --label-map, or the data it was trained on.", ("T2",),
    ),
    Diagnostic(
        "normalisation", ("error",), "measurement",
        "0.10 more clean accuracy with a usual preparation, p < 0.01 over all trials", _OWN,
        "The network expects its images prepared otherwise; what is attacked is not the network that was trained.",
        "Put that preparation in front of the network (--mean and --std).", ("T2",),
    ),
    Diagnostic(
        "train-mode", ("error",), "measurement", "any module", "RobustBench's warning; F.batch_norm",
        "Batch statistics or dropout are in use: an example fools another network than the one that is deployed.",
        "Let eval() reach every module: do not override train(), pass training=self.training.", ("T3",),
    ),
    Diagnostic(
        "state-changes", ("error",), "measurement", "any bit of a weight or buffer", "RobustBench's warning",
        "A network that changes while it answers is another one after every question.",
        "Write to no buffer or weight in eval mode.", ("T3",),
    ),
    Diagnostic(
        "random-forward", ("error",), "measurement", "1e-4 between unit-length logits, or another label", _AUTOATTACK,
        "An attack and our check see different networks, and one lucky draw counts as robustness.",
        "Evaluate without its randomness, or with an attack that averages over it (expectation over transformation).",
        ("T5",),
    ),
    Diagnostic(
        "batch-dependent-forward", ("error",), "measurement", "1e-4 between unit-length logits, or another label",
        _AUTOATTACK,
        "Whether an example fools the network then depends on its company, in an attack and in our check.",
        "Use batch statistics recorded in training (batch norm with track_running_stats, in eval mode).",
        ("T5", "T26"),
    ),
    Diagnostic(
        "gradient-in-forward", ("warning",), "masking", "any call", _AUTOATTACK + " (check_dynamic)",
        "A network that optimises while it answers cannot be differentiated as it stands, and adapts to the attack.",
        "Attack the optimisation too: unroll it, or use attacks that need no gradient.", ("T19",),
    ),
    Diagnostic(
        "probabilities-not-logits", ("warning",), "masking", "1e-5 from [0, 1] and from sum 1", _AUTOATTACK,
        "A loss on top of a softmax has a vanishing gradient, so gradient attacks look weaker than they are.",
        "Give the network without its last softmax.", ("T6",),
    ),
    Diagnostic(
        "negative-logits", ("info",), "note", "every logit of every image below 0",
        "adversarial-attacks-pytorch issue 184",
        "Harmless to a softmax, but some libraries' Carlini-Wagner finds nothing then (ours shifts the logits).",
        "Compare with other people's numbers only if their attack shifts too.", (),
    ),
    # Its gradients
    Diagnostic(
        "cut-gradient", ("error",), "masking", "any", _IOAF + " (unavailable gradients)",
        "No gradient reaches the images: white-box attacks are blind, and none of them can say anything.",
        "Remove detach, no_grad or integer steps, or replace the layer by a differentiable one in the attack (BPDA).",
        ("T7",),
    ),
    Diagnostic(
        "zero-gradient", ("error", "warning"), "masking", "any image (warning), 0.05 of them (error)",
        f"{_AUTOATTACK}; {_IOAF}",
        "Where the gradient is zero, a gradient attack has no direction and stops at its random start.",
        "Use loss=margin, apgd-dlr, attacks without gradients, or a differentiable stand-in for the layer (BPDA).",
        ("T8",),
    ),
    Diagnostic(
        "not-finite-gradient", ("error",), "masking", "any image", _IOAF,
        "NaN or infinite gradients are no direction: attacks stop there and look weak.",
        "Look for divisions, roots and logarithms at 0, and for overflowing logits.", ("T7",),
    ),
    Diagnostic(
        "gradient-disagrees", ("error", "warning"), "masking",
        "relative error above 0.5 at two step lengths for 0.10 (warning) or 0.50 (error) of the images", _OWN,
        "What autograd returns is not the slope of the function: part of the graph is cut or replaced.",
        "Remove detach and custom backward passes, or attack without gradients.", ("T7",),
    ),
    Diagnostic(
        "stepwise-output", ("warning",), "masking", "0.10 of the images do not feel a change of 1e-4 a pixel", _OWN,
        "The input is rounded (quantisation, JPEG): gradients through it are zero or made up.",
        "Attack through a differentiable stand-in (BPDA), and add square.", ("T7", "T8"),
    ),
    # How attacks behave on it
    Diagnostic(
        "loss-not-rising", ("error", "warning"), "masking", "0.01 (warning) or 0.10 (error) of the images",
        f"{_CARLINI}; {_IOAF}",
        "An ascent that does not raise its loss has no useful gradient.",
        "Use loss=margin, more steps or a smaller rel_step, and attacks without gradients.", ("T11",),
    ),
    Diagnostic(
        "one-step-beats-many", ("error",), "masking", "0.005", _CARLINI,
        "Many steps must do at least as well as one: PGD does not converge or the gradient is masked.",
        "Give PGD more steps, a smaller rel_step or loss=margin (native:pgd).", ("T10",),
    ),
    Diagnostic(
        "steps-not-converged", ("error", "warning"), "masking",
        "0.005 (warning) or 0.02 (error) lower with twice the steps, paired p < 0.05", _CARLINI,
        "The attack had not finished: with more steps it breaks more.",
        "Give more steps until the number stays.", ("T11",),
    ),
    Diagnostic(
        "budget-not-monotone", ("error",), "masking", "0.005 more accuracy at a larger eps, paired p < 0.05", _CARLINI,
        "A larger ball holds every example of the smaller one: an attack that does worse in it is stuck.",
        "Use more steps, loss=margin and attacks without gradients.", ("T12", "T27"),
    ),
    Diagnostic(
        "full-range-not-zero", ("error",), "masking", "chance + 3 sigma, at most 0.20", f"{_CARLINI}; {_IOAF}",
        "An attack that may change the image into any other must always succeed: this one does not see its way.",
        "Look for cut, zero or saturated gradients; use loss=margin and attacks without gradients.", ("T13",),
    ),
    Diagnostic(
        "zero-eps-not-clean", ("error",), "measurement", "any image", _CARLINI,
        "With eps = 0 nothing may change: the network answers otherwise inside an attack.",
        "Look for randomness, batch statistics and hooks.", ("T5", "T12"),
    ),
    Diagnostic(
        "loss-disagreement", ("error", "warning", "info"), "masking",
        "0.03 (warning) or 0.10 (error) more broken by the margin loss, paired p < 0.05; information where the battery "
        "climbs another loss in that ball and no probe breaks what it left", "Croce & Hein 2020, sec. 3",
        "Cross-entropy and margin have the same goal; where they differ so much, the softmax hides the gradient.",
        "Use apgd-dlr, apgd-t or native:pgd with loss=margin.", ("T14",),
    ),
    Diagnostic(
        "scaled-logits", ("error", "warning", "info"), "masking",
        "0.03 (warning) or 0.10 (error) more broken once the logits have spread 10, paired p < 0.05; information as "
        "for loss-disagreement",
        "Croce & Hein 2020, sec. 4; Carlini & Wagner 2016",
        "The scale (temperature) of the logits alone decides what cross-entropy finds: its gradient is saturated.",
        "Use losses that do not depend on the scale: apgd-dlr, apgd-t, loss=margin.", ("T14",),
    ),
    Diagnostic(
        "battery-too-weak", ("warning",), "masking",
        "0.01 of the probed images, at least 3: left by the battery, broken by a probe in the same ball", _OWN,
        "Short ascents and searches of the examination break what the whole battery has left: it stopped too early.",
        "Take a stronger battery: --attacks standard, more steps, apgd-t, square.", ("T10", "T12"),
    ),
    Diagnostic(
        "restarts-matter", ("warning",), "masking",
        "0.05 lower with 4 starts than with 1, or (deep) 0.005 with 10 than with 5; paired p < 0.05", _CARLINI,
        "Luck decides which start succeeds: one run says too little.",
        "Give more restarts (apgd-ce:restarts=10) and other losses.", ("T20",),
    ),
    Diagnostic(
        "planted-not-found", ("warning",), "masking",
        "(deep) under 0.80 of the images for which an example was planted on the penultimate features",
        "Zimmermann et al. 2022, Increasing confidence in adversarial robustness evaluations; the limit is ours",
        "An adversarial example that is there by construction is not found: gradients before the last layer mislead.",
        "Attack without gradients (square), through a smooth stand-in of the layer, or by transfer (--surrogate).",
        ("T22",),
    ),
    Diagnostic(
        "silent-success", ("info",), "note", "any image", _IOAF,
        "The ascent passed a wrong label and came back: its last point understates it.",
        "Use attacks that keep their best point (apgd-ce, apgd-dlr).", ("T18",),
    ),
    Diagnostic(
        "noise-beats-gradient", ("error", "warning"), "masking",
        "more images than the best gradient attack (error), 0.01 that only noise breaks (warning)", _CARLINI,
        "Gradients that lose to noise are masked or of no use: the true robustness is lower.",
        "Try native:pgd with loss=margin and attacks that need no gradient.", ("T16",),
    ),
    Diagnostic(
        "black-box-beats-white-box", ("error", "warning"), "masking",
        "0.01 (warning) or 0.05 (error) of the images, at least 3; 0.05 and 0.10 where all white-box attacks use "
        "cross-entropy", f"{_AUTOATTACK} (check_square_sr); {_CARLINI}",
        "Who sees the weights must do at least as well as who does not: the gradients are masked.",
        "Add apgd-t, more queries, and look for layers that hide the gradient.", ("T15", "T17"),
    ),
    Diagnostic(
        "minimal-beats-fixed", ("error", "warning"), "masking",
        "0.05 (warning) or 0.10 (error) of the images, at least 3", _OWN,
        "A search for the nearest example found one inside the ball where attacks of that very ball did not.",
        "Give the fixed-eps attacks more steps and loss=margin.", ("T15",),
    ),
    Diagnostic(
        "minimal-too-far", ("info",), "note", "0.05 of the images, at least 3", _OWN,
        "A fixed-eps attack broke what the search for the nearest example did not break within eps: its distances are "
        "too large.", "Give the minimal-norm attack more steps; do not publish its median alone.", (),
    ),
    Diagnostic(
        "libraries-disagree", ("warning",), "attack", "0.02 between equal settings, paired p < 0.01", _OWN,
        "The same attack must find the same: one of the two does not do what its name says on this network.",
        "Believe the lower number, and report the difference with the versions.", ("T21",),
    ),
    Diagnostic(
        "pgd-far-from-autoattack", ("warning",), "masking", "0.10 between the best PGD and AutoAttack",
        "Croce & Hein 2020, table 2; seen for RoCL",
        "PGD alone overstates this network: its loss surface hides examples from it.",
        "Quote the AutoAttack number, never the PGD one.", ("T14",),
    ),
    # One attack
    Diagnostic(
        "empty-ball", ("warning",), "attack", "eps = 0", "by definition",
        "Nothing was attacked: this is the clean accuracy, not robustness.", "Give an eps above 0.", (),
    ),
    Diagnostic(
        "attack-failed", ("error",), "attack", "any exception", "by definition",
        "What did not run says nothing about robustness.", "Repair its options or leave it out of the battery.",
        ("T28",),
    ),
    Diagnostic(
        "moved-nothing", ("error", "warning"), "attack", "0.01 (warning) or 0.10 (error) of the images", _OWN,
        "An attack that made no attempt finds no weakness: those images are not counted as robust.",
        "Look for vanishing or cut gradients, saturated pixels or a useless radius; try another attack.",
        ("T8", "T9"),
    ),
    Diagnostic(
        "outside-box", ("warning",), "attack", "1e-6 outside [0, 1]", "float32 rounding; ART's tests",
        "They are against the rules of the threat model and were pulled back and judged again.",
        "Report it to the attack's author; its own success rate cannot be believed.", ("T1", "T4"),
    ),
    Diagnostic(
        "outside-ball", ("warning",), "attack", "eps (1 + 1e-6) + 1e-6 (1e-5 for L2 and L1)",
        "float32 rounding; ART's tests",
        "They are against the rules of the threat model and were pulled back and judged again.",
        "Report it to the attack's author; its own success rate cannot be believed.", ("T1", "T4"),
    ),
    Diagnostic(
        "not-finite", ("warning",), "attack", "any", "ART's tests",
        "They are against the rules of the threat model and were judged as no example.",
        "Report it to the attack's author; its own success rate cannot be believed.", ("T1", "T4"),
    ),
    Diagnostic(
        "input-written", ("warning",), "attack", "any bit", "ART's tests",
        "Distances measured against them would be wrong; ours are not, it was given copies.",
        "Report it to the attack's author: clone before changing in place.", ("T1",),
    ),
    Diagnostic(
        "time-limit", ("warning",), "attack", "any attack not done", "by definition",
        "What was not run is no robustness: the accuracies are upper bounds.",
        "Give more time; the same command goes on where it stopped, if its result is a file.", (),
    ),
    Diagnostic(
        "out-of-memory", ("info",), "note", "any", "by definition",
        "The numbers are the same up to rounding: seeds do not depend on the batch.",
        "Save time with a smaller --batch-size.", (),
    ),
    Diagnostic(
        "probe-failed", ("warning",), "masking", "any exception", "by definition",
        "The network could not be examined as others are; the battery's own numbers are what they are.",
        "If it is memory, take a larger machine or --probes none; else look at the message.", (),
    ),
    Diagnostic(
        "no-attack-ran", ("error",), "measurement", "all failed or not run", "by definition",
        "Nothing is known about the robustness of this network.", "See the reasons above.", (),
    ),
    # What should be known beside a number
    Diagnostic(
        "small-sample", ("info",), "note", "n < 1000", "Wilson 1927",
        "The interval is wide, and small differences between networks are chance.",
        "Take more images, and compare networks pairwise on the same ones.", ("T23",),
    ),
    Diagnostic(
        "not-adaptive", ("info",), "note", "always", "Tramer et al. 2020; " + _CARLINI,
        "No attack of a fixed battery knows the defence: one written against it can find more.",
        "Attack the defence's own objective too (for contrastive training, the embedding).", ("T25", "T29"),
    ),
)  # fmt: skip
#: Every diagnostic by its id.
CATALOGUE: Mapping[str, Diagnostic] = {entry.id: entry for entry in _ENTRIES}


def flagged(
    id: str,
    what: str,
    severity: Severity | None = None,
    *,
    attacks: Sequence[str] = (),
    measured: float | None = None,
    threshold: float | None = None,
) -> Flag:
    """A flag of the catalogue. severity: needed where the entry has several."""
    entry = CATALOGUE[id]
    chosen = entry.severities[0] if severity is None else severity
    assert chosen in entry.severities and (severity or len(entry.severities) == 1), id  # a fault of ours
    number = None if measured is None or not np.isfinite(measured) else float(f"{measured:.6g}")
    return Flag(id, chosen, what, entry.why, entry.remedy, tuple(attacks), number, threshold)


def graded(value: float, limits: tuple[float, float]) -> tuple[Severity, float] | None:
    """Severity of a value above ``(warning, error)``, and the limit it passed; ``None`` below both."""
    warning, error = limits
    return ("error", error) if value > error else ("warning", warning) if value > warning else None


def one_sided(better: int, worse: int) -> float:
    """Exact McNemar test: how likely are ``better`` or more of ``better + worse`` discordant pairs by chance."""
    from scipy.stats import binom

    return float(binom.sf(better - 1, better + worse, 0.5)) if better else 1.0
