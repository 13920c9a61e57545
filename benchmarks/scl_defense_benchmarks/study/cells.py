"""The grid: which cells a study has, and the recipe by which a cell is known again."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from scl_defense.compose import check_name, make_generator
from scl_defense.config import COMPONENT_FIELDS, TrainConfig, as_dict, layered, train_config
from scl_defense.errors import UserError
from scl_defense_benchmarks.study.spec import NO_CHOICE, Choice, Spec, arm_name

# Where things lie and are logged changes no number.
UNHASHED = ("out", "name", "data_root", "logger")


@dataclass(frozen=True)
class Cell:
    """One network to train and attack. id: its folder's name. context: data set and model, within which arms compare.

    recipe: everything that can change a number, as plain data. settings: what cannot (where the data lie).
    """

    id: str
    arm: str
    label: str
    role: str | None
    method: str
    data: str
    model: str
    context: str
    seed: int
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()


def grid(spec: Spec, data_root: str | None = None) -> list[Cell]:
    """Every cell in the order of the results file: data set, model, method, generator, seed.

    Raises :class:`UserError` for a recipe that cannot be, and where two axes set the same option.
    """
    axes = (spec.datasets, spec.models, spec.methods, spec.generators)
    cells = []
    for data, model, method, generator in product(*(axis or (NO_CHOICE,) for axis in axes)):
        parts = [part for part in (generator, data, model) if part.name]
        fields = _fields(spec, method, parts)
        where = f"study '{spec.file.name}', method '{method.name}'" + "".join(f", '{part.name}'" for part in parts)
        for seed in spec.seeds:
            try:
                config = train_config({**fields, "seed": seed} | ({"data_root": data_root} if data_root else {}))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            label = ", ".join(part.label for part in (method, generator) if part.name)
            context = " ".join(part.name for part in (data, model) if part.name)
            folder = "--".join([method.name, *(part.name for part in parts), f"s{seed}"])
            cells.append(
                Cell(
                    id=folder,
                    arm=arm_name(method.name, generator.name),
                    label=label,
                    role=generator.role or method.role,
                    method=method.name,
                    data=data.name or Path(config.data).name,
                    model=model.name or config.model,
                    context=context,
                    seed=seed,
                    recipe=_recipe(spec, method, config),
                    settings={name: as_dict(config)[name] for name in ("data_root", "logger")},
                )
            )
    return cells


def _fields(spec: Spec, method: Choice, parts: Sequence[Choice]) -> dict[str, Any]:
    """Base, then the axes, then the method; base may be overridden, two others may not set the same thing."""
    fields, owner = dict(spec.base), {}
    for choice in (*parts, method):
        for path in _leaves(choice.fields):
            if path in owner:
                raise UserError(
                    f"study '{spec.file.name}': '{owner[path]}' and '{choice.name}' both set {path}; leave one out"
                )
            owner[path] = choice.name
        fields = layered(fields, choice.fields)
    return fields


def _recipe(spec: Spec, method: Choice, config: TrainConfig) -> dict[str, Any]:
    train = {name: value for name, value in as_dict(config).items() if name not in UNHASHED}
    recipe: dict[str, Any] = {"train": train}
    if method.finetune:
        recipe["finetune"] = {"protocol": method.finetune, **spec.finetune}
    recipe["batteries"] = {
        battery.name: {"attacks": battery.attacks, "n": battery.n or spec.n, "eps": battery.eps, "norm": battery.norm}
        for battery in spec.batteries
        if battery.seeds is None or config.seed in battery.seeds
    }
    if spec.curve is not None:
        recipe["curve"] = {"attacks": spec.curve.attacks, "n": spec.curve.n or spec.n}
    return json.loads(json.dumps(recipe))


def check_components(spec: Spec, cells: Sequence[Cell], host: Any) -> None:
    """A misspelt component, option or attack is found here, before hours of training. Raises :class:`UserError`.

    Names first: they are answered before anything heavy is imported. What a component does when it runs is the
    cell's own business: a broken one fails its cells alone.
    """
    recipes = {json.dumps({**cell.recipe["train"], "seed": 0}, sort_keys=True): cell for cell in cells}.values()
    for cell in recipes:
        with _told(spec, cell):
            for name, kind in COMPONENT_FIELDS.items():
                written = cell.recipe["train"][name]
                if kind == "generator" and written is not None:
                    check_name(host, written)
                elif kind in ("trainer", "model"):
                    host[kind].entry(written)
    from scl_defense.config import make, with_generator
    from scl_defense.errors import ComponentError
    from scl_defense.threat import ThreatModel, parse_eps
    from scl_defense_benchmarks.battery import plan_attacks

    for radii in (spec.curve.eps,) if spec.curve is not None else ():
        sizes = [parse_eps(text) for text in radii]
        if any(later <= earlier for earlier, later in pairwise(sizes)) or sizes[0] <= 0:
            raise UserError(f"study '{spec.file.name}': curve: eps {', '.join(radii)} must be above 0 and rise")
    for cell in recipes:
        train = cell.recipe["train"]
        with _told(spec, cell), contextlib.suppress(ComponentError):
            for kind in ("trainer", "model"):
                make(host, kind, train[kind], train[f"{kind}_options"])
            whole = with_generator(train_config(train), host)
            make_generator(host, whole.generator, whole.generator_options)
            for battery in (*cell.recipe["batteries"].values(), *filter(None, [cell.recipe.get("curve")])):
                threat = ThreatModel(battery.get("norm") or train["norm"], battery.get("eps") or train["eps"] or "0.1")
                plan_attacks(
                    battery["attacks"], host=host, threat=threat, budgets={"linf": "0.1", "l2": "1", "l1": "5"}
                )


_SOME_BUDGETS = {"linf": "0.1", "l2": "1", "l1": "5"}  # the data's own are not read for a check of names


@contextlib.contextmanager
def _told(spec: Spec, cell: Cell) -> Iterator[None]:
    """A user's mistake is told with the file and the method it stands in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"study '{spec.file.name}', method '{cell.method}': {error}") from None


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first difference between two recipes, ``"train.epochs: 40 -> 20"``, or ``None``.

    An option that did not exist when the old recipe was written, and that now has its default, changes nothing.
    """
    defaults = dict(_leaves_of({"train": as_dict(TrainConfig())}))
    before, after = dict(_leaves_of(old)), dict(_leaves_of(new))
    for name in [*before, *(name for name in after if name not in before)]:
        a, b = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if a != b and not (a is _ABSENT and name in defaults and b == defaults[name]):
            return f"{name}: {_shown(a)} -> {_shown(b)}"
    return None


_ABSENT = object()


def _shown(value: Any) -> str:
    return "(not set)" if value is _ABSENT else json.dumps(value)


def _leaves(fields: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name, _ in _leaves_of(fields))


def _leaves_of(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves_of(item, f"{above}{name}.")
        elif not isinstance(item, Mapping):
            yield f"{above}{name}", item
