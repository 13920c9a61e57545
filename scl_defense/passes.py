"""Counting what training costs in units that do not depend on the machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Passes:
    """Image passes through an encoder. forwards: all of them. backwards: those that a gradient was taken through."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def counted(*encoders: nn.Module) -> Iterator[Passes]:
    """Count the passes of ``encoders`` (the same one twice counts once) while inside.

    A pass counts as one with a gradient when its output has a graph; everything in this project that builds a graph
    goes backward through it once.
    """
    passes = Passes()

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        passes.forwards += len(output)
        passes.backwards += len(output) * output.requires_grad

    handles = [encoder.register_forward_hook(count) for encoder in {id(part): part for part in encoders}.values()]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
