"""Is the network given the images it was trained on? Clean accuracy under other preprocessings and label orders.

A wrong normalisation, channel order, value range or order of classes makes every robustness number meaningless, and
nothing crashes. So a few clean images are tried with each of the usual ones. What fits better is said, never used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from scl_defense.guard import frozen
from scl_defense.models import Network
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.prepared import Channels, Prepared, Relabelled

MOST = 200  # images that are tried
BETTER = 0.10  # in accuracy: 32 x 32 networks differ by less between CIFAR-10's and CIFAR-100's constants
SIGNIFICANCE = 0.01  # of the exact McNemar test, divided by the number of preprocessings tried
GOOD_ENOUGH = 0.95  # then nothing is tried: no other can be clearly better

# Constants as they are usually written; RGB in [0, 1].
COLOUR: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "no": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-10 (older constants)": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "[-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0..255": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "0..255 minus ImageNet's mean": ((0.485, 0.456, 0.406), (1 / 255, 1 / 255, 1 / 255)),
}
GREY: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "no": ((0.0,), (1.0,)),
    "MNIST": ((0.1307,), (0.3081,)),
    "Fashion-MNIST": ((0.2860,), (0.3530,)),
    "[-1, 1]": ((0.5,), (0.5,)),
    "0..255": ((0.0,), (1 / 255,)),
}


@dataclass(frozen=True)
class Preprocessing:
    """mean, std: in RGB order of the data's channels, as fractions of [0, 1]; channels: what the network reads."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Channels = "rgb"

    @property
    def options(self) -> str:
        """As options of the command line. The network's order is that of the numbers there."""
        turn = -1 if self.channels == "bgr" else 1
        parts = [f"--mean {_joined(self.mean[::turn])} --std {_joined(self.std[::turn])}"]
        return " ".join(parts + (["--channels bgr"] if self.channels == "bgr" else []))

    def __str__(self) -> str:
        return f"{self.name} normalisation" + (" and channels in BGR order" if self.channels == "bgr" else "")


@dataclass(frozen=True)
class Finding:
    """accuracy: as given; better: with ``preprocessing`` and ``label_map`` (``None``: as given), on ``n`` images.

    p: of the exact McNemar test that both are equally right, times the number of trials (Bonferroni).
    """

    n: int
    accuracy: float
    better: float
    p: float
    preprocessing: Preprocessing | None
    label_map: tuple[int | None, ...] | None

    @property
    def what(self) -> str:
        """The sentence: ``12.1 % as given; 93.4 % with CIFAR-10 normalisation: add --mean ...``"""
        ways = [] if self.preprocessing is None else [str(self.preprocessing)]
        ways += [] if self.label_map is None else ["another order of the classes"]
        return (
            f"Clean accuracy on {self.n} images: {self.accuracy:.1%} as given; {self.better:.1%} with "
            f"{' and '.join(ways)}: add {self.remedy}".replace("%", " %")
        )

    @property
    def remedy(self) -> str:
        parts = [] if self.preprocessing is None else [self.preprocessing.options]
        parts += [] if self.label_map is None else [f"--label-map {_listed(self.label_map)}"]
        return " ".join(parts)


def find_better(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    given: Mapping[str, Any] | None = None,
    own: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    logits: Tensor | None = None,
) -> Finding | None:
    """What is clearly better than the preprocessing and label order as given, or ``None``.

    network: images (N, C, H, W) in [0, 1] -> logits, with the preprocessing ``given`` inside (``mean``, ``std``,
    ``channels``, ``label_map``; default: what :func:`given_in` finds). own: mean and std of the data. logits: (N, K),
    the network's answer, where it is known. At most 200 images are tried, spread over all.

    Clearly: at least 10 points, and significant after correction for the number of trials; a permutation of the
    outputs is fitted on one half of the images and judged on the other.
    """
    chosen = torch.linspace(0, len(images) - 1, min(MOST, len(images))).round().long().unique()
    images, labels = images[chosen.to(images.device)], labels[chosen.to(labels.device)]
    known = None if logits is None else logits[chosen.to(logits.device)]
    # Every other image of each class judges; the rest fits.
    order = torch.argsort(labels, stable=True).cpu()
    fit, judge = order[0::2], order[1::2]
    given = given_in(network) if given is None else given
    undo, label_map = _undo(given, images.shape[1]), given.get("label_map")
    with frozen(network), seeded_globals(0):
        logits = logits_of(network, images) if known is None else known
        truth = labels.cpu().numpy()
        outputs, as_given = logits.shape[1], decide(logits).cpu().numpy()
        base = as_given == truth
        if base.mean() >= GOOD_ENOUGH:
            return None
        trials = [(None, as_given)] + [
            (way, decide(logits_of(network, undo(prepared(images, way)))).cpu().numpy())
            for way in preprocessings(images.shape[1], own)
        ]
    found: list[Finding] = []
    count = 2 * len(trials) - 1
    for way, labelled in trials:
        right = labelled == truth
        if way is not None:
            found.append(_finding(base, right, count, way, None))
        mapped = _permutation(labelled[fit], truth[fit], outputs)
        relabelled = np.append(mapped, -1)[labelled[judge]] == truth[judge]
        whole = mapped.tolist()
        if label_map is not None:  # in terms of the network's own outputs
            whole = [None if k is None else whole[k] for k in label_map]
        found.append(_finding(base[judge], relabelled, count, way, tuple(whole)))
    clear = [f for f in found if f.better - f.accuracy >= BETTER and f.p < SIGNIFICANCE]
    # What changes less is believed first: another label order must add as much again.
    return max(clear, key=lambda f: f.better - BETTER * (f.label_map is not None), default=None)


def given_in(network: nn.Module) -> dict[str, Any]:
    """The preprocessing and label map that this project put around a network, or its own first layer."""
    found: dict[str, Any] = {}
    if isinstance(network, Relabelled):
        found["label_map"], network = network.label_map, network.network
    if isinstance(network, (Prepared, Network)):
        found |= {name: getattr(network.normalize, name).flatten().tolist() for name in ("mean", "std")}
        found["channels"] = getattr(network, "channels", "rgb")
    return found


def preprocessings(channels: int, own: tuple[Sequence[float], Sequence[float]] | None = None) -> list[Preprocessing]:
    table = dict(COLOUR if channels == 3 else GREY if channels == 1 else {})
    if own is not None and min(own[1]) > 0:
        table["the data's own"] = (tuple(own[0]), tuple(own[1]))
    orders: tuple[Channels, ...] = ("rgb", "bgr") if channels == 3 else ("rgb",)
    return [Preprocessing(name, mean, std, order) for order in orders for name, (mean, std) in table.items()]


def prepared(images: Tensor, way: Preprocessing) -> Tensor:
    """What a network trained this way reads, (N, C, H, W)."""
    mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (way.mean, way.std))
    ready = (images - mean) / std
    return ready.flip(1) if way.channels == "bgr" else ready


def _undo(given: Mapping[str, Any], channels: int) -> Any:
    """The images that the preprocessing inside the network turns into what it is handed here."""
    mean, std = given.get("mean") or (0.0,) * channels, given.get("std") or (1.0,) * channels

    def undo(ready: Tensor) -> Tensor:
        images = ready * ready.new_tensor(std).view(1, -1, 1, 1) + ready.new_tensor(mean).view(1, -1, 1, 1)
        return images.flip(1) if given.get("channels") == "bgr" else images

    return undo


def _permutation(labelled: np.ndarray, truth: np.ndarray, outputs: int) -> np.ndarray:
    """(outputs,) class of each output: the one-to-one assignment with the most images right (Hungarian method)."""
    counts = np.zeros((outputs, outputs))
    valid = (labelled >= 0) & (truth < outputs)
    np.add.at(counts, (labelled[valid], truth[valid]), 1)
    counts[np.arange(outputs), np.arange(outputs)] += 0.5  # where nothing is seen, the order stays
    return linear_sum_assignment(-counts)[1]


def _finding(
    base: np.ndarray,
    other: np.ndarray,
    trials: int,
    way: Preprocessing | None,
    label_map: tuple[int | None, ...] | None,
) -> Finding:
    won, lost = int((other & ~base).sum()), int((base & ~other).sum())
    # P(at least so many of won + lost fair coins show heads): one-sided exact McNemar test.
    tail = sum(math.comb(won + lost, k) for k in range(won, won + lost + 1)) / 2 ** (won + lost)
    p = min(1.0, trials * tail)
    return Finding(len(base), float(base.mean()), float(other.mean()), p, way, label_map)


def _joined(values: Sequence[float]) -> str:
    return "+".join(f"{value:.6g}" for value in values)


def _listed(label_map: Sequence[int | None]) -> str:
    return ",".join("-" if label is None else str(label) for label in label_map)
