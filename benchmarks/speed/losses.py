"""Part (c): SupCon and NT-Xent, forward and backward: time, peak memory and gradients against the peers'."""

import ctypes
import ctypes.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from scl_defense import losses
from speed.records import available_memory
from speed.rivals import imported
from speed.timing import Budget, NotInstalled, interleaved, ratio

TEMPERATURE = 0.1
#: Rows that a side is not asked for beyond: 2.1 GiB at 512.
_MOST = {("ntxent", "pytorch-metric-learning"): 256}
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Options:
    """rows: embeddings in a batch, two views of half as many images. dim: their width."""

    seconds: float = 120.0
    repeats: int = 7
    rows: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    dim: int = 128
    classes: int = 10


def measure(options: Options, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    groups = [(name, rows) for rows in options.rows for name in ("supcon", "ntxent")]
    shares = Budget(options.seconds, len(groups)).shares()
    found: list[dict[str, Any]] = []
    for name, rows in groups:
        say(f"loss: {name}, {rows} rows")
        found += _group(name, rows, options, next(shares))
    return found


def _group(name: str, rows: int, options: Options, seconds: float) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(rows)
    embed = torch.randn((rows, options.dim), generator=rng)
    labels = torch.randint(options.classes, (rows // 2,), generator=rng).repeat(2)
    sides = SUPCON if name == "supcon" else NTXENT
    made: dict[str, Loss | None] = {side: _built(build) for side, build in sides.items()}
    calls = {
        side: (lambda loss=loss, side=side: _step(loss, embed, labels, name, side, rows)) for side, loss in made.items()
    }
    found = interleaved(calls, repeats=options.repeats, until=perf_counter() + seconds, warm=True)
    result = []
    for side, timing in found.items():
        row: dict[str, Any] = {"kind": "loss", "loss": name, "rows": rows, "dim": options.dim, "side": side}
        row |= timing.row()
        loss = made[side]
        if timing.ok and loss is not None:
            row["peak_mib"] = peak(lambda loss=loss, side=side: _step(loss, embed, labels, name, side, rows))
            row["value"] = float(f"{timing.value[0]:.7g}")
            if side != "ours" and found["ours"].ok:
                row["over ours"] = round(ratio(timing, found["ours"]) or 0.0, 4)
                mine, theirs = found["ours"].value[1], timing.value[1]
                row["gradient_difference"] = float(f"{float((mine - theirs).abs().max() / theirs.abs().max()):.3g}")
        result.append(row)
    return result


def _step(loss: Loss | None, embed: Tensor, labels: Tensor, name: str, side: str, rows: int) -> tuple[float, Tensor]:
    if loss is None:
        raise NotInstalled(f"pip install {side}")
    if rows > _MOST.get((name, side), rows):
        raise MemoryError("it makes every pair of a positive and a negative pair: its memory grows with the cube")
    if rows >= 4096 and 12 * 4 * rows**2 > available_memory() > 0:  # what the dense ones take, and more
        raise MemoryError(f"{12 * 4 * rows**2 >> 20} MiB may be needed and are not free")
    point = embed.clone().requires_grad_()
    value = loss(point, labels)
    (gradient,) = torch.autograd.grad(value, point)
    return float(value.detach()), gradient


def _built(build: Callable[[], Loss]) -> Loss | None:
    try:
        return build()
    except NotInstalled:
        return None


def _ours_supcon() -> Loss:
    return lambda embed, labels: losses.supcon(embed, labels, TEMPERATURE)


def _ours_ntxent() -> Loss:
    return lambda embed, labels: losses.ntxent(embed.view(2, -1, embed.shape[1]), TEMPERATURE)


def _metric_learning(name: str) -> Callable[[], Loss]:
    def build() -> Loss:
        library = imported("pytorch_metric_learning.losses", "pytorch-metric-learning")
        loss = getattr(library, name)(temperature=TEMPERATURE)
        if name == "SupConLoss":
            return lambda embed, labels: loss(embed, labels)
        return lambda embed, labels: loss(embed, torch.arange(len(embed) // 2).repeat(2))

    return build


def _lightly() -> Loss:
    loss = imported("lightly.loss", "lightly").NTXentLoss(temperature=TEMPERATURE)
    return lambda embed, labels: loss(*embed.chunk(2))


def _dense() -> Loss:
    """The form of the reference implementation (Khosla et al. 2020): the whole matrix and a mask of positives."""

    def loss(embed: Tensor, labels: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(embed, dim=1)
        similarity = z @ z.T / TEMPERATURE
        similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
        off = 1 - torch.eye(len(z))
        mask = (labels[:, None] == labels[None, :]).float() * off
        log_probability = similarity - (similarity.exp() * off).sum(1, keepdim=True).log()
        return -((mask * log_probability).sum(1) / mask.sum(1)).mean()

    return loss


SUPCON: dict[str, Callable[[], Loss]] = {
    "ours": _ours_supcon,
    "pytorch-metric-learning": _metric_learning("SupConLoss"),
    "dense reference": _dense,
}
NTXENT: dict[str, Callable[[], Loss]] = {
    "ours": _ours_ntxent,
    "pytorch-metric-learning": _metric_learning("NTXentLoss"),
    "lightly": _lightly,
}


def peak(call: Callable[[], Any]) -> float | None:
    """MiB that ``call`` needs at its peak beyond what was held before; ``None`` where the system does not tell."""
    clear = Path("/proc/self/clear_refs")
    libc = ctypes.util.find_library("c")
    try:
        if libc is not None:
            ctypes.CDLL(libc).malloc_trim(0)  # what was freed before must not be used again unseen
        clear.write_text("5")  # the peak starts from here
        before = _status("VmRSS")
        call()
        return round((_status("VmHWM") - before) / 1024, 1)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
