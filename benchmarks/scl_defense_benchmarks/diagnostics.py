"""What can be wrong with a robustness number, and what to do about it. One flag for one fault, each with an id."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from scl_defense.threat import ThreatModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scl_defense_benchmarks.results import AttackRow

BEATEN_BY = 0.005  # half a percentage point: what a weaker attack may win by chance (Carlini et al. 2019)
CONTROL_ONLY = 0.01  # share of images that only noise breaks
DOUBTFUL, INVALID = 0.01, 0.10  # share of right images that an attack did not move
DIFFERENT = 1e-4  # between unit-length logits (auto-attack, checks.py)
PROBABILITY = 1e-5  # the same source: how near to [0, 1] and to sum 1


@dataclass(frozen=True)
class Flag:
    """severity: ``error`` invalidates a number, ``warning`` makes it doubtful. attacks: labels it is about, or none."""

    id: str
    severity: Literal["error", "warning"]
    what: str
    why: str
    remedy: str
    attacks: tuple[str, ...] = ()


def check_network(network: "nn.Module", images: "Tensor", labels: "Tensor", logits: "Tensor") -> list[Flag]:
    """Faults of the network itself. logits: (N, K), its answer to all ``images``; it must be in eval mode."""
    from scl_defense_benchmarks.forward import decide

    flags = []
    n, classes = logits.shape
    if wrong := int((~logits.isfinite()).any(1).sum()):
        flags.append(
            Flag(
                "not-finite-logits",
                "error",
                f"The network returns NaN or infinite logits for {wrong} of {n} clean images.",
                "No comparison with such an output means anything.",
                "Check the weights and the range and normalisation of the images.",
            )
        )
    accuracy, chance = float((decide(logits) == labels).double().mean()), 1 / classes
    limit = chance + 3 * (chance * (1 - chance) / n) ** 0.5
    if accuracy <= limit:
        flags.append(
            Flag(
                "clean-accuracy-at-chance",
                "error",
                f"Clean accuracy {accuracy:.1%} is not above chance ({chance:.1%} + 3 sigma = {limit:.1%}).",
                "Nothing can be said about the robustness of a network that does not work on these images.",
                "Check the weights, the order of the classes, the pixel range and the normalisation.",
            )
        )
    sums = logits.double().sum(1)
    in_range = bool((logits > -PROBABILITY).all() and (logits < 1 + PROBABILITY).all())
    if in_range and bool(((sums - 1).abs() < PROBABILITY).all()):
        flags.append(
            Flag(
                "probabilities-not-logits",
                "warning",
                "The outputs lie in [0, 1] and sum to 1: they look like probabilities.",
                "A loss on top of a softmax has a vanishing gradient, so gradient attacks look weaker than they are.",
                "Give the network without its last softmax.",
            )
        )
    return flags + _check_repeatable(network, images, labels, logits)


def _check_repeatable(network: "nn.Module", images: "Tensor", labels: "Tensor", logits: "Tensor") -> list[Flag]:
    import torch.nn.functional as F

    from scl_defense_benchmarks.forward import CHUNK, decide, logits_of

    images, labels, logits = images[:CHUNK], labels[:CHUNK], logits[:CHUNK]

    def differs(other: "Tensor") -> bool:
        first = logits[: len(other)]
        apart = (F.normalize(first, dim=1) - F.normalize(other, dim=1)).abs().amax()
        return bool(apart > DIFFERENT) or bool((decide(first) != decide(other)).any())

    if any(differs(logits_of(network, images)) for _ in range(4)):
        return [
            Flag(
                "random-forward",
                "error",
                "The network answers the same images differently each time.",
                "An attack and our check see different networks, and one lucky draw counts as robustness.",
                "Evaluate without its randomness, or with an attack that averages over it.",
            )
        ]
    # In other company: the second half of the first chunk is left out, and the filler takes its place.
    if len(images) > 1 and differs(logits_of(network, images[: (len(images) + 1) // 2])):
        return [
            Flag(
                "batch-dependent-forward",
                "error",
                "The answer for an image depends on the other images of its batch.",
                "Whether an example fools the network then depends on its company, in an attack and in our check.",
                "Use batch statistics recorded in training (batch norm with track_running_stats, in eval mode).",
            )
        ]
    return []


def check_row(row: "AttackRow") -> list[Flag]:
    """Faults of one attack's run."""
    flags, about = [], (row.label,)
    if not row.minimal and ThreatModel(row.norm, row.eps).radius == 0:
        flags.append(
            Flag(
                "empty-ball",
                "warning",
                f"The ball {row.norm}:{row.eps} holds the image alone.",
                "Nothing was attacked: this is the clean accuracy, not robustness.",
                "Give an eps above 0.",
                about,
            )
        )
    if row.status == "failed":
        flags.append(
            Flag(
                "attack-failed",
                "error",
                f"It stopped: {row.note}.",
                "What did not run says nothing about robustness.",
                "Repair its options or leave it out of the battery.",
                about,
            )
        )
    elif row.status in ("doubtful", "invalid"):
        flags.append(
            Flag(
                "moved-nothing",
                "error" if row.status == "invalid" else "warning",
                f"It made no real attempt on {row.unmoved} of {row.attacked} images: not moved, or never a gradient.",
                "An attack that made no attempt finds no weakness: those images are not counted as robust.",
                "Look for vanishing or cut gradients, saturated pixels or a useless radius; try another attack.",
                about,
            )
        )
    for kind, text in (("box", "outside [0, 1]"), ("ball", "outside the ball"), ("nonfinite", "that are not finite")):
        if row.violations[kind]:
            done = "judged as no example" if kind == "nonfinite" else "pulled back and judged again"
            flags.append(
                Flag(
                    f"outside-{kind}" if kind != "nonfinite" else "not-finite",
                    "warning",
                    f"It returned {row.violations[kind]} of {row.attacked} examples {text}.",
                    f"They are against the rules of the threat model and were {done}.",
                    "Report it to the attack's author; its own success rate cannot be believed.",
                    about,
                )
            )
    return flags


def input_was_written(label: str) -> Flag:
    """The flag for an attack that changed the tensors it was given."""
    return Flag(
        "input-written",
        "warning",
        "It wrote into the images or labels that it was given.",
        "Distances measured against them would be wrong; ours are not, it was given copies.",
        "Report it to the attack's author: clone before changing in place.",
        (label,),
    )


def check_battery(rows: Sequence["AttackRow"], families: Sequence[str]) -> list[Flag]:
    """Faults that show between attacks. families: of each row, ``fgsm``, ``pgd``, ..., or empty."""
    if all(row.status == "failed" for row in rows):
        return [
            Flag(
                "no-attack-ran",
                "error",
                "Every attack of the battery failed.",
                "Nothing is known about the robustness of this network.",
                "See the reasons above.",
            )
        ]
    flags = []
    usable = [pair for pair in zip(rows, families, strict=True) if pair[0].robust_accuracy is not None]
    for pgd in (row for row, family in usable if family == "pgd"):
        for fgsm in (row for row, family in usable if family == "fgsm"):
            same = (fgsm.library, fgsm.norm, fgsm.eps) == (pgd.library, pgd.norm, pgd.eps)
            if same and pgd.robust_accuracy > fgsm.robust_accuracy + BEATEN_BY:
                flags.append(
                    Flag(
                        "one-step-beats-many",
                        "error",
                        f"Accuracy under PGD ({pgd.robust_accuracy:.1%}) is above that under FGSM "
                        f"({fgsm.robust_accuracy:.1%}).",
                        "Many steps must do at least as well as one: PGD does not converge or the gradient is masked.",
                        "Give PGD more steps, a smaller rel_step or loss=margin (native:pgd).",
                        (pgd.label, fgsm.label),
                    )
                )
    for control, _ in usable:
        if control.access == "control":
            flags += _beaten_by_control(control, rows)
    return flags


def _beaten_by_control(control: "AttackRow", rows: Sequence["AttackRow"]) -> list[Flag]:
    from scl_defense_benchmarks.results import BROKEN

    white = [
        row
        for row in rows
        if row.access == "white-box" and row.status != "failed" and (row.norm, row.eps) == (control.norm, control.eps)
    ]
    if not white:
        return []
    by_control = np.array(control.outcomes) == BROKEN
    by_white = np.any([np.array(row.outcomes) == BROKEN for row in white], axis=0)
    alone = int((by_control & ~by_white).sum())
    stronger = by_control.sum() > max(row.broken for row in white)
    if not stronger and alone <= CONTROL_ONLY * len(by_control):
        return []
    return [
        Flag(
            "noise-beats-gradient",
            "error" if stronger else "warning",
            f"Random noise breaks {int(by_control.sum())} images, {alone} of them unbroken by every gradient attack.",
            "Gradients that lose to noise are masked or of no use: the true robustness is lower.",
            "Try native:pgd with loss=margin and attacks that need no gradient.",
            (control.label, *(row.label for row in white)),
        )
    ]
