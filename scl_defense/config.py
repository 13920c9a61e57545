"""Options at the border: recipes, and building components by name. No config object goes further in than ``train``.

Imports no torch, so that ``--help`` and a misspelt name answer at once.
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from scl_defense.errors import ComponentError, UserError, nearest
from scl_defense.plugins import PluginHost

Options = dict[str, Any]
# Fields of a recipe that name a component -> its kind.
COMPONENT_FIELDS = {"data": "dataset", "generator": "generator", "trainer": "trainer", "model": "model"}


def _as_written(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True))
class TrainConfig:
    """The recipe of one run: the same names on the command line, in a TOML file and in Python.

    >>> from scl_defense import TrainConfig
    >>> recipe = TrainConfig(trainer="trades", generator="pgd", generator_options={"steps": 5}, optimizer="sgd")
    >>> recipe.peak_lr, recipe.data
    (0.1, 'digits')
    """

    data: Annotated[str, Field(min_length=1, description="data set: a registered name, or a path")] = "digits"
    data_options: Annotated[Options, Field(description="options of the data set")] = dataclasses.field(
        default_factory=dict
    )
    data_root: Annotated[str | None, Field(description="folder where data sets lie or are downloaded to")] = None
    trainer: Annotated[str, Field(description="contrastive trainer")] = "adv-supcon"
    trainer_options: Annotated[Options, Field(description="options of the trainer")] = dataclasses.field(
        default_factory=dict
    )
    generator: Annotated[
        str | None,
        Field(
            description="generator of adversarial views (none: train without; mix:A=0.5,B=0.5; file:PATH); default: "
            "the trainer's usual one, else contrastive-pgd"
        ),
    ] = None
    generator_options: Annotated[Options, Field(description="options of the generator")] = dataclasses.field(
        default_factory=dict
    )
    model: Annotated[str, Field(description="encoder")] = "small-cnn"
    model_options: Annotated[Options, Field(description="options of the model")] = dataclasses.field(
        default_factory=dict
    )
    norm: Annotated[Literal["linf", "l2", "l1"], Field(description="norm of the threat model")] = "linf"
    eps: Annotated[
        str | None,
        BeforeValidator(_as_written),
        Field(description="radius, as 8/255 or 0.1; default: the data set's usual one"),
    ] = None
    eps_start: Annotated[
        float, Field(ge=0, le=10, allow_inf_nan=False, description="radius in training starts at this share of eps")
    ] = 1.0
    eps_ramp: Annotated[float, Field(ge=0, le=1, description="share of all steps in which it goes over to eps")] = 0.0
    epochs: Annotated[int, Field(ge=1, le=100_000, description="passes over the training split")] = 40
    batch_size: Annotated[int, Field(ge=1, le=1_000_000, description="images a step, of all processes together")] = 128
    optimizer: Annotated[Literal["adamw", "sgd"], Field(description="optimizer")] = "adamw"
    lr: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="peak learning rate; default: 0.003 adamw, 0.1 sgd")
    ] = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight decay")] = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of sgd")] = 0.9
    warmup: Annotated[
        float, Field(ge=0, le=1, description="share of all steps with rising learning rate, then cosine")
    ] = 0.1
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False, description="largest gradient norm; 0: no clipping")] = 1.0
    average: Annotated[
        float, Field(ge=0, lt=1, description="decay of the weight average that is validated and kept; 0: off")
    ] = 0.0
    awp: Annotated[
        float,
        Field(ge=0, le=1, description="adversarial weight perturbation, relative size (0.005 is usual); 0: off"),
    ] = 0.0
    awp_after: Annotated[float, Field(ge=0, le=1, description="share of all steps before it begins")] = 0.05
    on_nan: Annotated[
        Literal["stop", "skip"],
        Field(description="a loss or gradient that is no number: stop, or leave that batch out (10 in a run at most)"),
    ] = "stop"
    patience: Annotated[
        int, Field(ge=0, description="stop after so many epochs without a better validation accuracy; 0: never")
    ] = 0
    select: Annotated[
        Literal["auto", "mean", "robust", "clean", "last"],
        Field(
            description="validation accuracy that chooses best.pt; auto: the mean of clean and robust, or clean when "
            "there are no adversarial views"
        ),
    ] = "auto"
    init: Annotated[str | None, Field(description="checkpoint whose encoder is the start; default: random")] = None
    augment: Annotated[Literal["none", "weak", "simclr"], Field(description="augmentation of the views")] = "weak"
    strength: Annotated[float, Field(ge=0, le=1, description="strength of the augmentation")] = 1.0
    strength_end: Annotated[
        float | None, Field(ge=0, le=1, description="strength that it moves to, linearly; default: it stays")
    ] = None
    strength_every: Annotated[int, Field(ge=1, description="epochs between two changes of the strength")] = 1
    limit: Annotated[int | None, Field(ge=2, description="use only so many training images (stratified)")] = None
    val_fraction: Annotated[
        float, Field(gt=0, lt=1, description="share of the training split cut off for validation")
    ] = 0.1
    val_limit: Annotated[int, Field(ge=2, description="validate on at most so many images")] = 1000
    val_steps: Annotated[int, Field(ge=1, description="PGD steps of the robust validation accuracy")] = 10
    precision: Annotated[Literal["fp32", "bf16"], Field(description="precision of the network's passes")] = "fp32"
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, mps")] = "auto"
    sync_bn: Annotated[
        bool, Field(description="under torchrun: batch norm sees the images of all processes, not its own alone")
    ] = False
    seed: Annotated[int, Field(ge=0, le=2**62, description="seed of every random stream")] = 0
    deterministic: Annotated[
        bool, Field(description="same seed, same weights bit by bit on CUDA too, slower (on the CPU it is so anyway)")
    ] = False
    logger: Annotated[tuple[str, ...], Field(description="where training records go")] = ("jsonl",)
    out: Annotated[str, Field(description="folder of the runs")] = "runs"
    name: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9][\w.+=-]{0,199}$", description="name of the run's folder")
    ] = None

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else {"adamw": 3e-3, "sgd": 0.1}[self.optimizer]


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a component, for help pages and documentation."""

    name: str
    type: str
    default: Any
    description: str


def options_of(cls: type) -> list[Option]:
    """The options of a component class, from its fields."""
    try:
        schema = TypeAdapter(cls).json_schema()
    except Exception as error:
        raise ComponentError(f"{cls.__name__} is not a component: make it with scl_defense.types.component") from error
    if "$ref" in schema:
        schema = schema["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    rows = []
    for name, prop in schema.get("properties", {}).items():
        rows.append(Option(name, _type_text(prop), prop.get("default", "required"), prop.get("description", "")))
    return rows


def _type_text(prop: Mapping[str, Any]) -> str:
    if "enum" in prop:
        return "|".join(str(value) for value in prop["enum"])
    if "anyOf" in prop:
        return "|".join(_type_text(part) for part in prop["anyOf"])
    if prop.get("type") == "array":
        inner = prop.get("items") or (prop.get("prefixItems") or [{}])[0]
        return f"list of {_type_text(inner)}"
    text = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "null": "none"}.get(
        prop.get("type", ""), prop.get("type", prop.get("const", "any"))
    )
    low, high = (
        value if value is None or value != int(value) else int(value)  # 0, not 0.0: pydantic's versions differ
        for value in (
            prop.get("minimum", prop.get("exclusiveMinimum")),
            prop.get("maximum", prop.get("exclusiveMaximum")),
        )
    )
    if low is not None or high is not None:
        text += f" {'(' if 'exclusiveMinimum' in prop else '['}{'' if low is None else low}, "
        text += f"{'' if high is None else high}{')' if 'exclusiveMaximum' in prop or high is None else ']'}"
    return str(text)


def make(host: PluginHost, kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """A component by name. Raises :class:`UserError` for a wrong name, option or value, with the nearest right one."""
    return construct(host[kind].get(name), options or {}, f"{kind} '{name}'")


def construct(cls: type, options: Mapping[str, Any], what: str) -> Any:
    """``cls(**options)``, strings converted to the fields' types; a list is written ``1+10+100``."""
    hints = typing.get_type_hints(cls)
    given = {
        name: value.split("+") if isinstance(value, str) and _is_sequence(hints.get(name)) else value
        for name, value in options.items()
    }
    _refuse_truths(hints, given, f"{what}: ")
    try:
        return cls(**given)
    except ValidationError as error:
        known = [field.name for field in dataclasses.fields(cls)]
        raise UserError(f"{what}: {explain(error, known)}") from None
    except TypeError as error:
        raise ComponentError(f"{what} cannot be built: {error}; make it with scl_defense.types.component") from error


def layered(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two recipes as one: ``over`` wins, key by key; a component's options survive only while it is the same one."""
    merged, defaults = dict(under), TrainConfig()
    for name in COMPONENT_FIELDS:
        if name in over and over[name] != under.get(name, getattr(defaults, name)):
            merged.pop(f"{name}_options", None)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def with_generator(config: TrainConfig, host: PluginHost) -> TrainConfig:
    """The recipe with its generator named: where it names none, the trainer's ``usual`` one, else contrastive-pgd."""
    if config.generator is not None:
        return config
    usual: tuple[str, Mapping[str, Any]] = ("contrastive-pgd", {})
    name, options = getattr(host["trainer"].get(config.trainer), "usual", usual)
    return dataclasses.replace(config, generator=name, generator_options={**options, **config.generator_options})


def _refuse_truths(hints: Mapping[str, Any], values: Mapping[str, Any], what: str) -> None:
    """pydantic reads ``true`` as the number 1."""
    for name, value in values.items():
        hint = hints.get(name)
        kinds = (hint, *typing.get_args(hint))
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise UserError(f"{what}option '{name}' should be a number, not {str(value).lower()}")


def _is_sequence(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_sequence(part) for part in typing.get_args(hint))
    return (typing.get_origin(hint) or hint) in (tuple, list)


def explain(error: ValidationError, known: list[str]) -> str:
    """The first fault of a validation error, on one line."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "unexpected_keyword_argument":
        listed = ", ".join(known) if known else "it has none"
        return f"there is no option '{name}'{nearest(name, known)} (options: {listed})"
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"option '{name}' is required; give it as {name}=VALUE"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = repr(first["input"])
    given = given if len(given) <= 200 else f"{given[:200]}..."
    return f"option '{name}' {message if message.startswith('should') else 'is wrong: ' + message}, not {given}"


def train_config(values: Mapping[str, Any]) -> TrainConfig:
    """A recipe from names and values. Raises :class:`UserError`, one line."""
    _refuse_truths(typing.get_type_hints(TrainConfig), values, "")
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        name = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
        if isinstance(values.get(name), dict) and f"{name}_options" in known:
            remedy = f'write {name} = "NAME" and its options under [{name}_options]'
            raise UserError(f"option '{name}' is a name, not a table; {remedy}") from None
        raise UserError(explain(error, known)) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML recipe. Raises :class:`UserError` when it is missing or no TOML."""
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise UserError(f"config '{path}' is no regular file; give a TOML file")
    try:
        with open(path, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise UserError(f"config '{path}' cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config '{path}' is not TOML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise UserError(f"config '{path}' cannot be read: {' '.join(str(error).split())[:200]}") from None


def to_toml(values: Mapping[str, Any]) -> str:
    """A flat mapping with one level of tables as TOML; ``None`` is left out (TOML has no null)."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping) and value}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{_toml_value(str(k))} = {_toml_value(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):  # generator_options of a mixture's part: contrastive-pgd.steps = 5
        return "{" + ", ".join(f"{_toml_value(str(k))} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return f"{value:.1f}"
    # TOML's basic strings, numbers and booleans are written as in JSON, except that DEL must be escaped too and that
    # characters beyond U+FFFF must not be: JSON would write them as surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The recipe as plain data (JSON types)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
