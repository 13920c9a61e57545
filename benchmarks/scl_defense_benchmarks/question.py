"""What is asked of a network: the images, the labels and the balls around them, from what a user has named."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost
from scl_defense.runtime import derive_seed
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.audited_data import open_named
from scl_defense_benchmarks.subject import Subject, open_subject, without_download


@dataclass(frozen=True)
class Question:
    """images: float32 (N, C, H, W) in [0, 1]; labels: (N,); indices: their places in the data (N,), all but these on
    the subject's device. name, classes, budgets: of the data; opened: the data set, unless the images were handed over.
    threats: the balls, in the order in which they were named.
    """

    subject: Subject
    name: str
    classes: int
    budgets: Mapping[str, str]
    opened: Any
    threats: list[ThreatModel]
    images: Tensor
    labels: Tensor
    indices: Tensor


def ask(
    checkpoint: str | Path | nn.Module,
    images: Any = None,
    labels: Any = None,
    *,
    data: str | None,
    data_options: Mapping[str, Any] | None,
    data_root: str | Path | None,
    norm: str | None,
    eps: str | float | Iterable[str | float] | None,
    n: int | None,
    device: str,
    host: PluginHost,
    foreign: Mapping[str, Any],
) -> Question:
    """Open the network and its data; the arguments are those of :func:`scl_defense.benchmark`.

    n above the number of images takes them all, and says so (``say`` of ``foreign``; default: a line on stderr).
    Raises :class:`UserError` where something is missing or does not fit together.
    """
    if n is not None and n < 1:
        raise UserError(f"n is {n}; it must be at least 1")
    pair = None if images is None and labels is None else _own_images(images, labels, n)
    if pair is not None and data is not None:
        raise UserError("images and data are both given; leave one out")
    options: dict[str, Any] = {"host": host, **foreign}
    opened = None if data is None else open_named(data, root=data_root, options=data_options, host=host)
    if opened is not None:
        options |= {"classes": opened.classes, "image_shape": opened.image_shape}
    elif pair is not None:
        options |= {"image_shape": tuple(pair[0].shape[1:]), "outputs": int(pair[1].max()) + 1}
    subject = open_subject(checkpoint, host, device, options)
    if pair is not None:
        images, labels, indices = pair
        name, budgets = "your images", {}
        classes = subject.num_classes or _outputs(subject, images[:1])
        images, labels = images.to(subject.device), labels.to(subject.device)
    else:
        if opened is None:
            opened = _own_data(checkpoint, subject, host, data_options, data_root)
        _check_data(subject, opened)
        name, budgets, classes = opened.name, opened.budgets, len(opened.classes)
        split = opened.split("test", limit=n, device=subject.device)
        images, labels, indices = split.float_images(), split.labels, split.indices.cpu()
    if n is not None and n > len(images):
        say = foreign.get("say") or _to_stderr
        say(f"n is {n}, but '{name}' has {len(images)} images: all of them are taken")
    threats = _main_threats(norm, eps, subject.threat, name, budgets)
    for threat in threats:
        threat.check_fits(images.shape[1:])
    return Question(subject, name, classes, budgets, opened, threats, images, labels, indices)


def _own_images(images: Any, labels: Any, n: int | None) -> tuple[Tensor, Tensor, Tensor]:
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
    if len(images) == 0:
        raise UserError("there are 0 images; give at least one")
    indices = torch.arange(len(images))
    if n is not None and n < len(images):
        indices = torch.from_numpy(stratified_subset(labels, n, derive_seed(0, "limit-test")))
    return images[indices.to(images.device)], labels[indices.to(labels.device)], indices


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
