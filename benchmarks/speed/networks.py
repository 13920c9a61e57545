"""The networks that are attacked: trained once with the project's own command, kept under the work folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scl_defense_benchmarks.forward import decide, logits_of
from torch import Tensor, nn

from scl_defense import train
from scl_defense.checkpoint import load_classifier
from scl_defense.data import open_data
from scl_defense.plugins import PluginHost


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, in a few minutes: a case for timing, no result.

    name: as in the tables. accurate: it is trained well enough for its robust accuracies to be compared; of the others
    the time alone counts. eps: the ball it is attacked in; l2: the L2 ball of the battery's attacks.
    """

    name: str
    data: str
    model: str
    eps: str
    l2: str
    training: dict[str, Any]
    accurate: bool = True

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


_AT_CNN = {"generator": "pgd", "generator_options": {"steps": 7}, "epochs": 6, "limit": 6000}
_AT_NARROW = {"generator": "pgd", "generator_options": {"steps": 7}, "epochs": 6, "limit": 4000}
_AT_WIDE = {"generator": "pgd", "generator_options": {"steps": 1}, "epochs": 3, "limit": 2000, "precision": "bf16"}

RECIPES = (
    Recipe("small-cnn plain", "mnist", "small-cnn", "0.1", "1.5", {"generator": "none", "epochs": 3, "limit": 6000}),
    Recipe("small-cnn robust", "mnist", "small-cnn", "0.3", "1.5", {"eps": "0.2", **_AT_CNN}),
    Recipe(
        "resnet18-w8 plain", "cifar10-jpeg75", "resnet18", "1/255", "0.25",
        {"generator": "none", "epochs": 4, "limit": 4000, "model_options": {"width": 8}},
    ),
    Recipe(
        "resnet18-w8 robust", "cifar10-jpeg75", "resnet18", "4/255", "0.5",
        {"eps": "4/255", "model_options": {"width": 8}, **_AT_NARROW},
    ),
    Recipe(
        "resnet18-w64 robust", "cifar10-jpeg75", "resnet18", "6/255", "0.5", {"eps": "4/255", **_AT_WIDE}, False
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network and images that it classifies rightly: nothing else is attacked by anybody.

    data: what it was trained on: ``digits`` where the recipe's own data is not there. images: (N, C, H, W) in [0, 1].
    """

    recipe: Recipe
    network: nn.Module
    images: Tensor
    labels: Tensor
    classes: int
    data: str
    clean: float

    @property
    def name(self) -> str:
        return self.recipe.name

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        return self.images[:n], self.labels[:n]

    def about(self) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {
            "case": self.name, "data": self.data, "parameters": parameters, "clean": round(self.clean, 4),
            "eps": self.recipe.eps, "right": len(self.images), "accurate": self.recipe.accurate,
        }  # fmt: skip


def opened(name: str, root: str | None, host: PluginHost) -> Any:
    """The data set ``name``, or the digits where ``root`` does not hold it: nothing is downloaded."""
    folder = {"mnist": "MNIST"}.get(name, name)
    if root is None or not (Path(root) / folder).is_dir():
        return open_data("digits", host=host)
    return open_data(name, root=root, options={"flip": True} if name.startswith("cifar") else None, host=host)


def case(recipe: Recipe, *, work: Path, root: str | None, host: PluginHost, most: int, tiny: bool = False) -> Case:
    """Train, or take from ``work``, and keep the first ``most`` test images that are classified rightly.

    root: the folder of the data sets. tiny: an epoch on a few images, for a test of the machinery.
    """
    data = opened(recipe.data, root, host)
    folder = f"{recipe.folder}-{data.name.replace('/', '-')}{'-tiny' if tiny else ''}"
    trained = work / "networks" / folder / "best.pt"
    if not trained.exists():
        training = dict(recipe.training)
        if data.name == "digits":
            training |= {"limit": None, "eps": "0.1" if "eps" in training else None}
        if tiny:
            training |= {"limit": 400, "epochs": 2}
            if "model_options" in training or recipe.model == "resnet18":
                training["model_options"] = {"width": 4}
        where = {"data": data.name} if data.name == "digits" else {"data": recipe.data, "data_root": root}
        if data.name != "digits" and data.flip:
            where["data_options"] = {"flip": True}
        train(
            **where,
            model=recipe.model,
            trainer="cross-entropy",
            **{key: value for key, value in training.items() if value is not None},
            val_limit=200,
            seed=0,
            host=host,
            out=str(trained.parents[1]),
            name=folder,
        )
    loaded = load_classifier(trained, host=host)
    split = data.split("test", limit=min(4 * most, len(data.split("test"))))
    images, labels = split.float_images(), split.labels
    with torch.no_grad():
        right = decide(logits_of(loaded.network.eval(), images)) == labels
    clean = float(right.float().mean())
    return Case(recipe, loaded.network, images[right][:most], labels[right][:most], len(data.classes), data.name, clean)
