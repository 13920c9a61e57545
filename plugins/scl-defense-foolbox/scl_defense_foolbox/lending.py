"""What every library is given, and what surrounds it."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense import UserError


def imported(module: str, distribution: str) -> ModuleType:
    """The imported library; :class:`UserError` where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{distribution} is not usable here ({' '.join(str(error).split())}); install it: "
            f"pip install {distribution}"
        ) from None


class Contiguous(nn.Module):
    """A copy of the network, in eval mode and with frozen weights: the library keeps the copy, never the original."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.float())


@contextmanager
def lent(rng: torch.Generator, device: torch.device) -> Iterator[None]:
    """Global generators seeded from ``rng`` and put back; gradients are recorded."""
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    kept, kept_numpy, kept_python = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        torch.random.set_rng_state(kept)
        np.random.set_state(kept_numpy)
        random.setstate(kept_python)


def attempt(
    call: Callable[[nn.Module, Tensor, Tensor], Tensor],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """``call(network, images, labels)`` on copies. What is not finite comes back as the image, the rest in the box."""
    if len(images) == 0:
        return images.clone()
    with lent(rng, images.device):
        made = call(Contiguous(classifier), images.detach().clone().contiguous(), labels.long().clone())
    made = made.detach().to(images)
    finite = made.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
    return torch.where(finite, made, images).clamp(0, 1)
