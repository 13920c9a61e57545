"""Attack a network with a battery, check every example ourselves, and say what is known about its robustness."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.plugins import PluginHost, default_host
from scl_defense.runtime import derive_seed, repeatable, select_device, versions
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks import diagnostics
from scl_defense_benchmarks.attempt import Progress, Target, attempt, worst_case
from scl_defense_benchmarks.battery import Plan, plan_attacks
from scl_defense_benchmarks.forward import check_logits, decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.results import EvaluationResult, check_writable, write
from scl_defense_benchmarks.statistics import wilson


def benchmark(
    checkpoint: str | Path | nn.Module,
    *,
    attacks: str | Iterable[str] = "fgsm,pgd,cw",
    data: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm: str | None = None,
    eps: str | float | None = None,
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    out: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> EvaluationResult:
    """Evaluate a trained checkpoint, or a network of your own, on the test split.

    checkpoint: a file, or an ``nn.Module`` from images in [0, 1] to logits; the latter needs ``data`` and stays on its
    device unless ``device`` names one. attacks: see :func:`scl_defense_benchmarks.battery.parse_battery`. data,
    data_options, data_root: default: what the checkpoint was trained on. model, model_options, mean, std: for a file of
    bare weights, the registered network they belong to and the normalisation before it (default none); ``data`` is then
    needed too, and a checkpoint that knows its own refuses them. norm, eps: the main ball; default: the checkpoint's,
    else Linf at the data's usual radius. n: a fixed stratified subset of so many test images. out: where the result is
    written as JSON. command: recorded in the result as it stands.

    Raises :class:`UserError` before anything is attacked: no data, a checkpoint that does not fit the data, a
    battery that cannot be planned. An attack that fails later becomes a row of the result.
    """
    from scl_defense.data import open_data

    host = default_host(plugins)
    opened = None if data is None else open_data(data, root=data_root, options=data_options, host=host)
    foreign = {"host": host, "model": model, "model_options": model_options, "mean": mean, "std": std}
    if opened is not None:
        foreign |= {"classes": opened.classes, "image_shape": opened.image_shape}
    subject = _open_subject(checkpoint, host, device, foreign)
    if opened is None:
        if isinstance(checkpoint, nn.Module):
            raise UserError("a bare network does not say which data it belongs to; name it with data")
        if subject.data is None:
            raise UserError("the checkpoint does not say which data it belongs to; name it with data (--data)")
        options = subject.data_options if data_options is None else data_options
        root = data_root
        if root is None and subject.data_root and Path(subject.data_root).is_dir():
            # A stranger's file may say where to look, never where to write.
            root, options = subject.data_root, _without_download(host, subject.data, options)
        opened = open_data(subject.data, root=root, options=options, host=host)
    name = opened.name
    if subject.num_classes is not None and subject.num_classes != len(opened.classes):
        raise UserError(
            f"the checkpoint has {subject.num_classes} classes, '{name}' has {len(opened.classes)}; give the data it "
            "was trained on"
        )
    if subject.image_shape is not None and subject.image_shape != tuple(opened.image_shape):
        raise UserError(
            f"the checkpoint reads images {subject.image_shape}, '{name}' has {tuple(opened.image_shape)} (C, H, W); "
            "give the data it was trained on"
        )
    if out is not None:
        check_writable(out)  # before hours of attacks, not after
    threat = _main_threat(norm, eps, subject.threat, name, opened.budgets)
    plan = plan_attacks(attacks, host=host, threat=threat, budgets=opened.budgets, classes=len(opened.classes))
    split = opened.split("test", limit=n, device=subject.device)
    images = split.float_images()
    _check_fit(subject.network, images[:1], len(opened.classes), name)
    found = evaluate(subject.network, images, split.labels, plan, seed=seed, batch_size=batch_size, progress=progress)
    result = dataclasses.replace(
        found,
        data={
            "name": name,
            "split": "test",
            "fingerprint": opened.fingerprint("test"),
            "indices_sha256": hashlib.sha256(split.indices.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
            "classes": list(opened.classes),
        },
        checkpoint=subject.about,
        plugins=tuple(host.provenance()),
        versions=versions(),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out is not None:
        write(result, out)
    return result


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


@dataclass(frozen=True)
class _Subject:
    """A network and what is known of it; ``None``: a bare module does not say."""

    network: nn.Module
    device: torch.device
    about: Mapping[str, Any]
    num_classes: int | None = None
    image_shape: tuple[int, ...] | None = None
    threat: ThreatModel | None = None
    data: str | None = None
    data_options: Mapping[str, Any] | None = None
    data_root: str | None = None


def _open_subject(
    checkpoint: str | Path | nn.Module, host: PluginHost, device: str, foreign: Mapping[str, Any]
) -> _Subject:
    if isinstance(checkpoint, nn.Module):
        network = checkpoint if device == "auto" else checkpoint.to(select_device(device))
        tensor = next(iter((*network.parameters(), *network.buffers())), torch.empty(0))
        return _Subject(network, tensor.device, {"path": None, "network": type(checkpoint).__qualname__})
    from scl_defense.checkpoint import load_classifier

    if not isinstance(checkpoint, (str, Path)):
        raise UserError(f"a checkpoint is a path or a torch.nn.Module, not {type(checkpoint).__name__}")
    where = select_device(device)
    loaded = load_classifier(checkpoint, host=host, device=where, options=foreign)
    ignored = [name for name in ("model", "model_options", "mean", "std") if foreign[name] is not None]
    if ignored and loaded.data is not None:
        raise UserError(f"'{checkpoint}' knows its own network and normalisation; leave {', '.join(ignored)} out")
    about = {"path": str(loaded.path), "sha256": loaded.sha256, **_json_part(loaded.meta)}
    return _Subject(
        loaded.network,
        where,
        about,
        len(loaded.classes),
        tuple(loaded.image_shape),
        loaded.threat,
        loaded.data,
        loaded.data_options,
        loaded.data_root,
    )


def _without_download(host: PluginHost, data: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = data in host["dataset"] and "download" in getattr(host["dataset"].get(data), "__dataclass_fields__", {})
    return {**(options or {}), **({"download": False} if known else {})}


def _json_part(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's description is plain data: no tensors, no random states."""
    plain = {}
    for name, value in meta.items():
        try:
            plain[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return plain


def _main_threat(
    norm: str | None, eps: str | float | None, own: ThreatModel | None, name: str, budgets: Mapping[str, str]
) -> ThreatModel:
    chosen = ThreatModel(norm, "0").norm if norm is not None else own.norm if own is not None else "linf"
    if eps is not None:
        return ThreatModel(chosen, str(eps))
    if own is not None and own.norm == chosen:
        return own
    if chosen not in budgets:
        raise UserError(f"no usual {chosen} radius is known for '{name}'; give one with eps (--eps 8/255)")
    return ThreatModel(chosen, budgets[chosen])


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


def _check_fit(network: nn.Module, image: Tensor, classes: int, name: str) -> None:
    with frozen(network), seeded_globals(0), torch.no_grad():
        try:
            logits = check_logits(network(image), 1)
        except UserError:
            raise
        except Exception as error:  # whatever a stranger's network raises on these images
            fault = " ".join(str(error).split())[:200]
            raise UserError(f"the network cannot read images {tuple(image.shape[1:])} of '{name}': {fault}") from None
    if logits.shape[1] != classes:
        raise UserError(f"the network has {logits.shape[1]} outputs, '{name}' has {classes} classes")
