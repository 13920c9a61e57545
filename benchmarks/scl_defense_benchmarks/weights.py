"""From a file's content to named tensors, and from named tensors into a network. Nothing is left over silently.

A network's own names are found again whatever wrapped it: nesting (``state_dict``, ``model``, ``ema``, a list of
one), ``torch.compile``, ``DataParallel``, a surrounding module, an encoder and its head in two dicts or two files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.models import Network

PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "classifier")
AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "swa", "swa_state_dict", "averaged")
ENCODERS = ("encoder", "backbone", "base_encoder", "encoder_q", "feature_extractor", "features", "f", "trunk")
HEADS = ("classifier", "fc", "linear", "head", "logits", "linear_classifier", "last_linear")
# Parts of a training state that no prediction uses.
UNUSED = ("projector.", "projection.", "projection_head.", "predictor.", "queue", "encoder_k.", "momentum_encoder.",
          "teacher.", "clean_norms.", "head.", "g.")  # fmt: skip
_WRAPPERS = {"module", "_orig_mod"}
_OUTER = ("model.", "network.", "net.", *(f"{name}." for name in ENCODERS), "0.")
State = dict[str, Tensor]


def find_state(content: Any, source: str, chosen: str | None = None) -> tuple[State | None, str]:
    """The weights in ``content`` and where in it they were, as ``a.b``; ``None`` when there are none.

    chosen: that place, where a file holds several sets (weights and their moving average). Raises
    :class:`UserError` when there are several and none is chosen.
    """
    if isinstance(content, nn.Module):
        return dict(content.state_dict()), ""
    if chosen is not None:
        for key in chosen.split("."):
            if not isinstance(content, Mapping) or key not in content:
                known = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else "no names"
                raise UserError(f"'{source}' has no part '{chosen}' (it holds {known}); correct --weights")
            content = content[key]
        state, where = find_state(content, source)
        return state, ".".join(part for part in (chosen, where) if part)
    if isinstance(content, (list, tuple)):
        return find_state(content[0], source) if len(content) == 1 else (None, "")
    if not isinstance(content, Mapping) or not content:
        return None, ""
    if state := _tensors(content):
        return state, ""
    if both := _encoder_and_head(content):
        return both
    found = {}
    for key in (*PLAIN, *AVERAGED, *ENCODERS):
        state, where = find_state(content.get(key), source)
        if state is not None:
            found[f"{key}.{where}" if where else key] = state
    if len(found) > 1:
        first, *_ = found
        raise UserError(f"'{source}' holds {len(found)} sets of weights: {', '.join(found)}; choose: --weights {first}")
    return next(((state, where) for where, state in found.items()), (None, ""))


def _tensors(content: Mapping[Any, Any]) -> State | None:
    """The tensors of a flat state_dict; numbers beside them (an epoch) are no weights. ``None``: this is none."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    rest = [value for value in content.values() if not isinstance(value, Tensor)]
    plain = all(value is None or isinstance(value, (int, float, str, bool)) for value in rest)
    named = any(name.rpartition(".")[2] in ("weight", "bias") for name in tensors)
    return unwrapped(tensors) if tensors and plain and (named or not rest) else None


def _encoder_and_head(content: Mapping[Any, Any]) -> tuple[State, str] | None:
    """``{"encoder": {...}, "classifier": {...}}``: two state dicts that belong together."""
    parts = {key: _tensors(content[key]) for key in content if isinstance(content[key], Mapping)}
    body = next((key for key in ENCODERS if parts.get(key)), None) or (
        "model" if parts.get("model") and _head_of(parts["model"]) is None else None
    )
    head = next((key for key in HEADS if key != body and parts.get(key) and _linear(parts[key])), None)
    if body is None or head is None:
        return None
    weight = _linear(parts[head])
    stem = weight.rpartition("weight")[0]
    placed = {f"classifier.{n.removeprefix(stem)}": v for n, v in parts[head].items() if n.startswith(stem)}
    return {**{f"encoder.{name}": value for name, value in parts[body].items()}, **placed}, f"{body} and {head}"


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """Without the names that ``torch.compile`` and ``DataParallel`` put in, wherever they stand."""
    renamed = {".".join(p for p in name.split(".") if p not in _WRAPPERS): value for name, value in state.items()}
    return dict(state) if len(renamed) != len(state) else renamed


def _linear(state: State | None) -> str | None:
    """The name of the only matrix, when these are the weights of one linear layer."""
    names = [name for name, value in (state or {}).items() if value.dim() == 2 and name.endswith("weight")]
    return names[0] if len(names) == 1 and len(state or {}) <= 2 else None


def _head_of(state: State) -> str | None:
    return next((head for head in HEADS if f"{head}.weight" in state and state[f"{head}.weight"].dim() == 2), None)


def head_tensors(state: State, source: str) -> State:
    """``weight`` (K, D) and perhaps ``bias`` (K,) of a file that holds a linear head alone, else :class:`UserError`."""
    matrices = [name for name, value in state.items() if value.dim() == 2 and name.rpartition(".")[2] == "weight"]
    if len(matrices) != 1 or len(state) > 2:
        raise UserError(
            f"'{source}' is no linear head: it holds {', '.join(list(state)[:4])} ({len(state)} tensors); it must hold "
            "one matrix (classes, features) and perhaps a bias"
        )
    stem = matrices[0].rpartition("weight")[0]
    return {"weight": state[matrices[0]]} | ({"bias": state[f"{stem}bias"]} if f"{stem}bias" in state else {})


def variants(state: State) -> list[State]:
    """The same tensors under the names that they may have without a surrounding module, the likeliest first."""
    found, queue = [], [state]
    while queue:
        current = queue.pop(0)
        found.append(current)
        for prefix in _OUTER:
            inner = {name.removeprefix(prefix): value for name, value in current.items() if name.startswith(prefix)}
            # What lies beside the module is the head, or no prediction needs it.
            beside = {name: value for name, value in current.items() if not name.startswith(prefix)}
            if inner and len(found) + len(queue) < 12 and not inner.keys() & beside.keys():
                queue.append({**inner, **beside})
    return found


def place_in_ours(source: str, state: State, network: Network, head: State | None = None) -> list[str]:
    """Load ``state`` (encoder with its linear head, or the head apart) into one of our networks.

    Returns the names of the tensors that no prediction uses (a projector). Raises :class:`UserError`, one line, when
    a tensor is missing, has another shape or has no place.
    """
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith("normalize.")}
    candidates = [_as_ours(part, head) for part in variants(state)]
    candidates = [part for part in candidates if part is not None]
    if not candidates:
        looked = ", ".join(f"{name}.weight" for name in HEADS[:5])
        raise UserError(f"'{source}' has no linear head (looked for {looked}); give its file with --head")
    return _load(source, candidates, wanted, network)


def _as_ours(state: State, head: State | None) -> State | None:
    if head is None:
        name = _head_of(state)
        if name is None:
            return None
        head = {part: state[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in state}
        state = {key: value for key, value in state.items() if not key.startswith((f"{name}.", "normalize."))}
    bias = {} if "bias" in head else {"bias": torch.zeros(len(head["weight"]))}
    placed = {f"classifier.{name}": value for name, value in {**head, **bias}.items()}
    return {f"encoder.{name}": value for name, value in state.items()} | placed


def place(source: str, state: State, network: nn.Module, head: State | None = None) -> list[str]:
    """Load ``state`` into a network of any kind; ``head`` goes into its last linear layer. As :func:`place_in_ours`."""
    wanted = network.state_dict()
    candidates = variants(state)
    if head is not None:
        last = last_linear(network)
        if last is None:
            raise UserError("the network has no linear layer that --head could fill; leave --head out")
        bias = {} if "bias" in head or f"{last}.bias" not in wanted else {"bias": torch.zeros(len(head["weight"]))}
        own = {f"{last}.{name}": value for name, value in {**head, **bias}.items()}
        candidates = [{**{k: v for k, v in s.items() if not k.startswith(f"{last}.")}, **own} for s in candidates]
    return _load(source, candidates, wanted, network)


def last_linear(network: nn.Module) -> str | None:
    names = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    return names[-1] if names else None


def _load(source: str, candidates: list[State], wanted: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    def faults(state: State) -> tuple[list[str], list[str], list[str]]:
        missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
        extra = [n for n in state if n not in wanted and not n.removeprefix("encoder.").startswith(UNUSED)]
        shape = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
        return missing, extra, shape

    best = min(candidates, key=lambda state: sum(map(len, faults(state))))
    missing, extra, shape = faults(best)
    if missing or extra:
        raise UserError(
            f"the weights in '{source}' are not of this network: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unknown ({', '.join(extra[:3])}); check --model and its options"
        )
    for name in shape[:1]:
        raise UserError(
            f"'{source}': {name} is {tuple(best[name].shape)}, this network's is {tuple(wanted[name].shape)}; "
            "check --model, its options and the number of classes of --data"
        )
    network.load_state_dict({name: value for name, value in best.items() if name in wanted}, strict=False)
    return sorted(name for name in best if name not in wanted)
