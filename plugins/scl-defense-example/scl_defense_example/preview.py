"""The contact sheet: eight digits, what a generator makes of them, and what it changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.config import make
from scl_defense.errors import UserError
from scl_defense.generation import generate
from scl_defense.plugins import default_host
from scl_defense.runtime import stream
from scl_defense.threat import ThreatModel
from scl_defense.types import Batch, Context

COUNT, SCALE, GAP = 8, 8, 4


def draw(
    name: str,
    options: Mapping[str, str],
    out: str,
    *,
    norm: str = "linf",
    eps: str | None = None,
    seed: int = 0,
    plugins: Sequence[str] = (),
) -> float:
    """Write the sheet and return how many times the difference is magnified.

    Raises :class:`UserError` for a generator that needs a network or labels, or makes nothing, and for a file that
    cannot be written.
    """
    from PIL import Image

    host = default_host(plugins)
    generator = make(host, "generator", name, options)
    if generator.needs:
        needs = ", ".join(sorted(generator.needs))
        raise UserError(f"generator '{name}' needs {needs} and preview has no network; choose one that needs nothing")
    digits = make(host, "dataset", "digits")
    threat = ThreatModel(norm, eps or digits.budgets[norm])
    images, labels = _digits(digits, "test")
    batch = Batch(images[:COUNT].repeat(2, 1, 1, 1, 1), labels[:COUNT], images[:COUNT], torch.arange(COUNT))
    context = Context(
        threat=threat,
        rng=stream(seed, "preview"),
        calibration=_digits(digits, "train")[0][:256],
        streams=lambda purpose, *counters: stream(seed, f"preview {purpose}", *counters),
        generator=f"generator '{name}'",
    )
    adversarial = generate(generator, batch, context, network=None)  # the core checks what comes back
    if not len(adversarial):
        raise UserError(f"generator '{name}' makes no adversarial views: there is nothing to draw")
    clean, difference = batch.images, adversarial[0] - batch.images
    magnify = 0.5 / max(float(difference.abs().max()), 1e-6)
    sheet = torch.stack([clean, adversarial[0], 0.5 + magnify * difference])
    try:
        Image.fromarray(_sheet(sheet).numpy()).save(Path(out), format="PNG")
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}") from None
    return magnify


def _digits(digits: object, split: str) -> tuple[Tensor, Tensor]:
    arrays = digits.load(split, Path())
    images = torch.from_numpy(arrays.images).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(arrays.labels)


def _sheet(rows: Tensor) -> Tensor:
    """(R, N, 1, H, W) in [0, 1] -> (height, width) uint8: every picture enlarged, on white."""
    count, (height, width) = rows.shape[0] * rows.shape[1], rows.shape[3:]
    large = F.interpolate(rows.view(count, 1, height, width), scale_factor=SCALE)
    framed = F.pad(large, [GAP // 2] * 4, value=1.0).view(*rows.shape[:2], *(SCALE * s + GAP for s in (height, width)))
    return (framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).clamp(0, 1) * 255).round().to(torch.uint8)
