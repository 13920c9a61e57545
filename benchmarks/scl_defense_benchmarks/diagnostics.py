"""What can be wrong with a robustness number. One flag for one fault, each with an id.

:mod:`scl_defense_benchmarks.catalogue` says what every flag means, its threshold and where that comes from, and
docs/diagnostics.md is its page. The checks here read what an evaluation has found anyway;
:mod:`scl_defense_benchmarks.probes` attacks the network a little to find out more. :func:`verdict` turns the flags
into one line. Importing this module imports no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from scl_defense.threat import ThreatModel, parse_eps
from scl_defense_benchmarks.catalogue import CATALOGUE, LETTERS, Flag, Severity, flagged, graded, one_sided

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from scl_defense_benchmarks.results import AttackRow, EvaluationResult, WorstCase

__all__ = ["CATALOGUE", "Conclusion", "Flag", "verdict"]  # and the checks below

BY_CHANCE = 0.05  # of a paired test
BEATEN_BY = 0.005  # half a percentage point: what a weaker attack may win by chance (Carlini et al. 2019)
CONTROL_ONLY = 0.01  # share of images that only noise breaks
DOUBTFUL, INVALID = 0.01, 0.10  # share of right images that an attack did not move
REPEATED = 16  # images that are passed again to see if the answer is the same
DIFFERENT = 1e-4  # between unit-length logits (auto-attack, checks.py), or of the largest logit
PROBABILITY = 1e-5  # the same source: how near to [0, 1] and to sum 1
RECORDED = 0.02  # clean accuracy may differ by so much from the recorded one, beside 3 sigma
DARK = 0.05  # images that never get brighter were divided by 255 twice
ONLY_BLACK = (0.01, 0.05)  # share of images that only a black-box attack breaks: warning, error
ONLY_BLACK_ONE_LOSS = (0.05, 0.10)  # where every white-box attack climbs the cross-entropy: 4 % seen without a fault
MINIMAL_ONLY = (0.05, 0.10)  # share that a minimal-norm attack breaks inside the ball, and no fixed-eps one
LIBRARIES = 0.02  # between two libraries' shares, with a paired test
AUTOATTACK_GAP = 0.10  # between the best PGD and AutoAttack
STEPS, QUERIES = 10, 200  # below which an attack has only begun
SMALL_SAMPLE = 1000  # the 95 % interval of fewer images is wider than +-3.1 points
FEWEST = 3  # images: a share of fewer is an anecdote


def probe(
    network: "nn.Module",
    images: "Tensor",
    labels: "Tensor",
    threat: ThreatModel,
    rng: "torch.Generator",
    depth: Literal["quick", "deep", "none"] = "quick",
    robust: "Tensor | None" = None,
) -> list[Flag]:
    """See :func:`scl_defense_benchmarks.probes.probe`."""
    from scl_defense_benchmarks import probes

    return probes.probe(network, images, labels, threat, rng, depth, robust)


# -- the network


def check_network(network: "nn.Module", images: "Tensor", labels: "Tensor", logits: "Tensor") -> list[Flag]:
    """Faults of the network itself. logits: (N, K), its answer to all ``images``; it must be in eval mode."""
    from scl_defense_benchmarks.forward import decide
    from scl_defense_benchmarks.probes import same_state, state_of

    flags, before = [], state_of(network)
    n, classes = logits.shape
    if wrong := int((~logits.isfinite()).any(1).sum()):
        what = f"The network returns NaN or infinite logits for {wrong} of {n} clean images."
        flags.append(flagged("not-finite-logits", what, "error", measured=wrong / n, threshold=0.0))
    accuracy, chance = float((decide(logits) == labels).double().mean()), 1 / classes
    limit = chance + 3 * (chance * (1 - chance) / n) ** 0.5
    if accuracy <= limit:
        what = f"Clean accuracy {accuracy:.1%} is not above chance ({chance:.1%} + 3 sigma = {limit:.1%})."
        flags.append(flagged("clean-accuracy-at-chance", what, measured=accuracy, threshold=limit))
    if (brightest := float(images.max())) <= DARK:
        what = f"No pixel of these images is above {brightest:.3g}."
        flags.append(flagged("image-range", what, measured=brightest, threshold=DARK))
    sums = logits.double().sum(1)
    in_range = bool((logits > -PROBABILITY).all() and (logits < 1 + PROBABILITY).all())
    if in_range and bool(((sums - 1).abs() < PROBABILITY).all()):
        what = "The outputs lie in [0, 1] and sum to 1: they look like probabilities."
        flags.append(flagged("probabilities-not-logits", what))
    elif bool((logits < 0).all()):
        flags.append(flagged("negative-logits", f"All logits are negative, the largest is {float(logits.max()):.3g}."))
    if busy := [name for name, module in network.named_modules() if module.training]:
        what = f"{len(busy)} modules are still in train mode after eval(), the first is '{busy[0] or 'the network'}'."
        flags.append(flagged("train-mode", what, measured=len(busy), threshold=0.0))
    unsteady = _check_repeatable(network, images, logits)
    flags += same_state(before, state_of(network))
    return flags + (unsteady or _check_preparation(network, images, labels, logits))


def _check_preparation(network: "nn.Module", images: "Tensor", labels: "Tensor", logits: "Tensor") -> list[Flag]:
    """Another normalisation, channel order, range of values or order of the classes that is clearly better."""
    from scl_defense_benchmarks.preprocessing import BETTER, find_better

    found = find_better(network, images, labels, logits=logits)
    if found is None:
        return []
    id = "label-order" if found.preprocessing is None else "normalisation"
    return [flagged(id, found.what + ".", measured=found.better - found.accuracy, threshold=BETTER)]


def _check_repeatable(network: "nn.Module", images: "Tensor", logits: "Tensor") -> list[Flag]:
    import torch
    import torch.nn.functional as F

    from scl_defense_benchmarks.forward import CHUNK, check_logits, decide, logits_of

    def differ(first: "Tensor", other: "Tensor") -> bool:
        # In their directions, or (of two logits that are each other's negative, say) in their lengths alone.
        turned = (F.normalize(first, dim=1) - F.normalize(other, dim=1)).abs().amax()
        apart = (first - other).abs().amax() / first.abs().amax().clamp(min=torch.finfo(first.dtype).tiny)
        return bool(max(turned, apart) > DIFFERENT) or bool((decide(first) != decide(other)).any())

    few = images[:REPEATED]  # the same batch each time: what differs is drawn
    with torch.no_grad():
        first, *others = (check_logits(network(few), len(few)).float() for _ in range(4))
    if any(differ(first, other) for other in others):
        return [flagged("random-forward", "The network answers the same images differently each time.")]
    # In other company: the second half of the first chunk is left out, and the filler takes its place.
    images = images[: (len(images[:CHUNK]) + 1) // 2]
    if len(logits) > 1 and differ(logits[: len(images)], logits_of(network, images)):
        what = "The answer for an image depends on the other images of its batch."
        return [flagged("batch-dependent-forward", what)]
    return []


def check_recorded(correct: int, n: int, recorded: float, recorded_n: int) -> list[Flag]:
    """Clean accuracy of ``n`` images against the share that the checkpoint says it had of ``recorded_n`` others.

    Both are samples: sigma is that of their difference, from the pooled share with one image of each kind added.
    """
    accuracy = correct / n
    pooled = (correct + recorded * recorded_n + 1) / (n + recorded_n + 2)
    limit = RECORDED + 3 * (pooled * (1 - pooled) * (1 / n + 1 / recorded_n)) ** 0.5
    if abs(accuracy - recorded) <= limit:
        return []
    what = f"Clean accuracy is {accuracy:.1%}; the checkpoint says {recorded:.1%} (limit: {limit:.1%} apart)."
    return [flagged("clean-accuracy-not-as-recorded", what, measured=abs(accuracy - recorded), threshold=limit)]


# -- one attack


def check_row(row: "AttackRow") -> list[Flag]:
    """Faults of one attack's run."""
    flags, about = [], (row.label,)
    if not row.minimal and ThreatModel(row.norm, row.eps).radius == 0:
        flags.append(flagged("empty-ball", f"The ball {row.norm}:{row.eps} holds the image alone.", attacks=about))
    if row.status == "failed":
        flags.append(flagged("attack-failed", f"It stopped: {row.note}.", attacks=about))
    elif row.status in ("doubtful", "invalid"):
        invalid = row.status == "invalid"
        what = f"It made no real attempt on {row.unmoved} of {row.attacked} images: not moved, or never a gradient."
        measured = {"measured": row.unmoved / max(row.attacked, 1), "threshold": INVALID if invalid else DOUBTFUL}
        flags.append(flagged("moved-nothing", what, "error" if invalid else "warning", attacks=about, **measured))
    for kind, text in (("box", "outside [0, 1]"), ("ball", "outside the ball"), ("nonfinite", "that are not finite")):
        if row.violations[kind]:
            what = f"It returned {row.violations[kind]} of {row.attacked} examples {text}."
            share = row.violations[kind] / max(row.attacked, 1)
            id = "not-finite" if kind == "nonfinite" else f"outside-{kind}"
            flags.append(flagged(id, what, attacks=about, measured=share, threshold=0.0))
    return flags


def input_was_written(label: str) -> Flag:
    """The flag for an attack that changed the tensors it was given."""
    return flagged("input-written", "It wrote into the images or labels that it was given.", attacks=(label,))


# -- between attacks


def check_battery(rows: Sequence["AttackRow"], families: Sequence[str]) -> list[Flag]:
    """Faults that show between attacks. families: of each row, ``fgsm``, ``pgd``, ..., or empty."""
    if all(row.status in ("failed", "not run") for row in rows):
        return [flagged("no-attack-ran", "Every attack of the battery failed or was not run.")]
    usable = [pair for pair in zip(rows, families, strict=True) if pair[0].robust_accuracy is not None]
    flags = [*_one_step_beats_many(usable), *_libraries_disagree(usable)]
    flags += _autoattack_gap(usable)
    for control, _ in usable:
        if control.access == "control":
            flags += _beaten_by_control(control, rows)
    for ball in dict.fromkeys(_ball(row) for row, _ in usable):
        here = [pair for pair in usable if _ball(pair[0]) == ball]
        flags += _black_beats_white(here)
        flags += _minimal_against_fixed([row for row, _ in here])
    return flags


def _ball(row: "AttackRow") -> tuple[str, object]:
    return row.norm, parse_eps(row.eps)


def _broken(rows: Iterable["AttackRow"], *, spared: bool = False) -> np.ndarray:
    """(N,) bool: broken by any of the rows. spared: or not given to one, because an earlier attack has broken it."""
    from scl_defense_benchmarks.results import BROKEN, SPARED

    codes = (BROKEN, SPARED) if spared else (BROKEN,)
    return np.any([np.isin(row.outcomes, codes) for row in rows], axis=0)


def _share(value: np.ndarray, limits: tuple[float, float]) -> tuple[Severity, float] | None:
    return graded(float(value.mean()), limits) if value.sum() >= FEWEST else None


_Pairs = Sequence[tuple["AttackRow", str]]


def _one_step_beats_many(usable: _Pairs) -> Iterator[Flag]:
    for pgd in (row for row, family in usable if family == "pgd"):
        for fgsm in (row for row, family in usable if family == "fgsm"):
            same = (fgsm.library, _ball(fgsm)) == (pgd.library, _ball(pgd))
            one_step, many_steps = _broken([fgsm]), _broken([pgd])
            p = one_sided(int((one_step & ~many_steps).sum()), int((many_steps & ~one_step).sum()))
            if same and p < BY_CHANCE and pgd.robust_accuracy > fgsm.robust_accuracy + BEATEN_BY:
                many, one = pgd.robust_accuracy, fgsm.robust_accuracy
                what = f"Accuracy under PGD ({many:.1%}) is above that under FGSM ({one:.1%})."
                labels = (pgd.label, fgsm.label)
                measured = {"measured": many - one, "threshold": BEATEN_BY}
                yield flagged("one-step-beats-many", what, attacks=labels, **measured)


def _libraries_disagree(usable: _Pairs) -> Iterator[Flag]:
    for place, (one, family) in enumerate(usable):
        for other, other_family in usable[place + 1 :]:
            if not family or family != other_family or one.library == other.library or one.minimal != other.minimal:
                continue
            shared = one.options.keys() & other.options.keys()
            alone = (one.options | other.options).keys() - shared
            if _ball(one) != _ball(other) or any(one.options[key] != other.options[key] for key in shared):
                continue
            if (
                one.spared
                or other.spared
                or family not in ("fgsm", "pgd", "apgd", "mifgsm", "bim")
                or _another_loss(one) != _another_loss(other)
            ):
                continue  # searches with constants of their own differ without a fault
            if any(key in ("steps", "rel_step", "restarts") for key in alone):
                continue
            a, b = _broken([one]), _broken([other])
            gap, only = abs(a.mean() - b.mean()), sorted([int((a & ~b).sum()), int((b & ~a).sum())])
            if gap > LIBRARIES and 2 * one_sided(only[1], only[0]) < 0.01:
                what = f"'{one.label}' breaks {a.mean():.1%} and '{other.label}' {b.mean():.1%} of the same images."
                labels = (one.label, other.label)
                yield flagged("libraries-disagree", what, attacks=labels, measured=gap, threshold=LIBRARIES)


def _autoattack_gap(usable: _Pairs) -> Iterator[Flag]:
    for whole in (row for row, family in usable if family == "autoattack"):
        pgds = [row for row, family in usable if family == "pgd" and _ball(row) == _ball(whole)]
        if pgds:
            best = min(pgds, key=lambda row: row.robust_accuracy)
            gap = best.robust_accuracy - whole.robust_accuracy
            if gap > AUTOATTACK_GAP and gap * len(whole.outcomes) >= FEWEST:
                what = f"'{best.label}' leaves {best.robust_accuracy:.1%}, '{whole.label}' {whole.robust_accuracy:.1%}."
                measured = {"measured": gap, "threshold": AUTOATTACK_GAP}
                yield flagged("pgd-far-from-autoattack", what, attacks=(best.label, whole.label), **measured)


def _another_loss(row: "AttackRow", family: str = "") -> bool:
    """Climbs something else than the cross-entropy."""
    stronger = ("apgd-dlr", "apgd-t", "apgd-margin", "autoattack", "cw", "deepfool", "fab", "fab-t", "ead")
    name = row.name.rpartition(":")[2]
    other = row.options.get("loss", "ce") not in ("ce", "cross-entropy")
    return name in stronger or family in ("autoattack", "cw", "deepfool", "fab") or other


def answered(flags: Iterable[Flag], rows: Iterable["AttackRow"]) -> list[Flag]:
    """flags: of the probes; rows: the valid ones in their ball. What a probe says about one loss is only worth knowing
    where the battery climbed another one, and the probes broke nothing that it had left.
    """
    flags = list(flags)
    if any(flag.id == "battery-too-weak" for flag in flags) or not any(map(_another_loss, rows)):
        return flags
    remedied = ("loss-disagreement", "scaled-logits")
    return [replace(flag, severity="info") if flag.id in remedied else flag for flag in flags]


def _black_beats_white(pairs: _Pairs) -> list[Flag]:
    """pairs: rows of one ball."""
    black = [row for row, _ in pairs if row.access not in ("white-box", "control")]
    white = [(row, family) for row, family in pairs if row.access == "white-box"]
    if not black or not white:
        return []
    alone = _broken(black) & ~_broken((row for row, _ in white), spared=True)
    two_losses = any(_another_loss(row, family) for row, family in white)
    grade = _share(alone, ONLY_BLACK if two_losses else ONLY_BLACK_ONE_LOSS)
    if grade is None:
        return []
    what = f"Attacks without gradients break {int(alone.sum())} of {len(alone)} images that no gradient attack breaks."
    labels = [row.label for row in (*black, *(row for row, _ in white))]
    measured = {"measured": float(alone.mean()), "threshold": grade[1]}
    return [flagged("black-box-beats-white-box", what, grade[0], attacks=labels, **measured)]


def _minimal_against_fixed(rows: Sequence["AttackRow"]) -> Iterator[Flag]:
    """rows: of one ball."""
    fixed = [row for row in rows if row.access == "white-box" and not row.minimal and parse_eps(row.eps) > 0]
    minimal = [row for row in rows if row.access == "white-box" and row.minimal]
    if not fixed or not minimal:
        return
    by_fixed, labels = _broken(fixed, spared=True), [row.label for row in (*minimal, *fixed)]
    near = _broken(minimal) & ~by_fixed
    if grade := _share(near, MINIMAL_ONLY):
        what = (
            f"Minimal-norm attacks find {int(near.sum())} of {len(near)} examples inside the ball that the others miss."
        )
        measured = {"measured": float(near.mean()), "threshold": grade[1]}
        yield flagged("minimal-beats-fixed", what, grade[0], attacks=labels, **measured)
    for row in minimal:
        far = _broken(fixed) & ~_broken([row], spared=True)
        if grade := _share(far, (MINIMAL_ONLY[0], 1.0)):
            what = f"{int(far.sum())} of {len(far)} images are broken inside the ball where it finds nothing so near."
            measured = {"measured": float(far.mean()), "threshold": grade[1]}
            yield flagged("minimal-too-far", what, attacks=(row.label,), **measured)


def _beaten_by_control(control: "AttackRow", rows: Sequence["AttackRow"]) -> list[Flag]:
    white = [
        row
        for row in rows
        if row.access == "white-box" and row.status not in ("failed", "not run") and _ball(row) == _ball(control)
    ]
    if not white:
        return []
    by_control = _broken([control])
    alone = int((by_control & ~_broken(white, spared=True)).sum())
    stronger = by_control.sum() > max(_broken([row], spared=True).sum() for row in white)
    if not stronger and alone <= CONTROL_ONLY * len(by_control):
        return []
    what = f"Random noise breaks {int(by_control.sum())} images, {alone} of them unbroken by every gradient attack."
    labels = (control.label, *(row.label for row in white))
    severity: Severity = "error" if stronger else "warning"
    measured = {"measured": alone / len(by_control), "threshold": CONTROL_ONLY}
    return [flagged("noise-beats-gradient", what, severity, attacks=labels, **measured)]


# -- all together


def merged(flags: Iterable[Flag]) -> list[Flag]:
    """One flag for one fault: of several with the same id and attacks the gravest; order of first appearance."""
    kept: dict[tuple[str, tuple[str, ...]], Flag] = {}
    grave = list(LETTERS)
    for flag in flags:
        key = flag.id, flag.attacks
        if key not in kept or grave.index(flag.severity) < grave.index(kept[key].severity):
            kept[key] = flag
    return list(kept.values())


def notes(result: "EvaluationResult") -> list[Flag]:
    """What should be known beside any number: information for the report, never part of the verdict."""
    found = []
    if result.n < SMALL_SAMPLE:
        what = f"{result.n} images: the clean accuracy alone is known to {_span(result.clean_interval)}."
        found.append(flagged("small-sample", what, measured=result.n, threshold=SMALL_SAMPLE))
    found.append(flagged("not-adaptive", "The battery is the same for every network."))
    return found


@dataclass(frozen=True)
class Conclusion:
    """What the evaluation is worth, in one line. reasons: short, the gravest first; empty when trustworthy."""

    kind: Literal["trustworthy", "upper-bound", "not-trustworthy"]
    text: str
    reasons: tuple[str, ...] = ()


def verdict(result: "EvaluationResult") -> Conclusion:
    """Can the worst case be trusted? The flags decide by their severity and by what they are about.

    An error of the measurement, or one that shows masked gradients, makes the number untrustworthy. A warning, an
    error of a single attack beside others that worked, a battery without an attack that needs no gradient, and one
    whose gradient attacks take a single step make it an upper bound. A worst case of zero is the exception: examples
    that were checked break every image, so nothing hidden can lower it, and only errors of the measurement count.
    """
    cases = [case for case in result.worst_cases if case.norm == result.norm]
    whole = [case for case in cases if case.broken == result.clean_correct]
    # Of a curve the largest ball is the main one: where it is empty, the largest that is not has something to hide.
    case = next((case for case in reversed(_by_radius(cases)) if case not in whole), result.worst_case)
    about = {flag: CATALOGUE[flag.id].about if flag.id in CATALOGUE else "measurement" for flag in result.flags}
    invalid = [flag for flag in about if flag.severity == "error" and about[flag] == "measurement"]
    masked = [flag for flag in about if flag.severity == "error" and about[flag] == "masking"]
    doubtful = [
        flag for flag in about if flag.severity != "info" and about[flag] != "note" and flag not in (*invalid, *masked)
    ]
    reasons = [_reason(flag) for flag in invalid]
    if case is None or case.robust_accuracy is None:
        reasons.append("no valid attack was run in this ball")
    broken = case is not None and case.broken == result.clean_correct
    if not broken:
        reasons += [_reason(flag) for flag in masked]
    if reasons:
        return _conclude("not-trustworthy", "not trustworthy, because ", reasons)
    if not broken and case is not None:
        reasons = _missing(result, case.attacks) + [_reason(flag) for flag in doubtful]
        if result.probes == "none":
            reasons.append("nobody has looked for masked gradients (--probes quick)")
        if case.unmoved:
            reasons.append(f"{case.unmoved} images were never really attacked")
    else:
        reasons = [_reason(flag) for flag in doubtful if about[flag] == "measurement"]
    if reasons:
        return _conclude("upper-bound", "an upper bound, because ", reasons)
    return Conclusion("trustworthy", "trustworthy within the interval")


def _by_radius(cases: Sequence["WorstCase"]) -> list["WorstCase"]:
    return sorted(cases, key=lambda case: parse_eps(case.eps))


def _conclude(kind: Literal["upper-bound", "not-trustworthy"], start: str, reasons: Sequence[str]) -> Conclusion:
    different = tuple(dict.fromkeys(reasons))
    shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
    return Conclusion(kind, start + shown, different)


def _missing(result: "EvaluationResult", valid: Sequence[str]) -> list[str]:
    """What a battery must have before its worst case is more than an upper bound."""
    rows = [row for row in result.attacks if row.label in valid]
    found = []
    blind = [row for row in rows if row.access in ("score", "decision") or row.name.rpartition(":")[2] == "autoattack"]
    if not any(row.options.get("queries", QUERIES) >= QUERIES for row in blind):
        found.append("no attack without gradients was run (add square)")
    white = [row for row in rows if row.access == "white-box"]
    if not white:
        found.append("no gradient attack was run (add pgd)")
    elif all(row.name.rpartition(":")[2] == "fgsm" or row.options.get("steps", STEPS) < STEPS for row in white):
        found.append(f"no gradient attack took {STEPS} steps or more (add pgd)")
    return found


def _reason(flag: Flag) -> str:
    what = flag.what.rstrip(".")
    text = what if not flag.attacks or len(flag.attacks) > 1 else f"{flag.attacks[0]}: {what}"
    return f"{flag.id} ({text[0].lower() + text[1:] if not flag.attacks else text})"


def _span(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
