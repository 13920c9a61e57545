"""Part (b): a training step of every generator, as a ratio to cross-entropy and to the floor of its passes.

A step is the project's own :meth:`scl_defense.train.Run.train_step`: augmentation, generator, loss, backward pass,
optimizer. The floor of a generator is its K forward and input-gradient passes with frozen parameters, in the precision
of the run; that of a whole step has the passes of the loss beside them.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from scl_defense_plugins.trainers.presets import AdvSupCon

from scl_defense import generate_examples
from scl_defense.config import TrainConfig, train_config
from scl_defense.guard import frozen
from scl_defense.plugins import default_host
from scl_defense.runtime import autocast, stream
from scl_defense.sharing import Lot
from scl_defense.train import Run
from scl_defense.types import Batch
from speed.networks import opened
from speed.timing import Budget, interleaved, ratio


class ThreeCleanViews(AdvSupCon):
    """What a stored example is compared with: a third clean view in its place."""

    views = 3


@dataclass(frozen=True)
class Method:
    """name: as in the tables. online: the passes of its generator are those of the network in training, ``steps``."""

    name: str
    trainer: str
    generator: str
    options: dict[str, Any] = field(default_factory=dict)
    online: int = 0
    third: bool = False


METHODS = (
    Method("ce", "cross-entropy", "none"),
    Method("ce on fgsm", "cross-entropy", "pgd", {"steps": 1}, online=1),
    Method("ce on pgd-10", "cross-entropy", "pgd", {"steps": 10}, online=10),
    Method("supcon 2 clean views", "adv-supcon", "none"),
    Method("supcon 3 clean views", "adv-supcon", "none", third=True),
    Method("supcon + stored", "adv-supcon", "stored"),
    Method("supcon + uniform-noise", "adv-supcon", "uniform-noise"),
    Method("supcon + corner-noise", "adv-supcon", "corner-noise"),
    Method("supcon + contrastive-pgd", "adv-supcon", "contrastive-pgd"),
    Method("supcon + ridge-pgd", "adv-supcon", "ridge-pgd"),
    Method("supcon + pgd-10", "adv-supcon", "pgd", {"steps": 10}, online=10),
    Method("supcon + contrastive-pgd-online", "adv-supcon", "contrastive-pgd-online", {"steps": 10}, online=10),
)


@dataclass(frozen=True)
class World:
    """A network and its data. batch: images a step."""

    name: str
    data: str
    model: str
    batch: int
    options: dict[str, Any] = field(default_factory=dict)


WORLDS = (World("small-cnn", "mnist", "small-cnn", 128), World("resnet18", "cifar10-jpeg75", "resnet18", 32))


@dataclass
class Options:
    """seconds: of the whole part. worlds, methods, precisions: what is measured; limit: training images."""

    root: str | None = None
    seconds: float = 240.0
    repeats: int = 5
    worlds: tuple[World, ...] = WORLDS
    methods: tuple[Method, ...] = METHODS
    precisions: tuple[str, ...] = ("fp32", "bf16")
    limit: int = 512


def measure(options: Options, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    groups = [(world, precision) for world in options.worlds for precision in options.precisions]
    shares = Budget(options.seconds, len(groups)).shares()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world, precision in groups:
            say(f"training step: {world.name} {precision}")
            rows += _world(world, precision, options, next(shares), Path(folder))
    return rows


def _world(world: World, precision: str, options: Options, seconds: float, folder: Path) -> list[dict[str, Any]]:
    runs = {method.name: _run(method, world, precision, options, folder) for method in options.methods}
    calls: dict[str, Callable[[], Any]] = {}
    for method in options.methods:
        calls[method.name] = lambda run=runs[method.name]: _step(run)
        if method.online:
            calls[f"{method.name}: generator"] = _generator(runs[method.name])
            calls[f"{method.name}: floor"] = _attack_floor(runs[method.name], method.online)
    until = perf_counter() + seconds
    found = interleaved(calls, repeats=options.repeats, until=until, warm=True)
    units = _units(runs[options.methods[0].name], options.repeats)
    rows = []
    for method in options.methods:
        timing = found[method.name]
        row: dict[str, Any] = {"kind": "step", "network": world.name, "precision": precision, "method": method.name}
        row |= {"batch": world.batch, **timing.row()}
        if timing.ok:
            row["images_per_s"] = round(world.batch / (timing.median or 1), 2)
            for other in ("ce", "supcon 2 clean views", "supcon 3 clean views", "supcon + stored"):
                if other in found and other != method.name and (over := ratio(timing, found[other])) is not None:
                    row[f"over {other}"] = round(over, 4)
            row |= _passes(timing.value, timing.median or 0.0, world.batch, method, units)
        if method.online:
            made, floor = found[f"{method.name}: generator"], found[f"{method.name}: floor"]
            row["generator"], row["generator floor"] = made.row(), floor.row()
            if (over := ratio(made, floor)) is not None:
                row["generator over floor"] = round(over, 4)
        rows.append(row)
    return rows


def _run(method: Method, world: World, precision: str, options: Options, folder: Path) -> Run:
    host = default_host()
    data = opened(world.data, options.root, host)
    fallback = data.name == "digits"
    where: dict[str, Any] = {"data": data.name} if fallback else {"data": data.name, "data_root": options.root}
    if not fallback and data.flip:
        where["data_options"] = {"flip": True}
    generator = method.generator
    if generator == "stored":
        path = folder / f"{world.name}.safetensors"
        if not path.exists():
            generate_examples(path, generator="uniform-noise", limit=options.limit, host=host, **where)
        generator = f"file:{path}"
    config: TrainConfig = train_config(
        {
            **where,
            "trainer": method.trainer,
            "generator": generator,
            "generator_options": method.options,
            "model": world.model,
            "model_options": world.options,
            "limit": options.limit,
            "batch_size": world.batch,
            "precision": precision,
        }
    )
    run = Run(config, host, lambda event: None)
    if method.third:
        run.trainer = ThreeCleanViews()
    run.training_mode()
    return run


def _chosen(run: Run) -> torch.Tensor:
    return torch.arange(run.batch_size)


def _step(run: Run) -> dict[str, float]:
    return run.train_step(_chosen(run), 0, 0)


def _lot(run: Run) -> Lot:
    views, rng = run.trainer.views, lambda number: stream(0, "augment", number)
    return Lot(run.train_split, _chosen(run), views, run.augment, rng, **run.by_row)


def _batch(run: Run) -> Batch:
    return _lot(run).whole()


def _generator(run: Run) -> Callable[[], Any]:
    lot = _lot(run)
    (piece,) = lot.pieces(1)
    return lambda: run.generate(lot, piece, 0, 0)


def _attack_floor(run: Run, steps: int) -> Callable[[], None]:
    """K passes forward and back to the images through what the generator attacks, in eval mode, parameters frozen."""
    batch, config = _batch(run), run.config
    forward = run.network.logits if config.generator == "pgd" else run.network.embed

    def call() -> None:
        with frozen(run.network):
            for _ in range(steps):
                point = batch.views[0].detach().requires_grad_()
                with autocast(point.device, config.precision):
                    output = forward(point)
                output = output.float()
                loss = (
                    F.cross_entropy(output, batch.labels, reduction="sum")
                    if config.generator == "pgd"
                    else output.sum()
                )
                torch.autograd.grad(loss, point)

    return call


def _units(run: Run, repeats: int) -> dict[str, float]:
    """Seconds an image: a pass back to the weights, in train mode, and one back to the image, weights frozen."""
    batch, config = _batch(run), run.config

    def weights() -> None:
        with autocast(batch.views.device, config.precision):
            loss = F.cross_entropy(run.network(batch.views[0]).float(), batch.labels)
        torch.autograd.grad(loss, [p for p in run.network.parameters() if p.requires_grad], allow_unused=True)

    def image() -> None:
        point = batch.views[0].detach().requires_grad_()
        with frozen(run.network):
            with autocast(point.device, config.precision):
                logits = run.network(point)
            torch.autograd.grad(F.cross_entropy(logits.float(), batch.labels), point)

    found = interleaved({"weights": weights, "image": image}, repeats=max(3, repeats), warm=True)
    return {name: (timing.median or 0.0) / len(batch.labels) for name, timing in found.items()}


def _passes(
    metrics: dict[str, float], seconds: float, batch: int, method: Method, units: dict[str, float]
) -> dict[str, Any]:
    """Passes an image, and the step over the floor of those: what the loss needs, and K of the generator."""
    trained = metrics["backwards"] - method.online
    floor = batch * (trained * units["weights"] + method.online * units["image"])
    return {
        "forwards": round(metrics["forwards"], 2),
        "backwards": round(metrics["backwards"], 2),
        "over floor": round(seconds / floor, 4) if floor > 0 else None,
    }
