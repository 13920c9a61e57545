"""Results made up for the tests of the report: any size, any names, and consistent as a real one is."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scl_defense_benchmarks.catalogue import flagged
from scl_defense_benchmarks.results import BROKEN, MISCLASSIFIED, ROBUST, AttackRow, EvaluationResult, WorstCase
from scl_defense_benchmarks.statistics import wilson

from scl_defense.threat import ThreatModel

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "';alert(3)//",
    "{{7*7}}",
    "=cmd|' /C calc'!A0",
    "a|b`c`$x_1$%&",
    "‮desrever",
    "\"onmouseover='alert(4)'",
    "--><svg/onload=alert(5)>",
    "plain",
)


def row(label, images_right, rng, *, norm="linf", eps="0.1", share=0.5, minimal=False, labels, classes, **more):
    """One attack that breaks about ``share`` of the rightly classified images, with distances to match."""
    n = len(labels)
    radius = ThreatModel(norm, eps).radius
    inside = images_right & (rng.random(n) < share)
    found = images_right.copy() if minimal else inside
    distances = np.where(
        inside, radius * (0.5 + 0.5 * rng.random(n)) if minimal else radius, radius * (1.1 + rng.random(n))
    )
    distances = distances if minimal else np.full(n, radius)
    wrong = np.where(found, (labels + 1 + rng.integers(0, classes - 1, n)) % classes, -1)
    outcomes = np.where(~images_right, MISCLASSIFIED, np.where(inside, BROKEN, ROBUST))
    broken, left = int(inside.sum()), int((outcomes == ROBUST).sum())
    made = {
        "label": label, "name": label.partition(":")[0], "library": "native", "access": "white-box", "norm": norm,
        "eps": eps, "minimal": minimal, "options": {"steps": 20}, "status": "ok", "note": "",
        "attacked": int(images_right.sum()), "broken": broken, "found": int(found.sum()), "unmoved": 0,
        "violations": {"box": 0, "ball": 0, "nonfinite": 0}, "robust_accuracy": left / n, "interval": wilson(left, n),
        "median_distance": float(np.median(distances[found])) if found.any() else None, "seconds": 1.5,
        "forwards": 20.0, "backwards": 20.0, "outcomes": tuple(int(x) for x in outcomes),
        "distances": tuple(float(d) if ok else None for d, ok in zip(distances, images_right, strict=True)),
        "made": broken, "rounded": broken or None, "predictions": tuple(int(x) for x in wrong),
    }  # fmt: skip
    return AttackRow(**{**made, **more})


def made_up(n=60, *, attacks=("fgsm", "pgd", "apgd-ce"), radii=("0.1",), minimal=("cw",), names=None, seed=0,
            classes=10, **more):  # fmt: skip
    """A result of ``n`` images; the largest of ``radii`` is the main ball."""
    rng = np.random.default_rng(seed)
    names = tuple(names or (f"class {k}" for k in range(classes)))
    labels = np.arange(n) % len(names)
    right = rng.random(n) < 0.95
    predictions = np.where(right, labels, (labels + 1) % len(names))
    rows = [
        row(label if len(radii) == 1 else f"{label}:eps={eps}", right, rng, eps=eps, labels=labels, classes=len(names),
            share=min(0.9, 0.15 * (place + 1) + 3 * ThreatModel("linf", eps).radius))
        for eps in radii for place, label in enumerate(attacks)
    ]  # fmt: skip
    rows += [row(label, right, rng, norm="l2", eps="0.5", labels=labels, classes=len(names), minimal=True)
             for label in minimal]  # fmt: skip
    cases = []
    for norm, eps in dict.fromkeys((one.norm, one.eps) for one in rows):
        own = [one for one in rows if (one.norm, one.eps) == (norm, eps)]
        outcomes = [MISCLASSIFIED if not ok else BROKEN if any(one.outcomes[k] == BROKEN for one in own) else ROBUST
                    for k, ok in enumerate(right)]  # fmt: skip
        left = outcomes.count(ROBUST)
        cases.append(WorstCase(norm=norm, eps=eps, attacks=tuple(one.label for one in own), unmoved=0, note="",
                               broken=outcomes.count(BROKEN), robust_accuracy=left / n, interval=wilson(left, n),
                               outcomes=tuple(outcomes)))  # fmt: skip
    clean = int(right.sum())
    made = {
        "n": n, "num_classes": len(names), "seed": 0, "batch_size": 128, "norm": "linf", "eps": radii[-1],
        "clean_correct": clean, "clean_accuracy": clean / n, "clean_interval": wilson(clean, n), "attacks": tuple(rows),
        "worst_cases": tuple(cases), "flags": (flagged("steps-not-converged", "Made up.", "warning", measured=0.01),),
        "data": {"name": "made-up", "split": "test", "fingerprint": hashlib.sha256(b"data").hexdigest(),
                 "indices_sha256": "00", "classes": list(names)},
        "checkpoint": {"path": "runs/made-up/best.pt", "sha256": "ab" * 32, "model": "small-cnn"},
        "versions": {"torch": "2"}, "command": "scl-defense benchmark runs/made-up/best.pt",
        "created": "2026-01-01T00:00:00+00:00", "labels": tuple(int(x) for x in labels),
        "predictions": tuple(int(x) for x in predictions), "indices": tuple(range(n)),
    }  # fmt: skip
    return EvaluationResult(**{**made, **more})


def pictures_of(result: EvaluationResult, folder: Path, shape=(1, 8, 8)):
    """Original images, and a file of examples at exactly the distances that the result tells."""
    rng = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(result.n, *shape, generator=rng)
    tensors = {}
    for one in result.attacks:
        sign = torch.randint(0, 2, images.shape, generator=rng).float() * 2 - 1
        size = torch.tensor([value or 0.0 for value in one.distances]).view(-1, 1, 1, 1)
        length = size if one.norm == "linf" else size / float(np.prod(shape)) ** 0.5
        tensors[one.label] = (images + sign * length).contiguous()
    file = folder / "examples.safetensors"
    save_file(tensors, file, metadata={"schema": "scl-defense-adversarial/1", "format": "pt"})
    return images, file
