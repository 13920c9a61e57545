"""The recipe of a study: from a TOML file to checked, plain data.

Imports no torch: a misspelt key is answered at once.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scl_defense.config import TrainConfig, layered, read_toml
from scl_defense.errors import UserError, nearest

PROTOCOLS = ("slf", "alf", "aff")
AXES = ("generators", "datasets", "models")
FIELDS = tuple(part.name for part in dataclasses.fields(TrainConfig))
OWNED = ("out", "name", "seed")  # what the study decides for every cell
_TOP = ("title", "question", "seeds", "baseline", "n", "base", "methods", *AXES, "batteries", "curve", "finetune",
        "contrasts", "sizes", "default_size")  # fmt: skip
_SIZE = ("seeds", "n", "base", "methods", *AXES, "batteries", "curve", "finetune")
_REPLACED = ("seeds", "n", *AXES)  # of a size: given anew, not merged
_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+="


@dataclass(frozen=True)
class Choice:
    """One entry of an axis (a method, generator, data set or model): TrainConfig fields, and how it is shown."""

    name: str
    label: str
    role: str | None
    fields: Mapping[str, Any]
    finetune: str | None = None


@dataclass(frozen=True)
class Battery:
    """Attacks as ``benchmark`` takes them. n, eps, norm: ``None``: the study's n, the checkpoint's own ball.

    seeds: only cells of these seeds get it (``None``: all): an expensive battery that checks the first one.
    """

    name: str
    attacks: str
    n: int | None = None
    eps: str | None = None
    norm: str | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Curve:
    """Accuracy against eps: one attack, given each radius in turn."""

    attack: str
    eps: tuple[str, ...]
    n: int | None = None

    @property
    def attacks(self) -> str:
        return ",".join(f"{self.attack}:eps={eps}" for eps in self.eps)


@dataclass(frozen=True)
class Contrast:
    """A named paired comparison for the summary: is ``better`` better than ``than``? Both are arms."""

    name: str
    better: str
    than: str
    says: str


@dataclass(frozen=True)
class Spec:
    """A whole study. ``file`` and ``size`` say where it came from; the first battery is the main one."""

    file: Path
    size: str | None
    title: str
    question: str
    seeds: tuple[int, ...]
    baseline: str | None
    n: int | None
    base: Mapping[str, Any]
    methods: tuple[Choice, ...]
    generators: tuple[Choice, ...]
    datasets: tuple[Choice, ...]
    models: tuple[Choice, ...]
    batteries: tuple[Battery, ...]
    curve: Curve | None
    finetune: Mapping[str, Any]
    contrasts: tuple[Contrast, ...]
    sizes: tuple[str, ...] = field(default=())

    @property
    def arms(self) -> list[str]:
        """What is compared: methods, or ``METHOD--GENERATOR`` where there is an axis of generators."""
        return [arm_name(m.name, g.name) for m in self.methods for g in self.generators or (NO_CHOICE,)]


NO_CHOICE = Choice("", "", None, {})


def arm_name(method: str, generator: str) -> str:
    return f"{method}--{generator}" if generator else method


def read_spec(
    path: str | Path,
    *,
    size: str | None = None,
    seeds: Iterable[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Spec:
    """Read and check a study. overrides: of ``[base]``, after the size; ``generator_options.steps`` reaches a table.

    Raises :class:`UserError`, one line, for anything that is not a study.
    """
    path = Path(path)
    values = read_toml(path)
    what = f"study '{path.name}'"
    _known(values, _TOP, what, "key")
    sizes = _table(values.pop("sizes", {}), f"{what}: sizes")
    default = values.pop("default_size", None)
    size = default if size is None else size
    if size is not None:
        if size not in sizes:
            listed = f"sizes: {', '.join(sizes)}" if sizes else "it has none"
            raise UserError(f"{what} has no size '{size}'{nearest(str(size), sizes)} ({listed})")
        values = _resized(values, _table(sizes[size], f"{what}: size '{size}'"), f"{what}: size '{size}'")
    for name, value in (overrides or {}).items():
        _set(values.setdefault("base", {}), name, value)
    if seeds is not None:
        values["seeds"] = list(seeds)
    return _checked(values, path, size, tuple(sizes), what)


def _checked(values: dict[str, Any], path: Path, size: str | None, sizes: tuple[str, ...], what: str) -> Spec:
    base = _fields(values.get("base", {}), f"{what}: base")
    methods = _choices(values.get("methods", {}), f"{what}: method", finetune=True)
    if not methods:
        raise UserError(f"{what} has no method; give at least one, like [methods.supcon] with generator = 'none'")
    axes = {axis: _choices(values.get(axis, {}), f"{what}: {axis.removesuffix('s')}") for axis in AXES}
    spec = Spec(
        file=path,
        size=size,
        title=_text(values.get("title", path.stem), f"{what}: title"),
        question=_text(values.get("question", ""), f"{what}: question"),
        seeds=_seeds(values.get("seeds", [0]), what),
        baseline=values.get("baseline"),
        n=_count(values.get("n"), f"{what}: n"),
        base=base,
        methods=methods,
        batteries=_batteries(values.get("batteries", {}), what),
        curve=_curve(values.get("curve"), what),
        finetune=_fields(values.get("finetune", {}), f"{what}: finetune"),
        contrasts=_contrasts(values.get("contrasts", {}), what),
        sizes=sizes,
        **axes,
    )
    for where, name in [("baseline", spec.baseline), *((f"contrast '{c.name}'", arm) for c in spec.contrasts
                                                       for arm in (c.better, c.than))]:  # fmt: skip
        if name is not None and name not in spec.arms and name not in [method.name for method in methods]:
            close = nearest(str(name), spec.arms)
            raise UserError(f"{what}: {where} '{name}' is no method{close} (methods: {', '.join(spec.arms)})")
    return spec


def _resized(values: dict[str, Any], size: dict[str, Any], what: str) -> dict[str, Any]:
    """A size's own seeds, n and axes replace the study's; its tables (base, methods, batteries, ...) are merged in."""
    _known(size, _SIZE, what, "key")
    merged = copy.deepcopy(values)
    for name, value in size.items():
        if name in _REPLACED:
            merged[name] = value
        elif name in ("methods", "batteries"):
            for entry, own in _table(value, f"{what}: {name}").items():
                there = merged.get(name, {})
                if name == "methods" and entry not in there:
                    raise UserError(f"{what}: there is no method '{entry}'{nearest(entry, there)}")
                merged.setdefault(name, {})[entry] = layered(there.get(entry, {}), _table(own, f"{what}: {entry}"))
        elif name == "curve":
            merged[name] = {**merged.get(name, {}), **_table(value, f"{what}: curve")}
        else:
            merged[name] = layered(merged.get(name, {}), _table(value, f"{what}: {name}"))
    return merged


def _set(base: dict[str, Any], name: str, value: Any) -> None:
    head, dot, tail = name.partition(".")
    if dot and not head.endswith("_options"):
        raise UserError(f"--set {name}: only options have parts; write generator_options.steps=20")
    merged = layered(base, {head: {tail: value}} if dot else {head: value})
    base.clear()
    base.update(merged)


def _fields(value: Any, what: str) -> dict[str, Any]:
    """A table of TrainConfig fields; their values are checked when a cell's recipe is made."""
    table = _table(value, what)
    _known(table, FIELDS, what, "option")
    for name in OWNED:
        if name in table:
            remedy = "list seeds at the top" if name == "seed" else "the study's --out decides"
            raise UserError(f"{what}: '{name}' is not for a recipe to set; {remedy}")
    return table


def _choices(value: Any, what: str, finetune: bool = False) -> tuple[Choice, ...]:
    extra = ("label", "role", "finetune") if finetune else ("label", "role")
    made = []
    for name, entry in _table(value, f"{what}s").items():
        about = f"{what} '{name}'"
        if not name or "--" in name or not set(name) <= set(_NAME + "-") or name[0] not in _NAME:
            raise UserError(f"{about}: a name is made of letters, digits and _ . + = -, without '--'; label says more")
        table = _table(entry, about)
        _known(table, (*extra, *FIELDS), about, "option")
        own = {key: table.pop(key) for key in extra if key in table}
        protocol = own.get("finetune")
        if protocol is not None and protocol not in PROTOCOLS:
            raise UserError(f"{about}: finetune '{protocol}' is unknown; it must be one of {', '.join(PROTOCOLS)}")
        role = None if own.get("role") is None else _text(own["role"], f"{about}: role")
        made.append(
            Choice(name, _text(own.get("label", name), f"{about}: label"), role, _fields(table, about), protocol)
        )
    return tuple(made)


def _batteries(value: Any, what: str) -> tuple[Battery, ...]:
    made = []
    for name, entry in _table(value, f"{what}: batteries").items():
        about = f"{what}: battery '{name}'"
        table = _table(entry, about)
        _known(table, ("attacks", "n", "eps", "norm", "seeds"), about, "key")
        if "attacks" not in table:
            raise UserError(f"{about} has no attacks; give attacks = 'fgsm,pgd'")
        if name in ("cell", "record", "embedding", "curve") or not set(name) <= set(_NAME + "-"):
            raise UserError(f"{about}: the name is taken or no file name; choose another")
        eps = None if table.get("eps") is None else str(table["eps"])
        attacks = _text(table["attacks"], f"{about}: attacks")
        seeds = None if table.get("seeds") is None else _seeds(table["seeds"], about)
        if seeds is not None and not made:
            raise UserError(f"{about} is the main one: it is for all seeds; leave its seeds out")
        made.append(Battery(name, attacks, _count(table.get("n"), f"{about}: n"), eps, table.get("norm"), seeds))
    if not made:
        raise UserError(
            f"{what} has no battery; give at least one, like [batteries.standard] with attacks = 'fgsm,pgd'"
        )
    return tuple(made)


def _curve(value: Any, what: str) -> Curve | None:
    if value is None:
        return None
    about = f"{what}: curve"
    table = _table(value, about)
    _known(table, ("attack", "eps", "n"), about, "key")
    attack = _text(table.get("attack", "native:pgd:steps=20:loss=margin"), f"{about}: attack")
    radii = table.get("eps")
    if not isinstance(radii, Sequence) or isinstance(radii, str) or not radii:
        raise UserError(f"{about} needs eps, a list of radii, like ['0.02', '0.05', '0.1']")
    if "," in attack or ":eps=" in attack:
        raise UserError(f"{about}: attack is one attack without eps; the radii stand in the list eps")
    texts = tuple(str(radius) for radius in radii)
    return Curve(attack, texts, _count(table.get("n"), f"{about}: n"))


def _contrasts(value: Any, what: str) -> tuple[Contrast, ...]:
    made = []
    for name, entry in _table(value, f"{what}: contrasts").items():
        about = f"{what}: contrast '{name}'"
        table = _table(entry, about)
        _known(table, ("better", "than", "says"), about, "key")
        missing = next((key for key in ("better", "than") if key not in table), None)
        if missing:
            raise UserError(f"{about} lacks '{missing}'; give better = 'METHOD' and than = 'METHOD'")
        made.append(Contrast(name, str(table["better"]), str(table["than"]), str(table.get("says", name))))
    return tuple(made)


def _seeds(value: Any, what: str) -> tuple[int, ...]:
    numbers = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    if not numbers or not value or len(set(value)) < len(value):
        raise UserError(f"{what}: seeds {value!r} must be different integers >= 0, like [0, 1, 2]")
    return tuple(value)


def _count(value: Any, what: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise UserError(f"{what} {value!r} must be an integer >= 1")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, not {value!r}")
    return value.strip()


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} must be a table, not {value!r}")
    return dict(value)


def _known(table: Mapping[str, Any], known: Sequence[str], what: str, kind: str) -> None:
    for name in table:
        if name not in known:
            raise UserError(f"{what} has no {kind} '{name}'{nearest(name, known)} ({kind}s: {', '.join(known)})")
