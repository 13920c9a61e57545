"""What changes over a run besides the weights: learning rate, radius, augmentation strength.

All are functions of the step or epoch alone, so a resumed run has nothing to restore.
"""

import math

from scl_defense.config import TrainConfig
from scl_defense.threat import ThreatModel


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step ``step`` of ``steps``: linear warm-up, then half a cosine to zero."""
    warm = config.warmup * steps
    if step < warm:
        return config.peak_lr * (step + 1) / (warm + 1)
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def radius_at(config: TrainConfig, threat: ThreatModel, step: int, steps: int) -> ThreatModel:
    """The ball of step ``step``: from ``eps_start * eps`` linearly to eps over the first ``eps_ramp`` of all steps."""
    ramp = config.eps_ramp * steps
    if step >= ramp or config.eps_start == 1:
        return threat
    share = config.eps_start + (1 - config.eps_start) * step / ramp
    radius = share * threat.radius
    return ThreatModel(threat.norm, repr(min(radius, 1.0) if threat.norm == "linf" else radius))


def strength_at(config: TrainConfig, epoch: int) -> float:
    """The augmentation strength of an epoch; with ``strength_end=0`` the schedule of DynACL (Luo et al. 2023)."""
    if config.strength_end is None:
        return config.strength
    done = epoch // config.strength_every * config.strength_every / config.epochs
    return config.strength + (config.strength_end - config.strength) * done
