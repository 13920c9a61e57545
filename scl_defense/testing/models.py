"""The contract of models: what trainers, checkpoints and attacks rely on."""

import io
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import (
    COMPONENT_CHECKS,
    Check,
    CheckResult,
    Fault,
    applies_if,
    examine,
    expect,
    one_line,
    same,
    seed_globals,
    several,
)

LARGE = (3, 32, 32)  # every model works on it
SMALL = (1, 8, 8)  # every model works on it or says what it needs


def check_model(component: Any, name: str | None = None) -> list[CheckResult]:
    """Run the contract test on a model: an instance, or a class (with its default options).

    Give a small width or depth where there is one: the promises do not depend on it, the time does.
    """
    return examine(component, name, MODEL_CHECKS, Trials)


class Trials:
    """Encoders of one model."""

    def __init__(self, model: Any, name: str):
        self.component, self.name = model, name

    def encoder(self, shape: tuple[int, int, int] = LARGE, seed: int = 0) -> nn.Module:
        seed_globals(seed)
        encoder: nn.Module = self.component(shape)
        return encoder

    def used(self, shape: tuple[int, int, int] = LARGE, seed: int = 0) -> nn.Module:
        """In eval mode, with batch statistics that are no longer those of the start."""
        encoder = self.encoder(shape, seed).train()
        with torch.no_grad():
            encoder(worlds.pictures(8, shape)[0])
        return encoder.eval()

    @cached_property
    def repeatable(self) -> bool:
        encoder, images = self.used(), worlds.pictures(4, LARGE)[0]
        return same(encoder(images).detach(), encoder(images).detach())


def check_features(trials: Trials) -> None:
    """An encoder is a module with ``feature_dim`` = D, a positive integer, and maps (N, C, H, W) to finite (N, D)."""
    encoder = trials.encoder()
    expect(isinstance(encoder, nn.Module), f"it made a {type(encoder).__name__}, not a torch.nn.Module")
    width = getattr(encoder, "feature_dim", None)
    expect(isinstance(width, int) and width > 0, f"feature_dim is {width!r}; it must be a positive integer")
    for training in (True, False):
        features = encoder.train(training)(worlds.pictures(4, LARGE)[0])
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        expect(got == (4, width), f"it gives {got} for 4 images where feature_dim says {(4, width)}")
        mode = "train" if training else "eval"
        expect(bool(features.isfinite().all()), f"its features are NaN or infinite in {mode} mode")


def check_small_images(trials: Trials) -> None:
    """On grey images of 8 x 8 it works, or :class:`UserError` says in one line how large they must be."""
    try:
        encoder = trials.encoder(SMALL)
    except UserError as error:
        expect("\n" not in str(error).strip(), "its error for images of 8 x 8 has several lines")
        return
    except Exception as error:
        raise Fault(f"for images 1x8x8 {one_line(error)}; raise UserError saying what is needed") from None
    try:
        features = encoder(worlds.pictures(4, SMALL)[0])
    except Exception as error:
        raise Fault(f"built for images 1x8x8, but on them {one_line(error)}") from None
    expect(isinstance(features, Tensor) and len(features) == 4, "for images 1x8x8 it does not give one row an image")


def check_single_image(trials: Trials) -> None:
    """In eval mode a single image is enough."""
    features = trials.used()(worlds.pictures(1, LARGE)[0])
    expect(features.dim() == 2 and len(features) == 1, f"for one image it gives {tuple(features.shape)}")


def check_gradients_reach_images(trials: Trials) -> None:
    """The features can be differentiated by the pixels: an attack that finds no gradient proves no robustness."""
    images = worlds.pictures(4, LARGE)[0].requires_grad_()
    features = trials.used()(images)
    expect(features.requires_grad, "its output has no graph: gradients never reach the images")
    (gradient,) = torch.autograd.grad(features.square().sum(), images, allow_unused=True)
    reached = gradient is not None and bool(gradient.flatten(1).abs().sum(1).gt(0).all() and gradient.isfinite().all())
    expect(reached, "the gradient at the images is missing, zero or not finite")


def check_deterministic_in_eval(trials: Trials) -> None:
    """In eval mode the same images give the same bits twice: a random network must not look robust by chance."""
    expect(trials.repeatable, "in eval mode two passes over the same images differ")


def check_independent_of_batch(trials: Trials) -> None:
    """In eval mode an image's features do not depend on its neighbours in the batch."""
    applies_if(trials.repeatable)
    encoder, images = trials.used(), worlds.pictures(4, LARGE)[0]
    with torch.no_grad():
        together, apart = encoder(images), torch.cat([encoder(images[:1].repeat(2, 1, 1, 1))[:1], encoder(images[1:])])
    furthest = float((together - apart).abs().max() / together.abs().max().clamp(min=1e-12))
    expect(furthest < 1e-3, f"in eval mode an image's features change by {furthest:.2g} with the rest of the batch")


def check_state_dict(trials: Trials) -> None:
    """The state dict is the whole state, tensors only: loaded into another encoder it gives the same features, and it
    can be read without running code (``weights_only=True``).
    """
    applies_if(trials.repeatable)
    first, second, images = trials.used(seed=1), trials.encoder(seed=2), worlds.pictures(4, LARGE)[0]
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    try:
        second.load_state_dict(torch.load(buffer, weights_only=True))
    except Exception as error:
        raise Fault(f"its state dict cannot be saved and loaded: {type(error).__name__}") from error
    with torch.no_grad():
        close = torch.allclose(first(images), second.eval()(images), rtol=1e-4, atol=1e-5)
    expect(close, "an encoder with the same state dict answers otherwise: some state is no parameter and no buffer")


def check_seeded_start(trials: Trials) -> None:
    """The start comes from torch's global generator, which the core seeds: equal under a seed, other under another."""
    first, again, other = (trials.encoder(seed=seed).state_dict() for seed in (1, 1, 2))
    differing = [name for name in first if not same(first[name], again[name])]
    if differing:
        raise Fault(f"{several(differing)} start differently under the same torch.manual_seed")
    expect(any(not same(first[name], other[name]) for name in first), "it starts the same whatever the seed")


def check_fresh_encoder(trials: Trials) -> None:
    """Every call makes an encoder of its own: two runs in one process must not share weights."""
    first, second = trials.encoder(), trials.encoder()
    expect(first is not second, "two calls gave the same module")
    places = [{p.data_ptr() for p in encoder.parameters() if p.numel()} for encoder in (first, second)]
    expect(not places[0] & places[1], "two encoders share parameters")


def check_trainable(trials: Trials) -> None:
    """In train mode every parameter gets a gradient: one that never does is dead weight, and stalls torchrun."""
    encoder = trials.encoder().train()
    features = encoder(worlds.pictures(8, LARGE)[0])
    applies_if(features.requires_grad)  # check_gradients_reach_images says so
    features.square().sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise Fault(f"no gradient reaches {several(idle)}")


MODEL_CHECKS: tuple[Check, ...] = (
    *COMPONENT_CHECKS,
    check_features,
    check_small_images,
    check_single_image,
    check_gradients_reach_images,
    check_deterministic_in_eval,
    check_independent_of_batch,
    check_state_dict,
    check_seeded_start,
    check_fresh_encoder,
    check_trainable,
)
