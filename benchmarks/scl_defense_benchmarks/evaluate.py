"""Attack a network with a battery, on tensors, and check every example ourselves."""

import dataclasses

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.runtime import derive_seed, repeatable
from scl_defense_benchmarks import diagnostics
from scl_defense_benchmarks.attempt import Progress, Target, attempt, worst_case
from scl_defense_benchmarks.battery import Plan
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.results import EvaluationResult
from scl_defense_benchmarks.statistics import wilson


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    plan: Plan,
    *,
    seed: int,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Run a planned battery on tensors and judge every example it returns.

    network: (N, C, H, W) in [0, 1] -> logits (N, K), evaluated in eval mode and given back unchanged. images: (N, C,
    H, W) float32 in [0, 1], on the network's device; labels: (N,) integers in [0, K). Every attack gets all images
    that are classified rightly, ``batch_size`` at a time, each batch with a seed of its own, and a deep copy of the
    network to work on. Examples are judged in float32 on ``network`` itself, always in chunks of one size, so
    ``batch_size`` reaches a label through the attack alone.

    Raises :class:`UserError` for images or labels that cannot be; an attack's fault never leaves this function.
    """
    _check_inputs(network, images, labels, batch_size)
    labels = labels.to(images.device, torch.int64)
    with (
        frozen(network),
        seeded_globals(derive_seed(seed, "network")),
        repeatable("fp32"),
        torch.autocast(images.device.type, enabled=False),
    ):
        logits = logits_of(network, images)
        if int(labels.max()) >= logits.shape[1]:
            raise UserError(f"label {int(labels.max())} has no logit: the network has {logits.shape[1]} classes")
        target = Target(network, images, labels, decide(logits) == labels)
        flags = diagnostics.check_network(network, images, labels, logits)
        attempts = [
            attempt(target, planned, seed=seed, batch_size=batch_size, progress=progress) for planned in plan.attacks
        ]
    for one in attempts:
        flags += diagnostics.check_row(one.row)
        if one.wrote_input:
            flags.append(diagnostics.input_was_written(one.row.label))
    rows = tuple(one.row for one in attempts)
    families = [str(getattr(planned.attack, "family", "")) for planned in plan.attacks]
    flags += diagnostics.check_battery(rows, families)
    clean, n = int(target.correct.sum()), len(images)
    return EvaluationResult(
        n=n,
        num_classes=logits.shape[1],
        seed=seed,
        batch_size=batch_size,
        norm=plan.threat.norm,
        eps=plan.threat.eps,
        clean_correct=clean,
        clean_accuracy=clean / n,
        clean_interval=wilson(clean, n),
        attacks=rows,
        worst_cases=tuple(worst_case(threat, target, attempts) for threat in plan.threats()),
        flags=tuple(flags),
        left_out=tuple(dataclasses.asdict(one) for one in plan.left_out),
        device=str(images.device),
    )


def _check_inputs(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
    if not isinstance(network, nn.Module):
        raise UserError(f"the network must be a torch.nn.Module from images to logits, not {type(network).__name__}")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    if images.dim() != 4 or images.dtype != torch.float32 or len(images) == 0:
        raise UserError(f"images must be float32 (N, C, H, W) with N >= 1, not {images.dtype} {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise UserError(f"labels must be integers ({len(images)},), not {labels.dtype} {tuple(labels.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images must lie in [0, 1], they lie in [{low:g}, {high:g}]; divide by 255 and leave normalisation to the "
            "network's first layer, or eps means something else"
        )
    if int(labels.min()) < 0:
        raise UserError(f"label {int(labels.min())} is negative; labels count from 0")
