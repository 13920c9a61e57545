"""The contract of trainers: what the training loop and the checkpoint rely on."""

import copy
import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scl_defense.models import Network
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import (
    COMPONENT_CHECKS,
    Check,
    CheckResult,
    Fault,
    applies_if,
    changes,
    examine,
    expect,
    expect_unmoved,
    global_state_watched,
    network_state,
    same,
    seed_globals,
    several,
)
from scl_defense.types import Batch, StepOutput

MEAN, STD = (0.4,), (0.3,)


def check_trainer(component: Any, name: str | None = None) -> list[CheckResult]:
    """Run the contract test on a trainer: an instance, or a class (with its default options)."""
    return examine(component, name, TRAINER_CHECKS, Trials)


class Trials:
    """Steps of one trainer on a small batch-norm network without dropout, so that no step needs a random number."""

    def __init__(self, trainer: Any, name: str):
        self.component, self.name = trainer, name

    @property
    def views(self) -> int:
        views = getattr(self.component, "views", 2)
        return views if isinstance(views, int) and views > 0 else 2

    def network(self, seed: int = 0) -> Network:
        encoder = worlds.tiny_encoder(1, seed=seed)
        torch.manual_seed(seed)  # the heads, as in a run
        network: Network = self.component.build(encoder, worlds.CLASSES, MEAN, STD)
        return network.train()

    def batch(self, count: int = 8, seed: int = 0) -> Batch:
        return worlds.batch_of(count, views=self.views, seed=seed)

    def counts(self) -> list[int]:
        """Numbers of adversarial views a generator may hand over: none, one, all."""
        return sorted({0, 1, self.views})

    def step(self, network: Network, batch: Batch, count: int = 1, shift: float = 0.1) -> StepOutput:
        """One step with ``count`` adversarial views, made by moving every pixel by ``shift``."""
        output: StepOutput = self.component.step(network, batch, adversarial_of(batch, count, shift))
        return output

    @cached_property
    def repeatable(self) -> bool:
        """Whether a step gives the same loss before and after another one."""
        network, losses = self.network(), []
        for batch in (self.batch(), self.batch(seed=5), self.batch()):
            seed_globals(0)
            losses.append(self.step(copy.deepcopy(network), batch).loss.detach())
        return same(losses[0], losses[2])


def adversarial_of(batch: Batch, count: int, shift: float = 0.1) -> Tensor:
    signs = torch.randn(batch.views.shape, generator=torch.Generator().manual_seed(3)).sign()
    return (batch.views + shift * signs).clamp(0, 1)[:count]


def check_views_and_head(trials: Trials) -> None:
    """``views`` says how many augmented views to make, ``head`` whether a probe is to be fitted: joint or probe."""
    views, head = getattr(trials.component, "views", None), getattr(trials.component, "head", None)
    expect(isinstance(views, int) and views >= 1, f"views is {views!r}; it must be a whole number from 1 on")
    expect(head in ("joint", "probe"), f"head is {head!r}; it must be 'joint' or 'probe'")


def check_builds_network(trials: Trials) -> None:
    """``build`` returns a :class:`scl_defense.models.Network` around the given encoder with the given classes and
    normalisation, and its checkpoint gives the same logits when loaded without the trainer.
    """
    encoder = worlds.tiny_encoder(1)
    network = trials.component.build(encoder, worlds.CLASSES, MEAN, STD)
    expect(isinstance(network, Network), f"build returned {type(network).__name__}, not scl_defense.models.Network")
    expect(network.encoder is encoder, "build put another encoder in the place of the one it was given")
    expect(network.num_classes == worlds.CLASSES, f"built for {network.num_classes} classes, not {worlds.CLASSES}")
    normal = (tuple(network.normalize.mean.flatten().tolist()), tuple(network.normalize.std.flatten().tolist()))
    agrees = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(normal[0] + normal[1], MEAN + STD, strict=False))
    expect(agrees, f"it normalises with mean {normal[0]} and std {normal[1]}, not {MEAN} and {STD}")
    images, plain = trials.batch().images, Network(worlds.tiny_encoder(1, seed=9), worlds.CLASSES, (0.0,), (1.0,))
    kept = ("normalize", "encoder", "classifier")  # what scl_defense.checkpoint loads
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if k.partition(".")[0] in kept})
    with torch.no_grad():
        loadable = torch.allclose(plain.eval()(images), network.eval()(images), atol=1e-6)
    expect(
        loadable,
        "its logits are not classifier(encoder(normalize(images))): its checkpoint, loaded, would answer otherwise",
    )


def check_loss(trials: Trials) -> None:
    """``step`` gives a finite scalar loss with a graph, for no, one and all adversarial views."""
    for count in trials.counts():
        output = trials.step(trials.network(), trials.batch(), count)
        with_views = f"with {count} adversarial views"
        expect(isinstance(output, StepOutput), f"step returned {type(output).__name__}, not a StepOutput {with_views}")
        loss = output.loss
        expect(isinstance(loss, Tensor) and loss.dim() == 0, f"the loss is no scalar tensor {with_views}")
        expect(math.isfinite(float(loss.detach())), f"the loss is {float(loss.detach())} {with_views}")
        expect(loss.requires_grad, f"the loss has no graph {with_views}: nothing would be trained")


def check_metrics(trials: Trials) -> None:
    """Metrics are finite numbers by name: they are averaged over the epoch and logged."""
    for count in trials.counts():
        for name, value in trials.step(trials.network(), trials.batch(), count).metrics.items():
            number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
            expect(isinstance(name, str) and number, f"metric {name!r} is {type(value).__name__}, not one number")
            expect(math.isfinite(float(value)), f"metric '{name}' is {float(value)} with {count} adversarial views")


def check_gradients_reach_encoder(trials: Trials) -> None:
    """The loss trains the encoder, with and without adversarial views (unless the class says ``frozen_encoder``)."""
    applies_if(not getattr(trials.component, "frozen_encoder", False))
    for count in (0, 1):
        network = _after_backward(trials, trials.batch(), count)
        moved = any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.encoder.parameters())
        expect(moved, f"no gradient reaches the encoder with {count} adversarial views")


def check_gradients_reach_classifier(trials: Trials) -> None:
    """With ``head = "joint"`` the classifier is trained along: it is the one that is attacked and saved."""
    applies_if(getattr(trials.component, "head", None) == "joint")
    for count in (0, 1):
        gradient = _after_backward(trials, trials.batch(), count).classifier.weight.grad
        moved = gradient is not None and bool(gradient.abs().sum() > 0)
        expect(moved, f"head is 'joint' but no gradient reaches the classifier with {count} adversarial views")


def _after_backward(trials: Trials, batch: Batch, count: int) -> Network:
    network = trials.network()
    loss = trials.step(network, batch, count).loss
    applies_if(isinstance(loss, Tensor) and loss.requires_grad)  # check_loss says so
    loss.sum().backward()
    return network


def check_adversarial_views_matter(trials: Trials) -> None:
    """The loss changes with the adversarial views, or the class says ``ignores_adversarial = True``: otherwise a run
    named after a generator would be a clean one.
    """
    applies_if(not getattr(trials.component, "ignores_adversarial", False))
    network, batch = trials.network(), trials.batch()
    losses = []
    for shift in (0.02, 0.3):
        seed_globals(0)  # what is drawn must not pass for what the views do
        losses.append(trials.step(copy.deepcopy(network), batch, 1, shift).loss.detach())
    equal = same(*losses)
    expect(not equal, "the loss ignores the adversarial views; if that is meant, set ignores_adversarial = True")


def check_batch_untouched(trials: Trials) -> None:
    """Views, labels, images, indices and adversarial views are not written to."""
    batch = trials.batch()
    adversarial = adversarial_of(batch, 1)
    given = {name: getattr(batch, name) for name in ("views", "labels", "images", "indices")}
    given["adversarial"] = adversarial
    before = {name: value.clone() for name, value in given.items()}
    trials.component.step(trials.network(), batch, adversarial)
    written = changes(before, given)
    if written:
        raise Fault(f"it wrote into {several(written)}")


def check_network_left_to_core(trials: Trials) -> None:
    """``step`` computes a loss and no more: train/eval modes, weights and gradients are the loop's. (Batch-norm
    statistics move by themselves.)
    """
    network = trials.network()
    before = network_state(network)
    trials.step(network, trials.batch())
    disturbed = [name for name in changes(before, network_state(network)) if not name.startswith("the buffer")]
    if disturbed:
        raise Fault(f"step changed {several(disturbed)}")


def check_global_state(trials: Trials) -> None:
    """A step neither moves nor reads a global random state and leaves torch's settings: resuming must be exact."""
    network, losses = trials.network(), []
    for seed in (1, 2):
        mine = copy.deepcopy(network)
        seed_globals(seed)
        with global_state_watched() as moved:
            losses.append(trials.step(mine, trials.batch()).loss)
        expect_unmoved(moved)
    applies_if(trials.repeatable)
    expect(same(losses[0].detach(), losses[1].detach()), "the loss depends on a global random state")


def check_deterministic(trials: Trials) -> None:
    """The same network and batch give the same loss, also after another step: a trainer keeps nothing between steps,
    because nothing of it is in the checkpoint.
    """
    expect(trials.repeatable, "the same batch and weights give another loss after another step; keep no state")


def check_lonely_classes(trials: Trials) -> None:
    """A class that appears once and a batch of a single class give a finite loss and finite gradients: a contrastive
    loss has no positive, or no negative, there.
    """
    batch = trials.batch(4)
    kinds = {
        "in which one class appears once": replace(batch, labels=torch.tensor([0, 0, 0, 1])),
        "in which every class appears once": replace(batch, labels=torch.arange(4)),
        "of a single class": replace(batch, labels=torch.zeros(4, dtype=torch.int64)),
    }
    for what, odd in kinds.items():
        for count in (0, 1):
            network = trials.network()
            loss = trials.step(network, odd, count).loss.sum()
            expect(math.isfinite(float(loss.detach())), f"on a batch {what} the loss is {float(loss.detach())}")
            if loss.requires_grad:
                loss.backward()
            bad = [n for n, p in network.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
            if bad:
                raise Fault(f"on a batch {what} the gradient of {several(bad)} is NaN or infinite")


def check_learns(trials: Trials) -> None:
    """Thirty steps of gradient descent on one easy batch lower the loss."""
    network, batch, losses = trials.network(), trials.batch(16), []
    for _ in range(30):
        network.zero_grad()
        loss = trials.step(network, batch).loss.sum()
        applies_if(loss.requires_grad)  # check_loss says so
        losses.append(float(loss.detach()))
        loss.backward()
        with torch.no_grad():
            length = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad / length.clamp(min=1))  # as the loop clips it
    last = sum(losses[-3:]) / 3
    expect(last < losses[0], f"in thirty steps on one batch the loss went from {losses[0]:.4g} to {last:.4g}")


TRAINER_CHECKS: tuple[Check, ...] = (
    *COMPONENT_CHECKS,
    check_views_and_head,
    check_builds_network,
    check_loss,
    check_metrics,
    check_gradients_reach_encoder,
    check_gradients_reach_classifier,
    check_adversarial_views_matter,
    check_batch_untouched,
    check_network_left_to_core,
    check_global_state,
    check_deterministic,
    check_lonely_classes,
    check_learns,
)
