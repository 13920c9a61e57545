"""The least that passes can cost here: nothing but forward and input-gradient passes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
import torch.nn.functional as F
from scl_defense_benchmarks.twin import Twin, twin_of
from torch import Tensor, nn

from scl_defense.guard import frozen
from scl_defense.runtime import autocast

Precision = Literal["fp32", "bf16"]
#: ``loop``: one batch after the other on the plain network. ``side by side``: on folded, channels-last copies, a batch
#: on every core: the most that this machine was seen to give.
Kind = Literal["loop", "side by side"]


def passes(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    precision: Precision,
    kind: Kind,
    gradient: bool = True,
    batch: int = 128,
) -> Callable[[], None]:
    """A call that passes every image ``steps`` times, forward and (gradient) back to the image, parameters frozen."""
    threads = torch.get_num_threads() if kind == "side by side" else 1
    size = min(batch, -(-len(images) // threads))
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    if kind == "loop":
        return lambda: _on(network, parts, steps, precision, gradient)
    twins = [twin_of(network, images[:8], precision) for _ in range(threads)]

    def side_by_side() -> None:
        before = torch.get_num_threads()

        def work(place: int) -> None:
            torch.set_num_threads(1)
            _on(twins[place], parts[place::threads], steps, precision, gradient)

        try:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
        finally:
            torch.set_num_threads(before)

    return side_by_side


def _on(
    network: nn.Module, parts: list[tuple[Tensor, Tensor]], steps: int, precision: Precision, gradient: bool
) -> None:
    plain = not isinstance(network, Twin)  # a twin casts by itself
    with frozen(network):
        for images, labels in parts:
            for _ in range(steps):
                point = images.detach().requires_grad_(gradient)
                with torch.set_grad_enabled(gradient), autocast(images.device, precision if plain else "fp32"):
                    logits = network(point)
                if gradient:
                    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
                    torch.autograd.grad(loss, point)


def cost(forwards: float, backwards: float, unit: dict[str, float]) -> float:
    """Seconds of so many passes an image at the floor. unit: seconds of a ``both`` and of a ``forward`` pass."""
    return backwards * unit["both"] + max(0.0, forwards - backwards) * unit["forward"]
