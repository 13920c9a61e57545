"""A checkpoint as a graph that other programs run: ``torch.export`` or ONNX, checked against the network."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.checkpoint import LoadedClassifier, load_classifier
from scl_defense.errors import SclDefenseError, UserError
from scl_defense.plugins import PluginHost

Format = Literal["torch-export", "onnx"]
ENDINGS: dict[str, str] = {"torch-export": ".pt2", "onnx": ".onnx"}
OPSET = 18  # the lowest that torch writes without a conversion
TOLERANCE = 1e-4  # of a logit, relative to the largest: float32 in another order of additions
IMAGES = 64


@dataclass(frozen=True)
class Exported:
    """What was written. difference: the largest of a logit; agree: images with the same class, of ``images``."""

    path: Path
    format: Format
    images: int
    agree: int
    difference: float


def export(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    format: Format = "torch-export",
    force: bool = False,
    host: PluginHost | None = None,
) -> Exported:
    """Write the network of a checkpoint as a graph; the command ``scl-defense export`` is this call.

    Images in [0, 1], (N, C, H, W) with any N, go in, logits come out: the normalisation is inside. out: default beside
    the checkpoint; one that is there is only replaced with ``force``. The file is read back and run on images that the
    network has seen too, by another route than the one that wrote it (ONNX: by onnx's own reference evaluator); where
    the logits differ by more than 1e-4 of the largest, or a class differs that is not a tie, nothing is left behind.

    Raises :class:`UserError` for a checkpoint or a format that cannot be, :class:`SclDefenseError` for a graph that
    does not agree with its network.
    """
    if format not in get_args(Format):
        raise UserError(f"format '{format}' is unknown; write {' or '.join(get_args(Format))}")
    path = Path(checkpoint)
    target = path.with_suffix(ENDINGS[format]) if out is None else Path(out)
    if target.suffix != ENDINGS[format]:
        raise UserError(f"'{target}' must end in {ENDINGS[format]} for the format {format}")
    if target.exists() and not force:
        raise UserError(f"'{target}' exists; choose another --out, or replace it with --force")
    if not target.parent.is_dir():
        raise UserError(f"the folder '{target.parent}' does not exist; make it, or choose another --out")
    if format == "onnx":
        _needs_onnx(target)
    loaded = load_classifier(path, host=host)
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        run = _write_onnx(loaded, part) if format == "onnx" else _write_export(loaded, part)
        found = _compare(loaded, run)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return Exported(target, format, *found)


def _program(loaded: LoadedClassifier) -> torch.export.ExportedProgram:
    shape = loaded.image_shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = loaded.network.float().eval().requires_grad_(False)
            batch = torch.export.Dim("batch", min=1)
            return torch.export.export(network, (torch.rand(4, *shape),), dynamic_shapes=({0: batch},))
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise SclDefenseError(
                f"the network of '{loaded.path}' cannot be exported: {type(error).__name__}: {text}"
            ) from error


def _write_export(loaded: LoadedClassifier, path: Path) -> Callable[[Tensor], Tensor]:
    from scl_defense_benchmarks.exported import load_graph

    torch.export.save(_program(loaded), str(path))
    network = load_graph(path, "export")  # as somebody else would: nothing of a file that runs code

    def run(images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        return logits

    return run


def _needs_onnx(target: Path) -> None:
    if not all(find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError(f"writing '{target}' needs onnx and onnxscript: pip install 'scl-defense[onnx]'")


def _write_onnx(loaded: LoadedClassifier, path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    program = _program(loaded)
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(program, (torch.rand(4, *loaded.image_shape),), str(path), dynamo=True, verbose=False,
                              input_names=["images"], output_names=["logits"], opset_version=OPSET,
                              external_data=False)  # fmt: skip
    finally:
        log.setLevel(level)
    model = onnx.load(str(path))
    _plain_reshapes(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    evaluator = ReferenceEvaluator(str(path))
    (name,) = (one.name for one in model.graph.input)
    return lambda images: torch.from_numpy(np.asarray(evaluator.run(None, {name: images.numpy()})[0]))


def _plain_reshapes(model: Any) -> None:
    """``allowzero`` says what a size of 0 means; where no size is 0 it says nothing, and older readers refuse it."""
    from onnx import numpy_helper

    known = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in known and (known[node.input[1]] != 0).all():
            kept = [one for one in node.attribute if one.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _compare(loaded: LoadedClassifier, run: Callable[[Tensor], Tensor]) -> tuple[int, int, float]:
    """(images, equal classes, largest difference of a logit), over batches of 1, 2 and the rest."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, *loaded.image_shape, generator=rng)
    smooth = nn.functional.interpolate(images[::2, :, :2, :2], loaded.image_shape[1:], mode="bilinear")
    images[::2] = smooth  # noise alone is of one class in many networks
    network = loaded.network.float().eval()
    with torch.no_grad():
        wanted = network(images)
        got = torch.cat([run(part) for part in images.split([1, 2, IMAGES - 3])])
    if got.shape != wanted.shape:
        raise SclDefenseError(f"the graph gives {tuple(got.shape)}, its network {tuple(wanted.shape)}; not written")
    difference = float((got - wanted).abs().max())
    allowed = TOLERANCE * max(1.0, float(wanted.abs().max()))
    two = wanted.topk(2, 1).values
    tied = two[:, 0] - two[:, 1] <= 2 * allowed
    equal = got.argmax(1) == wanted.argmax(1)
    if not difference <= allowed or not bool((equal | tied).all()):  # `not <=`: NaN too
        raise SclDefenseError(
            f"the graph disagrees with its network: a logit differs by {difference:.3g} (allowed {allowed:.3g}), "
            f"{int(equal.sum())} of {IMAGES} images have the same class; not written"
        )
    return IMAGES, int(equal.sum()), difference
