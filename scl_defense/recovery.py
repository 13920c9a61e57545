"""What training does when a batch does not fit into memory, or when its loss or gradient is no number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scl_defense import checkpoint
from scl_defense.sharing import Piece
from scl_defense.types import Batch, StepOutput

MOST_SKIPPED = 10  # batches a run with on_nan="skip" leaves out; more of them are no accident
BATCH_FILE = "not-finite.pt"


class NotFinite(Exception):
    """The loss or the gradient of a batch is NaN or infinite; ``what``: which, in words."""

    def __init__(self, what: str):
        super().__init__(what)
        self.what = what


@dataclass
class Made:
    """The parts of a batch that are forwarded together, each with its adversarial views (A, N, C, H, W)."""

    parts: list[tuple[Piece, Tensor]]

    @property
    def adversarial(self) -> Tensor:
        return torch.cat([made for _, made in self.parts], 1)


def joined(outputs: Sequence[tuple[float, StepOutput]]) -> StepOutput:
    """The mean over parts, each with its share of the images; one part is itself."""
    if len(outputs) == 1:
        return outputs[0][1]
    metrics: dict[str, float] = {}
    for share, output in outputs:
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + share * float(value)
    return StepOutput(torch.stack([share * output.loss.detach() for share, output in outputs]).sum(), metrics)


def gradient_norm(network: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))


def save_batch(folder: Path, batch: Batch, adversarial: Tensor, **about: str | int | float) -> Path:
    """Keep a batch for inspection: ``torch.load(path)`` gives its views, adversarial views, labels and indices."""
    path = folder / BATCH_FILE
    checkpoint.save(
        path,
        {
            "format": "scl-defense-batch/1",
            **about,
            "indices": batch.indices.cpu(),
            "labels": batch.labels.cpu(),
            "images": batch.images.cpu(),
            "views": batch.views.cpu(),
            "adversarial": adversarial.cpu(),
        },
    )
    return path
