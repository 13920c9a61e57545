"""Checkpoints that this project did not write: which file it is, its network, and what is before and after it.

Nothing is guessed silently: a network is taken from names and shapes only when every tensor of the file finds its
place in exactly one registered model, and the result says so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from scl_defense.checkpoint import LoadedClassifier
from scl_defense.errors import UserError
from scl_defense.models import Network, Normalize
from scl_defense.plugins import PluginHost, default_host
from scl_defense_benchmarks.containers import kind_of, read_content, sha256_of
from scl_defense_benchmarks.exported import load_graph
from scl_defense_benchmarks.factories import build, guess, outputs_of
from scl_defense_benchmarks.prepared import Prepared, normalisation
from scl_defense_benchmarks.weights import AVERAGED, PLAIN, State, find_state, head_tensors, place, place_in_ours


def load_foreign(path: Path, options: Mapping[str, Any]) -> LoadedClassifier | None:
    """The classifier in a foreign file, or ``None`` when there is neither a graph nor a state_dict in it.

    options: ``model`` and ``model_options`` (see :mod:`scl_defense_benchmarks.factories`; default: the registered model
    that fits), ``head`` (file of a linear head), ``weights`` (which of several sets), ``image_shape`` and ``classes``
    (of the data), ``label_map`` (as :func:`read_label_map` gives it), ``mean``, ``std``, ``channels`` (default: images
    go in as they are, RGB in [0, 1]), ``trust_pickle``, ``say`` (told what a trusted pickle imports), ``host``.
    Raises :class:`UserError` when the weights do not fit, naming what is left over on either side.
    """
    if not path.is_file():  # a name that another plugin knows
        return None
    kind, trust = kind_of(path), bool(options.get("trust_pickle"))
    about: dict[str, Any] = {"foreign": True, "container": kind}
    if kind in ("torchscript", "export", "onnx"):
        _refuse(path, kind, options)
        shape = _data(path, options)
        network = load_graph(path, kind, trust=trust)
    else:
        content = read_content(path, trust=trust, say=options.get("say"))
        state, where = find_state(content, str(path), options.get("weights"))
        whole = _whole_network(content)
        if state is None:
            if trust and isinstance(content, Mapping):
                held = ", ".join(f"{str(name)!r} ({type(item).__name__})" for name, item in list(content.items())[:8])
                raise UserError(
                    f"'{path}' holds no weights and no network under a usual name, only {held or 'nothing'}; save the "
                    "network itself, or under 'model'"
                )
            return None
        if not options.get("model") and whole is None and not options.get("classes"):
            raise UserError(
                f"'{path}' holds bare weights ({len(state)} tensors); name their network with --model (FILE.py:CLASS, "
                "package.module:factory or a registered name) and its test images with --data"
            )
        shape = _data(path, options)
        about |= {"weights": where} if where else {}
        network = _network(path, state, whole, options, shape, about)
    mean, std, channels = normalisation(options, shape[0])
    if type(network) is Network and channels == "rgb":
        network.normalize = Normalize(mean, std)
    else:
        network = Prepared(network, mean, std, channels)
    about |= {"mean": list(mean), "std": list(std), "channels": channels}
    return LoadedClassifier(
        network=network.float(),
        classes=tuple(options["classes"]),
        image_shape=shape,
        mean=mean,
        std=std,
        threat=None,
        data=None,
        data_options={},
        path=path,
        sha256=sha256_of(path),
        meta=about,
    )


def _network(
    path: Path,
    state: State,
    whole: nn.Module | None,
    options: Mapping[str, Any],
    shape: tuple[int, int, int],
    about: dict[str, Any],
) -> nn.Module:
    """The network of a file of weights; what it is and how it was found goes into ``about``."""
    host: PluginHost = options.get("host") or default_host()
    head = None
    if options.get("head"):
        head = _head(Path(options["head"]), options)
        about |= {"head": str(options["head"]), "head_sha256": sha256_of(Path(options["head"]))}
    model, model_options, outputs = options.get("model"), dict(options.get("model_options") or {}), outputs_of(options)
    if whole is not None and not model:
        about["network"] = type(whole).__qualname__
        if head is not None:
            raise UserError(f"'{path}' holds a whole network; --head goes with weights alone")
        return whole
    if not model:
        if model_options:
            raise UserError("options of a network (-m) need its name; give it with --model")
        network, model, model_options, unused = guess(host, str(path), state, head, outputs, shape)
        about["guessed"] = "every tensor has the name and shape that this model gives it; --model says another"
    else:
        network = build(host, model, model_options, outputs, shape)
        place_it = place_in_ours if type(network) is Network else place
        unused = place_it(str(path), state, network, head)
    about |= {"model": model, "model_options": model_options}
    if unused:
        about["unused"] = unused
    return network


def _whole_network(content: Any) -> nn.Module | None:
    """The network that a trusted pickle holds, itself or under a usual name."""
    if isinstance(content, nn.Module):
        return content
    if isinstance(content, Mapping):
        return next((content[key] for key in (*PLAIN, *AVERAGED) if isinstance(content.get(key), nn.Module)), None)
    return None


def _head(path: Path, options: Mapping[str, Any]) -> State:
    if not path.is_file():
        raise UserError(f"--head '{path}' does not exist; give the file of the linear head's weights")
    state, _ = find_state(
        read_content(path, trust=bool(options.get("trust_pickle")), say=options.get("say")), str(path)
    )
    if state is None:
        raise UserError(f"--head '{path}' holds no weights; give the file of the linear head's weights")
    return head_tensors(state, str(path))


def _data(path: Path, options: Mapping[str, Any]) -> tuple[int, int, int]:
    if not options.get("classes") or not options.get("image_shape"):
        raise UserError(f"'{path}' does not say which data it belongs to; name the data set with --data")
    channels, height, width = options["image_shape"]
    return int(channels), int(height), int(width)


def _refuse(path: Path, kind: str, options: Mapping[str, Any]) -> None:
    """What means nothing for a file that brings its own graph is a mistake."""
    given = [name for name in ("model", "model_options", "head", "weights") if options.get(name)]
    if given:
        raise UserError(f"'{path}' ({kind}) brings its own network; leave {', '.join(given)} out")
