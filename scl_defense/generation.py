"""Calling a generator: it gets what it declared and nothing else, and what it returns is checked on every batch."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.checkpoint import load_classifier
from scl_defense.errors import ComponentError, SclDefenseError, UserError
from scl_defense.folding import Folding
from scl_defense.guard import frozen
from scl_defense.models import Network
from scl_defense.plugins import PluginHost
from scl_defense.runtime import autocast, out_of_memory
from scl_defense.threat import ThreatModel
from scl_defense.types import NEEDS, Batch, Context, Generator, GeneratorBatch, with_labels_hidden


def generate(
    generator: Generator,
    batch: Batch,
    context: Context,
    *,
    network: Network | None,
    encoder: Network | None = None,
    precision: str = "fp32",
    folding: Folding | None = None,
    saved: Callable[[str], nn.Module] | None = None,
) -> Tensor:
    """(A, N, C, H, W) adversarial views of ``batch``, detached.

    ``network`` (or its averaged twin ``encoder``, for ``embed``) is frozen and in eval mode meanwhile and comes back
    unchanged; ``precision`` is that of its passes, what a generator computes by itself stays float32. ``folding``: the
    batch norms that meanwhile go into the convolutions before them, the same function in fewer passes. ``saved``: path
    -> the frozen encoder of a checkpoint (default: :func:`saved_encoder` with the plugins of this process). With
    ``needs`` empty no network is handed over: *model-free* is what this function does, not what a component claims.
    Raises :class:`ComponentError` when an undeclared thing is used or the output breaks the contract.
    """
    needs = frozenset(generator.needs)
    if needs - NEEDS:
        raise ComponentError(f"{context.generator} needs {sorted(needs - NEEDS)}; it may need {sorted(NEEDS)}")
    granted: dict[str, Any] = {"labels": batch.labels}
    lent: list[nn.Module] = []
    if needs & {"embed", "logits"}:
        if network is None:
            raise ComponentError(f"{context.generator} needs {sorted(needs)} but there is no network")
        encoder = network if encoder is None else encoder
        granted |= {"embed": _lent(encoder.embed, precision), "logits": _lent(network.logits, precision)}
        lent = [network, encoder]
    if "checkpoint" in needs:
        granted["checkpoint"] = _opener(saved, context, precision)
    context = replace(context, granted={need: granted[need] for need in needs})
    with ExitStack() as stack:
        stack.enter_context(frozen(*lent))
        for part in {id(part): part for part in lent}.values():
            stack.enter_context((folding or Folding()).folded(part, precision))
        return call(generator, with_labels_hidden(batch), context)


def call(generator: Generator, batch: GeneratorBatch, context: Context) -> Tensor:
    """One call, its output checked; what it raises names the component (:class:`ComponentError`)."""
    try:
        adversarial = generator(batch, context)
    except SclDefenseError:
        raise
    except Exception as error:
        if out_of_memory(error):  # the caller tries again with fewer images
            raise
        text = " ".join(str(error).split())
        raise ComponentError(f"{context.generator} failed: {type(error).__name__}: {text}") from error
    return check_adversarial(adversarial, batch.views, context.threat, context.generator)


def saved_encoder(
    path: str, image_shape: tuple[int, ...], device: torch.device, *, host: PluginHost | None = None
) -> nn.Module:
    """The encoder of a saved checkpoint, (N, C, H, W) in [0, 1] -> features (logits of a foreign network), frozen.

    Raises :class:`UserError` when it cannot be read or was trained on images of another size.
    """
    loaded = load_classifier(path, host=host, device=device)
    if tuple(loaded.image_shape) != tuple(image_shape):
        theirs, ours = ("x".join(map(str, shape)) for shape in (loaded.image_shape, image_shape))
        raise UserError(f"checkpoint '{path}' was trained on images {theirs}, these are {ours}; choose another one")
    return _Features(loaded.network).eval().requires_grad_(False)


class _Features(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        # A foreign network's attribute `features` may be a part that skips its normalisation.
        return self.network.features(images) if isinstance(self.network, Network) else self.network(images)


def _opener(saved: Callable[[str], nn.Module] | None, context: Context, precision: str) -> Any:
    """context.checkpoint: opens each file once a run."""
    calibration, cache = context.calibration, context.cache

    def open_once(path: str) -> Callable[[Tensor], Tensor]:
        key = ("checkpoint", str(path))
        if key not in cache:
            if saved is not None:
                cache[key] = saved(str(path))
            else:
                cache[key] = saved_encoder(str(path), calibration.shape[1:], calibration.device)
        return _lent(cache[key], precision)

    return open_once


def _lent(forward: Callable[[Tensor], Tensor], precision: str) -> Callable[[Tensor], Tensor]:
    def passes(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            return forward(images).float()

    return passes


def centres(views: Tensor, count: int) -> Tensor:
    """(count, N, C, H, W): where the balls of ``count`` adversarial views are centred, ``views[a % V]``."""
    return views[[place % len(views) for place in range(count)]]


def check_adversarial(adversarial: object, views: Tensor, threat: ThreatModel, who: str) -> Tensor:
    """The contract of a generator's output, on every batch. Raises :class:`ComponentError` with the measured fault.

    adversarial: (A, N, C, H, W), view a around ``views[a % V]``; views: (V, N, C, H, W).
    """
    if (
        not isinstance(adversarial, Tensor)
        or adversarial.dim() != views.dim()
        or adversarial.shape[1:] != views.shape[1:]
    ):
        got = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise ComponentError(f"{who} must return (A, {', '.join(map(str, views.shape[1:]))}), not {got}")
    if adversarial.dtype != views.dtype or adversarial.device != views.device:
        raise ComponentError(
            f"{who} returned {adversarial.dtype} on {adversarial.device}, not {views.dtype} on {views.device}"
        )
    adversarial = adversarial.detach()
    if len(adversarial) == 0:
        return adversarial
    flat, origin = adversarial.flatten(0, 1), centres(views, len(adversarial)).flatten(0, 1)
    if not bool(torch.isfinite(flat).all()):
        raise ComponentError(f"{who} returned NaN or infinite images")
    if bool(flat.min() < 0) or bool(flat.max() > 1):
        raise ComponentError(f"{who} left the box [0, 1]: from {float(flat.min()):.6g} to {float(flat.max()):.6g}")
    furthest = float(threat.distance(origin, flat).max())
    if furthest > threat.tolerance():
        raise ComponentError(f"{who} left the ball {threat}: distance {furthest:.6g}, allowed {threat.radius:.6g}")
    return adversarial
