"""Lending a network to foreign code and getting it back unchanged."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def frozen(*modules: nn.Module, training: bool = False) -> Iterator[None]:
    """Inside: ``eval()`` (or ``train()``), no parameter asks for a gradient. After, also after an exception: every
    module's own train/eval flag, every ``requires_grad``, every ``.grad`` object and every buffer is what it was.
    """
    flags = [(module, module.training) for root in modules for module in root.modules()]
    parameters = [(p, p.requires_grad, p.grad) for root in modules for p in root.parameters()]
    kept_grads = [None if grad is None else grad.clone() for _, _, grad in parameters]
    places = {id(module): module for root in modules for module in root.modules()}.values()
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in places
        for name, buffer in module._buffers.items()
    ]
    for root in modules:
        root.train(training)
    for parameter, _, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for (parameter, needed, grad), values in zip(parameters, kept_grads, strict=True):
                parameter.requires_grad_(needed)
                parameter.grad = grad
                if grad is not None and values is not None:
                    grad.copy_(values)
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer  # forward may have replaced it: self.seen = self.seen + 1
                if buffer is not None and values is not None:
                    buffer.copy_(values)


@contextmanager
def global_random_state() -> Iterator[None]:
    """Inside, the global generators of torch, NumPy and Python may be used; after, they are where they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
