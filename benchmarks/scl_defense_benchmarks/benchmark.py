"""The command ``scl-defense benchmark`` as a call: open the network and its data, attack, report."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from scl_defense.errors import UserError
from scl_defense.plugins import default_host
from scl_defense.runtime import versions
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.attempt import Progress
from scl_defense_benchmarks.battery import plan_attacks
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.results import EvaluationResult, check_writable, write
from scl_defense_benchmarks.subject import check_fit, open_subject, without_download


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
    subject = open_subject(checkpoint, host, device, foreign)
    if opened is None:
        if isinstance(checkpoint, nn.Module):
            raise UserError("a bare network does not say which data it belongs to; name it with data")
        if subject.data is None:
            raise UserError("the checkpoint does not say which data it belongs to; name it with data (--data)")
        options = subject.data_options if data_options is None else data_options
        root = data_root
        if root is None and subject.data_root and Path(subject.data_root).is_dir():
            # A stranger's file may say where to look, never where to write.
            root, options = subject.data_root, without_download(host, subject.data, options)
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
    check_fit(subject.network, images[:1], len(opened.classes), name)
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
