"""The command ``scl-defense benchmark`` as a call: open the network and its data, attack, report."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost, default_host
from scl_defense.runtime import derive_seed, versions
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.attempt import Progress
from scl_defense_benchmarks.audited_data import open_named
from scl_defense_benchmarks.evaluate import Mode, evaluate
from scl_defense_benchmarks.planning import plan_battery
from scl_defense_benchmarks.results import Report, check_writable, write, write_per_image
from scl_defense_benchmarks.state import identity_of, locked, open_state, state_path
from scl_defense_benchmarks.subject import Subject, check_fit, open_subject, without_download


def benchmark(
    checkpoint: str | Path | nn.Module,
    images: Any = None,
    labels: Any = None,
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
    eps: str | float | Iterable[str | float] | None = None,
    n: int | None = None,
    mode: Mode = "independent",
    time_limit: float | None = None,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    out: str | Path | None = None,
    per_image: str | Path | None = None,
    save_examples: str | Path | None = None,
    restart: bool | Literal["if-stale"] = False,
    probes: Literal["quick", "deep", "none"] = "quick",
    surrogate: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    **foreign: Any,
) -> Report:
    """Evaluate a trained checkpoint, or a network of your own, on the test split or on images of your own.

    checkpoint: a file, or an ``nn.Module`` from images in [0, 1] to logits; the latter needs ``images`` or ``data`` and
    stays on its device unless ``device`` names one, and comes back as it was. images, labels: tensors or arrays, (N, C,
    H, W) in [0, 1], or uint8 from 0 to 255, and (N,) integers; they take the place of ``data``.

    attacks: see :func:`scl_defense_benchmarks.battery.parse_battery`; every attack takes ``restarts=K``. data,
    data_options, data_root: default: what the checkpoint was trained on. model, model_options, mean, std and what else
    ``foreign`` holds (head, weights, channels, label_map, trust_pickle): for a file that this project did not write;
    ``data`` is then needed too, and a checkpoint that knows its own refuses them.

    norm, eps: the main ball; default: the checkpoint's, else Linf at the data's usual radius. Several eps, as a list or
    ``"2/255,4/255,8/255"``, are a curve, and the largest is the main one. n: a fixed stratified subset of so many
    images. mode, time_limit (seconds), batch_size, probes: see :func:`scl_defense_benchmarks.evaluate.evaluate`.
    surrogate: the checkpoint for attacks that transfer from another network.

    out: where the result is written as JSON. Beside it, until the battery is complete, lies what was found so far: the
    same call goes on there after a kill or a time limit, another one is refused, and ``restart`` throws it away
    (``"if-stale"``: only when it belongs to another question). per_image: ``FILE.csv``, a line an attack and image.
    save_examples: ``FILE.safetensors``, the examples as float32. command: recorded in the result as it stands.

    Raises :class:`UserError` before anything is attacked: no data, a checkpoint that does not fit the data, a
    battery that cannot be planned. An attack that fails later becomes a row of the result.
    """
    host = default_host(plugins)
    pair = None if images is None and labels is None else _own_images(images, labels, n)
    if pair is not None and data is not None:
        raise UserError("images and data are both given; leave one out")
    options: dict[str, Any] = {"host": host, "model": model, "model_options": model_options, "mean": mean, "std": std}
    options |= foreign
    opened = None if data is None else open_named(data, root=data_root, options=data_options, host=host)
    if opened is not None:
        options |= {"classes": opened.classes, "image_shape": opened.image_shape}
    elif pair is not None:
        options |= {"image_shape": tuple(pair.images.shape[1:])}
    subject = open_subject(checkpoint, host, device, options)
    if opened is None and pair is None:
        opened = _own_data(checkpoint, subject, host, data_options, data_root)
    if opened is not None:
        _check_data(subject, opened)
        name, budgets, classes, shape = opened.name, opened.budgets, len(opened.classes), tuple(opened.image_shape)
    else:
        name, budgets, shape = "your images", {}, tuple(pair.images.shape[1:])
        classes = subject.num_classes or _outputs(subject, pair.images[:1])
    for path in (path for path in (out, per_image, save_examples) if path is not None):
        _check_target(path, is_result=path is out)  # before hours of attacks, not after
    if per_image is not None and Path(per_image).suffix != ".csv":
        raise UserError(f"'{per_image}' must end in .csv: a line an attack and image")
    threats = _main_threats(norm, eps, subject.threat, name, budgets)
    about = {"image_shape": shape, "surrogate": None if surrogate is None else str(surrogate)}
    if opened is not None:
        split = opened.split("test", limit=n, device=subject.device)
        chosen = _Chosen(split.float_images(), split.labels, split.indices.cpu())
    else:
        chosen = _Chosen(pair.images.to(subject.device), pair.labels.to(subject.device), pair.indices)
    plan = plan_battery(
        attacks, host=host, threats=threats, budgets=budgets, classes=classes, n=len(chosen.images), **about
    )
    check_fit(subject.network, chosen.images[:1], classes, name)
    state_file = None if out is None else state_path(out)
    known = {key: subject.about[key] for key in ("sha256",) if key in subject.about}
    with contextlib.nullcontext() if out is None else locked(out):
        if restart == "if-stale" and state_file is not None:
            asked = identity_of(
                subject.network, chosen.images, chosen.labels.long(), plan.attacks, seed=seed, mode=mode, about=known
            )
            restart = _is_stale(state_file, asked)
        found = evaluate(
            subject.network,
            chosen.images,
            chosen.labels,
            plan,
            seed=seed,
            batch_size=batch_size,
            mode=mode,
            time_limit=time_limit,
            state_file=state_file,
            restart=bool(restart),
            examples_file=save_examples,
            probes=probes,
            about=known,
            progress=progress,
        )
        result = dataclasses.replace(
            found,
            data=None if opened is None else _about_data(opened, chosen),
            indices=tuple(chosen.indices.tolist()),
            checkpoint=subject.about,
            plugins=tuple(host.provenance()),
            versions=versions(),
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if per_image is not None:
            write_per_image(result, per_image)
        if out is not None:
            write(result, out)
        if state_file is not None and result.complete:
            state_file.unlink(missing_ok=True)
    return result


@dataclass(frozen=True)
class _Chosen:
    """The images that are attacked: float32 (N, C, H, W) in [0, 1], labels (N,), and their places in the data (N,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def _own_images(images: Any, labels: Any, n: int | None) -> _Chosen:
    from scl_defense.data import stratified_subset

    if images is None or labels is None:
        raise UserError("images and labels belong together; give both")
    images, labels = _tensor("images", images), _tensor("labels", labels)
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif images.is_floating_point():
        images = images.float()
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(images):
        raise UserError(f"labels must be integers ({len(images)},), not {labels.dtype} {tuple(labels.shape)}")
    if n is not None and not 1 <= n <= len(images):
        raise UserError(f"n is {n}; it must be at least 1 and at most {len(images)}, the number of images")
    indices = torch.arange(len(images))
    if n is not None:
        indices = torch.from_numpy(stratified_subset(labels, n, derive_seed(0, "limit-test")))
    return _Chosen(images[indices.to(images.device)], labels[indices.to(labels.device)], indices)


def _tensor(what: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    try:
        return torch.from_numpy(np.array(given))
    except (TypeError, ValueError):
        raise UserError(f"{what} must be a tensor or an array of numbers, not {type(given).__name__}") from None


def _own_data(
    checkpoint: Any, subject: Subject, host: PluginHost, options: Mapping[str, Any] | None, root: str | Path | None
) -> Any:
    from scl_defense.data import open_data

    if isinstance(checkpoint, nn.Module):
        raise UserError("a bare network does not say which data it belongs to; name it with data, or give images")
    if subject.data is None:
        raise UserError("the checkpoint does not say which data it belongs to; name it with data (--data)")
    options = subject.data_options if options is None else options
    if root is None and subject.data_root and Path(subject.data_root).is_dir():
        # A stranger's file may say where to look, never where to write.
        root, options = subject.data_root, without_download(host, subject.data, options)
    return open_data(subject.data, root=root, options=options, host=host)


def _check_data(subject: Subject, opened: Any) -> None:
    name, classes, shape = opened.name, len(opened.classes), tuple(opened.image_shape)
    if subject.num_classes is not None and subject.num_classes != classes:
        raise UserError(
            f"the checkpoint has {subject.num_classes} classes, '{name}' has {classes}; give the data it was trained on"
        )
    if subject.image_shape is not None and subject.image_shape != shape:
        raise UserError(
            f"the checkpoint reads images {subject.image_shape}, '{name}' has {shape} (C, H, W); "
            "give the data it was trained on"
        )


def _outputs(subject: Subject, image: Tensor) -> int:
    """How many classes a bare network tells apart."""
    from scl_defense.guard import frozen
    from scl_defense_benchmarks.library_guard import seeded_globals

    with frozen(subject.network), seeded_globals(0), torch.no_grad():
        try:
            output = subject.network(image.to(subject.device))
        except Exception as error:  # whatever a stranger's network raises on these images
            fault = " ".join(str(error).split())[:200]
            raise UserError(f"the network cannot read images {tuple(image.shape[1:])}: {fault}") from None
    return int(output.shape[-1]) if isinstance(output, Tensor) and output.dim() == 2 else 2  # check_fit says the rest


def _about_data(opened: Any, chosen: _Chosen) -> dict[str, Any]:
    return {
        "name": opened.name,
        "split": "test",
        "fingerprint": opened.fingerprint("test"),
        "indices_sha256": hashlib.sha256(chosen.indices.numpy().astype("<i8").tobytes()).hexdigest(),
        "classes": list(opened.classes),
    }


def _check_target(path: str | Path, *, is_result: bool) -> None:
    if is_result:
        check_writable(path)
        return
    if Path(path).is_dir():
        raise UserError(f"'{path}' is a directory; give it a file name")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{Path(path).parent}': {error.strerror}") from None


def _is_stale(path: Path, identity: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    try:
        open_state(path, identity)
    except UserError:
        return True
    return False


def _main_threats(
    norm: str | None,
    eps: str | float | Iterable[str | float] | None,
    own: ThreatModel | None,
    name: str,
    budgets: Mapping[str, str],
) -> list[ThreatModel]:
    chosen = ThreatModel(norm, "0").norm if norm is not None else own.norm if own is not None else "linf"
    if eps is not None:
        texts = eps.split(",") if isinstance(eps, str) else [eps] if isinstance(eps, (int, float)) else list(eps)
        if not texts:
            raise UserError("eps is an empty list; give a radius, like 8/255, or several")
        return [ThreatModel(chosen, str(text)) for text in texts]
    if own is not None and own.norm == chosen:
        return [own]
    if chosen not in budgets:
        raise UserError(f"no usual {chosen} radius is known for '{name}'; give one with eps (--eps 8/255)")
    return [ThreatModel(chosen, budgets[chosen])]
