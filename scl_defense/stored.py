"""Adversarial examples made once: ``scl-defense generate`` writes them, ``train --generator file:PATH`` uses them.

What does not follow the network in training need not be made again in every epoch. A file holds, for every image of
the training split, one adversarial example a copy, and the recipe, threat and data fingerprint it was made with.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from scl_defense import compose, logs
from scl_defense.checkpoint import atomic_write_bytes
from scl_defense.config import construct
from scl_defense.data import Augment, Split, open_data
from scl_defense.errors import UserError
from scl_defense.generation import generate, saved_encoder
from scl_defense.guard import global_random_state
from scl_defense.plugins import PluginHost, default_host
from scl_defense.replay import DTYPES, FORMAT, RECORD
from scl_defense.runtime import repeatable, select_device, stream, versions
from scl_defense.threat import ThreatModel
from scl_defense.types import Batch, Context

CALIBRATION = 256  # as in training
STATIC = frozenset({"labels", "checkpoint"})  # needs that do not follow the network in training
Options = dict[str, Any]
Event = Callable[[Mapping[str, Any]], None]


def _as_written(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True))
class ExamplesRecipe:
    """What stored examples are made from; the same names on the command line and in Python."""

    generator: Annotated[str, Field(min_length=1, description="generator of adversarial views")] = "contrastive-pgd"
    generator_options: Annotated[Options, Field(description="its options")] = dataclasses.field(default_factory=dict)
    data: Annotated[str, Field(min_length=1, description="data set: a registered name, or a path")] = "digits"
    data_options: Annotated[Options, Field(description="its options")] = dataclasses.field(default_factory=dict)
    data_root: Annotated[str | None, Field(description="folder where data sets lie")] = None
    norm: Annotated[Literal["linf", "l2", "l1"], Field(description="norm of the threat model")] = "linf"
    eps: Annotated[
        str | None,
        BeforeValidator(_as_written),
        Field(description="radius, as 8/255 or 0.1; default: the data set's usual one"),
    ] = None
    copies: Annotated[int, Field(ge=1, le=10_000, description="examples of every image")] = 1
    augment: Annotated[
        Literal["none", "weak", "simclr"], Field(description="augmentation of the other view, the reference")
    ] = "weak"
    batch_size: Annotated[int, Field(ge=2, le=1_000_000, description="images that are each other's negatives")] = 128
    limit: Annotated[int | None, Field(ge=2, description="only the images that train --limit takes")] = None
    dtype: Annotated[Literal["float32", "float16"], Field(description="numbers in the file")] = "float32"
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, mps")] = "auto"
    seed: Annotated[int, Field(ge=0, le=2**62, description="seed of every random stream")] = 0


@dataclass(frozen=True)
class Examples:
    """A file of stored examples that was just written. threat: the ball they lie in."""

    path: Path
    sha256: str
    copies: int
    images: int
    threat: ThreatModel
    megabytes: float
    seconds: float


def generate_examples(
    out: str | Path | None = None,
    *,
    force: bool = False,
    plugins: Sequence[str | Path] = (),
    host: PluginHost | None = None,
    on_event: Event | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Any:
    """Make adversarial examples of a data set's whole training split and store them.

    ``out``: a ``.safetensors`` file (default: a name from the recipe, in ``examples/``); one that is there already is
    only replaced with ``force``. ``options``: the fields of :class:`ExamplesRecipe`. Every copy shuffles the split
    anew, so that an image meets other negatives. Each batch holds two views: the images as they are, around which the
    examples are made, and an augmented one, the reference. Returns :class:`Examples`; with ``dry_run`` a dict with the
    plan and the estimated time, and nothing is written. ``on_event`` is told of every batch.

    Raises :class:`UserError` for a wrong recipe, and for a generator that follows the network in training or makes
    other than one view.

    >>> import scl_defense
    >>> plan = scl_defense.generate_examples(generator="corner-noise", dry_run=True)
    >>> plan["images"]
    1437
    """
    host = host or default_host(plugins)
    recipe = construct(ExamplesRecipe, options, "generate")
    with global_random_state(), repeatable("fp32"):
        maker = _Maker(recipe, host, on_event or (lambda event: None))
        if dry_run:
            return maker.plan()
        path = _free_place(Path(out) if out is not None else Path("examples", f"{_default_name(recipe)}"), force)
        with logs.one_writer(path):
            return maker.write(path)


def _default_name(recipe: ExamplesRecipe) -> str:
    name = f"{recipe.generator}-{Path(recipe.data).stem}-s{recipe.seed}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name) + ".safetensors"


def _free_place(path: Path, force: bool) -> Path:
    if path.suffix != ".safetensors":
        raise UserError(f"'{path}' must end in .safetensors; write --out {path.with_suffix('.safetensors')}")
    if path.is_dir():
        raise UserError(f"'{path}' is a directory; give the name of a file")
    if path.exists() and not force:
        raise UserError(f"'{path}' exists already; give another --out, or --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{path.parent}': {error.strerror}") from None
    return path


class _Maker:
    """Makes the examples of one recipe, in memory."""

    def __init__(self, recipe: ExamplesRecipe, host: PluginHost, on_event: Event):
        self.recipe, self.host, self.on_event = recipe, host, on_event
        self.who = f"generator '{recipe.generator}'"
        self.generator = compose.make_generator(host, recipe.generator, recipe.generator_options)
        follows = frozenset(self.generator.needs) - STATIC
        if follows:
            raise UserError(
                f"{self.who} needs {', '.join(sorted(follows))}: it follows the network in training, so its examples "
                "cannot be made once; use one without these needs, like contrastive-pgd or corner-noise"
            )
        if recipe.generator.startswith(compose.FILE):
            raise UserError(f"{self.who}: these examples are stored already; train with --generator file:PATH")
        self.device = select_device(recipe.device)
        self.data = open_data(recipe.data, root=recipe.data_root, options=recipe.data_options, host=host)
        eps = self.data.budgets.get(recipe.norm) if recipe.eps is None else recipe.eps
        if eps is None:
            raise UserError(f"no usual {recipe.norm} radius is known for '{recipe.data}'; give one with --eps 8/255")
        self.threat = ThreatModel(recipe.norm, eps)
        self.threat.check_fits(self.data.image_shape)
        if hasattr(self.generator, "prepare"):
            self.generator.prepare(self.data, self.threat)
        self.split = self._split()
        self.augment = Augment(recipe.augment, flip=self.data.flip, image_shape=self.data.image_shape)
        chosen = torch.randperm(len(self.split), generator=stream(recipe.seed, "calibration"))[:CALIBRATION]
        self.calibration = self.split.float_images(chosen)
        self.cache: dict[Any, Any] = {}

    def _split(self) -> Split:
        if self.recipe.limit is not None:
            part = self.data.split("train", limit=self.recipe.limit)
            order = part.indices.argsort()
            return Split(part.images[order], part.labels[order], part.indices[order]).to(self.device)
        return self.data.split("train", val_fraction=0).to(self.device)

    @property
    def batches(self) -> int:
        return math.ceil(len(self.split) / self.recipe.batch_size)

    def write(self, path: Path) -> Examples:
        started = time.perf_counter()
        adversarial = self._room()
        for copy in range(self.recipe.copies):
            for step, places in enumerate(self._order(copy)):
                made = self._batch(places, copy, step)
                adversarial[copy, places.cpu()] = made.to("cpu", adversarial.dtype)
                self.on_event({"event": "batch", "copy": copy, "copies": self.recipe.copies, "images": len(places),
                               "done": copy * self.batches + step + 1, "total": self.recipe.copies * self.batches,
                               "seconds": time.perf_counter() - started})  # fmt: skip
        tensors = {"adversarial": adversarial, "indices": self.split.indices.cpu()}
        payload = safetensors.torch.save(tensors, {RECORD: json.dumps(self.record(), sort_keys=True)})
        atomic_write_bytes(path, payload)
        return Examples(
            path, hashlib.sha256(payload).hexdigest(), self.recipe.copies, len(self.split), self.threat,
            round(len(payload) / 1e6, 3), round(time.perf_counter() - started, 3),
        )  # fmt: skip

    def _room(self) -> Tensor:
        shape = (self.recipe.copies, len(self.split), *self.data.image_shape)
        try:
            return torch.empty(shape, dtype=DTYPES[self.recipe.dtype])
        except RuntimeError:
            size = math.prod(shape) * DTYPES[self.recipe.dtype].itemsize / 1e9
            raise UserError(
                f"{size:.3g} GB do not fit into memory; ask for fewer --copies or --dtype float16"
            ) from None

    def _order(self, copy: int) -> Sequence[Tensor]:
        """Batches of nearly equal size: a last batch of one image would have no negative."""
        order = torch.randperm(len(self.split), generator=stream(self.recipe.seed, "order", copy))
        return order.to(self.device).tensor_split(self.batches)

    def _batch(self, places: Tensor, copy: int, step: int) -> Tensor:
        """(n, C, H, W): one adversarial example of every image."""
        seed = self.recipe.seed
        images = self.split.float_images(places)
        views = torch.stack([images, self.augment(images, stream(seed, "augment", copy, step, 1))])
        batch = Batch(views, self.split.labels[places], images, self.split.indices[places])
        context = Context(
            threat=self.threat,
            rng=stream(seed, "generator", copy, step),
            calibration=self.calibration,
            epoch=copy,
            step=step,
            cache=self.cache,
            streams=lambda purpose, *counters: stream(seed, f"generator {purpose}", *counters),
            generator=self.who,
        )

        def saved(path: str) -> Any:
            return saved_encoder(path, self.data.image_shape, self.device, host=self.host)

        made = generate(self.generator, batch, context, network=None, saved=saved)
        if len(made) != 1:
            raise UserError(
                f"{self.who} makes {len(made)} adversarial views; stored examples hold one a copy: "
                "leave views at 1 and ask for more --copies"
            )
        return made[0]

    def record(self) -> dict[str, Any]:
        """What goes into the file beside the examples."""
        return {
            "format": FORMAT,
            "recipe": dataclasses.asdict(self.recipe),
            "generator": repr(self.generator),
            "needs": sorted(self.generator.needs),
            "data": self.data.provenance,
            "data_sha256": self.data.fingerprint("train"),
            "threat": str(self.threat),
            "plugins": self.host.provenance(),
            "versions": versions(),
        }

    def plan(self) -> dict[str, Any]:
        """Two real batches (the first one warms up), timed on the second; nothing is kept or written."""
        places = self._order(0)[0]
        for _ in range(2):
            started = time.perf_counter()
            self._batch(places, 0, 0)
            seconds = time.perf_counter() - started
        batches = self.recipe.copies * self.batches
        size = self.recipe.copies * len(self.split) * math.prod(self.data.image_shape)
        return {
            "images": len(self.split), "copies": self.recipe.copies, "batches": batches, "threat": str(self.threat),
            "device": str(self.device), "seconds_per_batch": seconds, "estimated_seconds": seconds * batches,
            "megabytes": round(size * DTYPES[self.recipe.dtype].itemsize / 1e6, 3), **self.record(),
        }  # fmt: skip
