"""What is audited: a network from a file or from memory, and what is known of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.plugins import PluginHost
from scl_defense.runtime import select_device
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.forward import check_logits
from scl_defense_benchmarks.library_guard import seeded_globals


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
    if isinstance(checkpoint, nn.Module):
        network = checkpoint if device == "auto" else checkpoint.to(select_device(device))
        tensor = next(iter((*network.parameters(), *network.buffers())), torch.empty(0))
        return Subject(network, tensor.device, {"path": None, "network": type(checkpoint).__qualname__})
    from scl_defense.checkpoint import load_classifier

    if not isinstance(checkpoint, (str, Path)):
        raise UserError(f"a checkpoint is a path or a torch.nn.Module, not {type(checkpoint).__name__}")
    where = select_device(device)
    loaded = load_classifier(checkpoint, host=host, device=where, options=foreign)
    ignored = [name for name in ("model", "model_options", "mean", "std") if foreign[name] is not None]
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


def without_download(host: PluginHost, data: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
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
