"""What is audited: a network from a file or from memory, and what is known of it."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.errors import ComponentError, SclDefenseError, UserError, nearest
from scl_defense.guard import frozen
from scl_defense.plugins import PluginHost
from scl_defense.runtime import select_device
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.forward import check_logits
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.prepared import Prepared, Relabelled, normalisation, read_label_map


@dataclass(frozen=True)
class Subject:
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


def open_subject(
    checkpoint: str | Path | nn.Module, host: PluginHost, device: str, foreign: Mapping[str, Any]
) -> Subject:
    """A file, a name that a plugin knows (``robustbench:NAME``), or a network in memory, ready to be attacked.

    foreign: what was said beside it, each with the default ``None``: ``classes``, ``image_shape`` (of the data that was
    named), ``outputs`` (how many logits there must be, where the classes have no names), ``label_map``, ``mean``,
    ``std``, ``channels``, and what :func:`scl_defense_benchmarks.foreign.load_foreign` reads. The label map comes last:
    what it leaves are the data's classes.
    """
    for name in foreign.keys() - _KNOWN:
        raise UserError(f"there is no option '{name}'{nearest(name, sorted(_KNOWN))}")
    classes = foreign.get("classes")
    if foreign.get("label_map") is not None and not classes:
        raise UserError("a label map names classes of the data; name the data set with --data")
    label_map = read_label_map(foreign.get("label_map"), classes or ())
    foreign = {**foreign, "label_map": label_map}
    if isinstance(checkpoint, nn.Module):
        subject = _from_memory(checkpoint, device, foreign)
    elif isinstance(checkpoint, (str, Path)):
        subject = _from_file(checkpoint, host, device, foreign)
    else:
        raise UserError(f"a checkpoint is a path or a torch.nn.Module, not {type(checkpoint).__name__}")
    subject = _unwrapped(subject, foreign)
    if label_map is None:
        return subject
    about = {**subject.about, "label_map": label_map}
    network = Relabelled(subject.network, label_map, len(classes)).eval()
    return replace(subject, network=network, about=about, num_classes=len(classes))


def _from_memory(network: nn.Module, device: str, foreign: Mapping[str, Any]) -> Subject:
    ignored = [name for name in ("model", "model_options", "head", "weights") if foreign.get(name)]
    if ignored:
        raise UserError(f"a network in memory brings its own weights; leave {', '.join(ignored)} out")
    tensor = next(iter((*network.parameters(), *network.buffers())), torch.empty(0))
    where = tensor.device if device == "auto" else select_device(device)
    about: dict[str, Any] = {"path": None, "network": type(network).__qualname__}
    if where != tensor.device:
        network = _copied(network).to(where)
    if any(foreign.get(name) is not None for name in ("mean", "std", "channels")):
        if foreign.get("image_shape") is None:
            raise UserError("mean, std and channels need to know the images; name the data set with data")
        mean, std, channels = normalisation(foreign, foreign["image_shape"][0])
        about |= {"mean": list(mean), "std": list(std), "channels": channels}
        wrapped = Prepared(network, mean, std, channels).to(where)
        wrapped.training = network.training
        network = wrapped
    return Subject(network, where, about)


class OneOutput(nn.Module):
    """A network that returns several tensors, as the one of its outputs that holds the logits. key: a place or name."""

    def __init__(self, network: nn.Module, key: Any):
        super().__init__()
        self.network, self.key = network, key

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[self.key]


def _unwrapped(subject: Subject, foreign: Mapping[str, Any]) -> Subject:
    """The subject with the logits among its outputs: where it returns a tuple, list or dict in which exactly one
    element is a floating (N, K) tensor, K being how many outputs it must have. Anything else stays as it is.
    """
    outputs = len(foreign.get("label_map") or foreign.get("classes") or ()) or foreign.get("outputs")
    shape = foreign.get("image_shape") or subject.image_shape
    if not outputs or shape is None or len(shape) != 3:
        return subject
    network = subject.network
    blank = torch.full((2, *shape), 0.5, device=subject.device)
    with frozen(network), seeded_globals(0), torch.no_grad():
        try:
            output = network(blank)
        except Exception:  # whatever a stranger's network raises; who looks at its logits says so
            return subject
    if isinstance(output, Mapping):
        elements = list(output.items())
    elif isinstance(output, (tuple, list)):
        elements = list(enumerate(output))
    else:
        return subject
    found = [
        key
        for key, value in elements
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == (2, outputs)
    ]
    if len(found) != 1:
        return subject
    key = found[0] if isinstance(found[0], int) else str(found[0])  # as it stands in the result
    wrapped = OneOutput(network, found[0])
    wrapped.training = network.training
    return replace(subject, network=wrapped, about={**subject.about, "output": key})


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever a stranger's attributes raise
        fault = " ".join(str(error).split())[:200]
        raise UserError(f"the network cannot be copied to another device ({fault}); move it there first") from None


def _from_file(checkpoint: str | Path, host: PluginHost, device: str, foreign: Mapping[str, Any]) -> Subject:
    from scl_defense.checkpoint import load_classifier

    where = select_device(device)
    if is_name(checkpoint):
        loaded = _named(str(checkpoint), host, foreign)
        loaded.network.to(where).eval()
    else:
        loaded = load_classifier(checkpoint, host=host, device=where, options=foreign)
    ignored = [name for name in _FOREIGN_ONLY if foreign.get(name)]
    if ignored and loaded.data is not None:
        raise UserError(f"'{checkpoint}' knows its own network and normalisation; leave {', '.join(ignored)} out")
    about = {"path": str(loaded.path), "sha256": loaded.sha256, **_json_part(loaded.meta)}
    return Subject(
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


_FOREIGN_ONLY = ("model", "model_options", "mean", "std", "channels", "head", "weights")
_KNOWN = {*_FOREIGN_ONLY, "host", "classes", "image_shape", "outputs", "label_map", "trust_pickle", "say"}


def is_name(checkpoint: str | Path) -> bool:
    """Whether this is no file but a name that a plugin may know, such as ``robustbench:Carmon2019Unlabeled``."""
    text = str(checkpoint)
    return not Path(text).exists() and re.fullmatch(r"[A-Za-z][\w-]+:[^\\/].*", text) is not None


def _named(name: str, host: PluginHost, foreign: Mapping[str, Any]) -> Any:
    try:
        loaded = host.call("load_checkpoint", path=Path(name), options=dict(foreign))
    except SclDefenseError:
        raise
    except Exception as error:  # whatever a plugin's library raises
        text = " ".join(str(error).split())[:200]
        raise ComponentError(f"'{name}' cannot be loaded: {type(error).__name__}: {text}") from error
    if loaded is None:
        library = name.partition(":")[0]
        raise UserError(
            f"'{name}' is no file, and no plugin knows checkpoints of '{library}'; install scl-defense-{library}, or "
            "give the path of a file"
        )
    return loaded


def without_download(host: PluginHost, data: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = data in host["dataset"] and "download" in getattr(host["dataset"].get(data), "__dataclass_fields__", {})
    return {**(options or {}), **({"download": False} if known else {})}


def _json_part(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's description is plain data: no tensors, no random states."""
    plain = {}
    for name, value in meta.items():
        try:
            plain[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            continue
    return plain


def check_fit(network: nn.Module, image: Tensor, classes: int, name: str) -> None:
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
