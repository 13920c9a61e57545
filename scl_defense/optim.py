"""Optimizers, and a learning-rate schedule without state."""

import math

import torch
from torch import nn

from scl_defense.config import TrainConfig


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, as the recipe says."""
    settings = {"lr": config.peak_lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **settings)
    momentum = config.momentum
    return torch.optim.SGD(network.parameters(), momentum=momentum, nesterov=momentum > 0, **settings)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step ``step`` of ``steps``: linear warm-up, then half a cosine to zero.

    A function of the step alone, so a resumed run has nothing to restore.
    """
    warm = config.warmup * steps
    if step < warm:
        return config.peak_lr * (step + 1) / (warm + 1)
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
