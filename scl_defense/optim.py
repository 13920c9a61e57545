"""Optimizers, and the perturbation of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from scl_defense.config import TrainConfig


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, as the recipe says, over what asks for a gradient."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    lr, decay = config.peak_lr, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    momentum = config.momentum
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)


@contextmanager
def adversarial_weights(network: nn.Module, gamma: float) -> Iterator[None]:
    """Inside, every weight matrix has moved up its gradient: adversarial weight perturbation (Wu et al. 2020, eq. 8).

    w <- w + gamma * ||w|| * g / ||g||, layer by layer, with g the ``.grad`` of a backward pass just made (which is then
    cleared); biases and batch norm stay. Afterwards the weights are what they were, and the gradients made inside stay.
    """
    kept = []
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1 and weight.grad is not None:
                kept.append((weight, weight.detach().clone()))
                length = weight.grad.norm()
                weight.add_(weight.grad * (gamma * weight.norm() / length.clamp(min=1e-12)))
            weight.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)
