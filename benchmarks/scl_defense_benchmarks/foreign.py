"""Weights that this project did not write: a state_dict of one of the registered models, with its linear head.

Reads torch files (as plain tensors, never as a full pickle) and safetensors. Nothing is guessed silently: the
architecture is named by the user, and every tensor of the file must find its place.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scl_defense.checkpoint import LoadedClassifier, read_tensors
from scl_defense.config import make
from scl_defense.errors import UserError
from scl_defense.models import Network
from scl_defense.plugins import PluginHost, default_host

NESTED = ("state_dict", "model_state_dict", "model", "net", "network")
PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
HEADS = ("classifier", "fc", "linear", "head", "logits")


def load_state_dict_file(path: Path, options: Mapping[str, Any]) -> LoadedClassifier | None:
    """The classifier in a foreign file, or ``None`` when there is no state_dict in it.

    options: ``model`` (a registered name), ``model_options``, ``image_shape`` and ``classes`` (of the data), ``mean``
    and ``std`` (default: images go in as they are, in [0, 1]), ``host``. Raises :class:`UserError` when the weights do
    not fit, naming what is left over on either side.
    """
    state, sha256 = _tensors(path)
    if state is None:
        return None
    if not options.get("model"):
        raise UserError(f"'{path}' holds bare weights ({len(state)} tensors); name their network with --model, --data")
    if not options.get("classes"):
        raise UserError(f"'{path}' does not say which data it belongs to; name the data set with --data")
    host: PluginHost = options.get("host") or default_host()
    classes, shape = tuple(options["classes"]), tuple(options["image_shape"])
    mean = tuple(options.get("mean") or (0.0,) * shape[0])
    std = tuple(options.get("std") or (1.0,) * shape[0])
    if len(mean) != shape[0] or len(std) != shape[0] or min(std) <= 0:
        raise UserError(f"--mean and --std need {shape[0]} numbers each, std above 0, not {mean} and {std}")
    encoder = make(host, "model", options["model"], options.get("model_options"))(shape)
    network = Network(encoder, len(classes), mean, std)
    network.load_state_dict(_placed(path, state, network), strict=True)
    return LoadedClassifier(
        network=network,
        classes=classes,
        image_shape=shape,  # type: ignore[arg-type]
        mean=mean,
        std=std,
        threat=None,
        data=None,
        data_options={},
        path=path,
        sha256=sha256,
        meta={"foreign": True, "model": options["model"], "model_options": dict(options.get("model_options") or {})},
    )


def _tensors(path: Path) -> tuple[dict[str, Tensor] | None, str]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        payload = path.read_bytes()
        try:
            return _bare(load(payload)), hashlib.sha256(payload).hexdigest()
        except SafetensorError as error:
            raise UserError(f"'{path}' is no readable safetensors file: {' '.join(str(error).split())}") from None
    content, sha256 = read_tensors(path)
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return _bare(content), sha256


def _bare(content: Any) -> dict[str, Tensor] | None:
    """A non-empty dict of named tensors with the prefixes that all names share taken off, or ``None``."""
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        return None
    state = {str(name): value for name, value in content.items()}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _placed(path: Path, state: dict[str, Tensor], network: Network) -> dict[str, Tensor]:
    """The file's tensors under our names, every one of them used. Raises :class:`UserError`, one line."""
    body = {name.removeprefix("encoder."): value for name, value in state.items()}
    head = next((head for head in HEADS if f"{head}.weight" in body), None)
    if head is None:
        raise UserError(f"'{path}' has no linear head (looked for {', '.join(h + '.weight' for h in HEADS)})")
    parts = [part for part in ("weight", "bias") if f"{head}.{part}" in body]
    placed = {f"classifier.{part}": body.pop(f"{head}.{part}") for part in parts}
    placed |= {f"encoder.{name}": value for name, value in body.items()}
    wanted = network.state_dict()
    normalisation = {name: value for name, value in wanted.items() if name.startswith("normalize.")}
    missing = sorted(wanted.keys() - placed.keys() - normalisation.keys())
    extra = sorted(placed.keys() - wanted.keys())
    if missing or extra:
        raise UserError(
            f"the weights in '{path}' are not of this network: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unknown ({', '.join(extra[:3])}); check --model and its options"
        )
    for name, value in placed.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"'{path}': {name} is {tuple(value.shape)}, this network's is {tuple(wanted[name].shape)}; "
                "check --model, its options and the number of classes of --data"
            )
    return {**normalisation, **placed}
