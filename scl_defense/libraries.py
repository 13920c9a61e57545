"""For attacks that another library makes: what it is lent, and what is taken back. Public, for plugins.

A library may change modes and gradients of the network, write into the images, draw from the global generators and
return what is no image. None of it reaches the evaluation that called the attack.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.guard import global_random_state

__all__ = ["attempt", "imported"]


def imported(module: str, distribution: str) -> ModuleType:
    """The library, imported when it is needed. :class:`UserError`, with the remedy, where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{distribution} is not usable here ({' '.join(str(error).split())}); install it: "
            f"pip install {distribution}"
        ) from None


def attempt(
    call: Callable[[nn.Module, Tensor, Tensor], Tensor],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """``call(network, images, labels)`` on copies of all three -> images like ``images``, (N, C, H, W) in [0, 1].

    network: in eval mode, without gradients of its parameters, float32 in. The global generators of torch, NumPy and
    Python are seeded from ``rng`` meanwhile. An example that is not finite comes back as its image, the rest inside the
    box; the ball is the evaluation's business. No image, no call.

    >>> import torch
    >>> images, labels = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    >>> outside = lambda network, images, labels: images + 9
    >>> attempt(outside, torch.nn.Flatten(), images, labels, torch.Generator()).unique()
    tensor([1.])
    """
    if len(images) == 0:
        return images.clone()
    with _lent(rng):
        made = call(_Copy(classifier), images.detach().clone().contiguous(), labels.long().clone())
    made = made.detach().to(images)
    finite = made.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
    return torch.where(finite, made, images).clamp(0, 1)


class _Copy(nn.Module):
    """A copy of the network, in eval mode and with frozen weights: the library keeps the copy, never the original."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.float())
        return logits


@contextmanager
def _lent(rng: torch.Generator) -> Iterator[None]:
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with global_random_state(), torch.enable_grad():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
