"""The network that weights belong to: a registered model, your factory, torchvision's, timm's, or the one that fits.

``--model`` takes ``NAME | package.module:factory | file.py:factory | torchvision:NAME | timm:NAME``. The last three
build untrained networks; nothing is ever downloaded.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scl_defense.config import make, options_of
from scl_defense.errors import ComponentError, SclDefenseError, UserError, nearest
from scl_defense.models import Network
from scl_defense.plugins import PluginHost
from scl_defense_benchmarks.weights import HEADS, State, place_in_ours, variants

Shape = tuple[int, int, int]


def build(host: PluginHost, model: str, options: Mapping[str, Any], outputs: int, shape: Shape) -> nn.Module:
    """An untrained network (N, C, H, W) -> (N, outputs). One of ours, and any encoder with ``feature_dim``, comes as a
    :class:`Network` without normalisation. Raises :class:`UserError` for what cannot be found or built.
    """
    if _registered(host, model):
        return _with_head(make(host, "model", model, options)(shape), outputs, shape)
    library, _, name = model.partition(":")
    if not name:
        if model.endswith(".py"):
            raise UserError(f"--model '{model}' is a file; name the class or function in it: {model}:NAME")
        raise UserError(
            f"there is no model named '{model}'{nearest(model, host['model'].names())}; give a registered name (see: "
            "scl-defense plugins list models), FILE.py:CLASS, package.module:factory, torchvision:NAME or timm:NAME"
        )
    given = {key: literal(value) for key, value in options.items()}
    if library == "torchvision":
        return _torchvision(name, given, outputs, shape)
    if library == "timm":
        return _timm(name, given, outputs, shape)
    factory = imported(model, "--model")
    known = {"num_classes": outputs, "classes": outputs, "image_shape": shape, "in_channels": shape[0]}
    network = _called(factory, model, {**{k: v for k, v in known.items() if k in _named(factory)}, **given})
    if not isinstance(network, nn.Module) and callable(network):  # a model component: image_shape -> encoder
        network = _called(network, model, {"image_shape": shape})
    if not isinstance(network, nn.Module):
        raise UserError(
            f"--model '{model}' gives a {type(network).__name__}, not a torch.nn.Module; return the network"
        )
    return _with_head(network, outputs, shape)


def _with_head(network: nn.Module, outputs: int, shape: Shape) -> nn.Module:
    if not isinstance(getattr(network, "feature_dim", None), int):
        return network
    return Network(network, outputs, (0.0,) * shape[0], (1.0,) * shape[0])


def _registered(host: PluginHost, model: str) -> bool:
    if model in host["model"]:
        return True
    try:
        return bool(host["model"].entry(model))
    except UserError:
        return False


def literal(value: Any) -> Any:
    """``"16"`` -> 16, ``"(1, 2)"`` -> (1, 2), ``"true"`` -> True; any other text stays."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def imported(name: str, option: str) -> Callable[..., Any]:
    """What ``package.module:attribute`` or ``file.py:attribute`` names. Modules of the working directory are found."""
    module, _, attribute = name.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"scl_defense_given_{Path(module).stem}", module)
            if spec is None or spec.loader is None or not Path(module).is_file():
                raise UserError(f"{option} '{name}': there is no file '{module}'")
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded
            spec.loader.exec_module(loaded)
        else:
            with _here_on_path():
                loaded = importlib.import_module(module)
    except SclDefenseError:
        raise
    except Exception as error:  # whatever the user's module raises
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{option} '{name}': '{module}' cannot be imported: {type(error).__name__}: {text}") from None
    found: Any = loaded
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(loaded) if not n.startswith("_")] if hasattr(loaded, "__dict__") else []
            raise UserError(f"{option} '{name}': '{module}' has no '{attribute}'{nearest(attribute, known)}")
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _here_on_path() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _named(factory: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return set()


def _called(factory: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Any:
    if not callable(factory):
        raise UserError(
            f"--model '{name}' is a {type(factory).__name__}, not a function or class that builds a network"
        )
    try:
        return factory(**options)
    except SclDefenseError:
        raise
    except Exception as error:  # whatever the user's factory raises
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"--model '{name}' cannot be built with {dict(options)}: {type(error).__name__}: {text}"
        ) from None


def _torchvision(name: str, options: Mapping[str, Any], outputs: int, shape: Shape) -> nn.Module:
    from torchvision import models

    known = [n for n in models.list_models() if "." not in n and "/" not in n]
    if name not in known:
        raise UserError(f"torchvision has no classifier '{name}'{nearest(name, known)}")
    _three_channels("torchvision", shape)
    return _called(
        lambda **given: models.get_model(name, weights=None, **given),
        f"torchvision:{name}",
        {"num_classes": outputs, **options},
    )


def _timm(name: str, options: Mapping[str, Any], outputs: int, shape: Shape) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError("--model timm:NAME needs timm: pip install 'scl-defense[timm]'") from None
    bare = name.partition(".")[0]  # timm's names carry a tag of weights after a dot
    if not timm.is_model(bare):
        raise UserError(f"timm has no model '{name}'{nearest(bare, timm.list_models())}")
    given = {"num_classes": outputs, "in_chans": shape[0], **options}
    return _called(lambda **more: timm.create_model(name, pretrained=False, **more), f"timm:{name}", given)


def _three_channels(library: str, shape: Shape) -> None:
    if shape[0] != 3:
        raise UserError(f"{library}'s networks read 3 channels, this data has {shape[0]}; give package.module:factory")


def guess(
    host: PluginHost, source: str, state: State, head: State | None, outputs: int, shape: Shape
) -> tuple[Network, str, dict[str, Any], list[str]]:
    """The registered model whose every tensor has the name and shape of the file's: network, name, options, unused.

    Raises :class:`UserError` when none or several fit: then the user must name it.
    """
    fits = []
    for name, options in _candidates(host, state):
        try:
            with torch.device("meta"):
                make(host, "model", name, options)(shape)  # the cheap trial: no memory, no random numbers
            network = Network(make(host, "model", name, options)(shape), outputs, (0.0,) * shape[0], (1.0,) * shape[0])
            unused = place_in_ours(source, state, network, head)
        except (SclDefenseError, RuntimeError, TypeError, ValueError, NotImplementedError):
            continue
        fits.append((network, name, options, unused))
    if len(fits) == 1:
        return fits[0]
    # Name, kind of head and some tensors: what one needs to recognise a network.
    seen = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(state.items())[:3])
    remedy = "name their network with --model, --data"
    if fits:
        names = " or ".join(f"{name}{_text(options)}" for _, name, options, _ in fits)
        raise UserError(f"'{source}' holds bare weights that fit {names}; {remedy}")
    without = "" if head or any(f"{h}.weight" in v for v in variants(state) for h in HEADS) else ", and no linear head"
    raise UserError(
        f"'{source}' holds bare weights ({len(state)} tensors: {seen}, ...) that fit no registered model for images "
        f"{shape} and {outputs} classes{without}; {remedy} (--model package.module:factory for your own)"
    )


def _text(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else ""


def _candidates(host: PluginHost, state: State) -> list[tuple[str, dict[str, Any]]]:
    """Every registered model as it comes, and ours at the widths and depths that the tensors' shapes tell."""
    found: list[tuple[str, dict[str, Any]]] = []
    first = next((value for value in state.values() if value.dim() == 4), None)
    if first is None:
        return found
    width, kernel = int(first.shape[0]), int(first.shape[2])
    blocks = {name.partition("block1.layer.")[2].split(".")[0] for name in state if "block1.layer." in name}
    wide = next((int(v.shape[0]) for n, v in state.items() if n.endswith("block1.layer.0.conv1.weight")), 16)
    sizes = {"width": width, "stem": "imagenet" if kernel == 7 else "cifar"}
    sizes |= {"depth": 6 * max(1, len(blocks)) + 4, "widen": max(1, wide // 16)}
    for entry in host["model"]:
        name = entry.name if len(host["model"].conflicts().get(entry.name, ())) < 2 else entry.qualified
        try:
            known = {option.name for option in options_of(entry.load())}
        except ComponentError:
            continue
        found.append((name, {key: value for key, value in sizes.items() if key in known}))
    return found


def outputs_of(options: Mapping[str, Any]) -> int:
    """How many outputs the network has: one a class, or as many as the label map has entries."""
    mapped: Sequence[Any] | None = options.get("label_map")
    return len(mapped) if mapped else len(options["classes"])
