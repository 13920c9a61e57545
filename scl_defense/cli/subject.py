"""What a network is and what it is attacked on: the same options wherever a checkpoint is read."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.errors import UserError

_OPTIONS = (
    click.option(
        "--data",
        metavar="NAME|PATH|PKG:FUNCTION",
        help="Data set; default: the one it was trained on. PKG:FUNCTION, FILE.py:FUNCTION: yours (it runs code).",
    ),
    click.option(
        "-d", "--data-option", "data_options", multiple=True, metavar="NAME=VALUE", help="Option of the data set."
    ),
    click.option("--data-root", metavar="DIR", help="Folder where data sets lie or are downloaded to."),
    click.option(
        "--model",
        metavar="NAME|PKG:FACTORY",
        help="Network of a file of bare weights (needs --data). PKG:FACTORY, FILE.py:FACTORY: yours (it runs code).",
    ),
    click.option("-m", "--model-option", "model_options", multiple=True, metavar="NAME=VALUE", help="Its option."),
    click.option(
        "--mean", metavar="A+B+C", help="Normalisation before that network, per channel in [0, 1]; default none."
    ),
    click.option("--std", metavar="A+B+C", help="The same: its standard deviations."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), help="The same: order of its colours; default rgb."),
    click.option("--head", metavar="FILE", help="File of a linear head, for a file that holds an encoder alone."),
    click.option("--weights", metavar="NAME", help="Which of several sets of weights in a file, like ema."),
    click.option(
        "--label-map", metavar="LIST|FILE", help="The data's class for each output: names, or a JSON/TOML file."
    ),
    click.option(
        "--trust-pickle", is_flag=True, help="Load a file that runs code when opened: only from people you trust."
    ),
)


def subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options above, in that order in ``--help``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def found(checkpoint: str) -> Path | str:
    """The file, or the name that a plugin knows (``robustbench:NAME``)."""
    path = Path(checkpoint)
    if path.is_dir():
        raise UserError(f"'{checkpoint}' is a directory; give a checkpoint, a file in it such as best.pt")
    if path.exists():
        return path
    if re.fullmatch(r"[A-Za-z][\w-]+:[^\\/].*", checkpoint) is None:
        raise UserError(f"checkpoint '{path}' does not exist")
    return checkpoint


def as_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options' texts as the arguments of :func:`scl_defense.benchmark`; what else there is stays as it is."""
    read = {
        "data_options": common.key_values(settings["data_options"], "-d") or None,
        "model_options": common.key_values(settings["model_options"], "-m") or None,
        "mean": _numbers("--mean", settings["mean"]),
        "std": _numbers("--std", settings["std"]),
    }
    said = {"say": _warn} if settings["trust_pickle"] else {}
    return {**settings, **read, **said}


def _warn(text: str) -> None:
    click.echo(text, err=True)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split("+"))
    except ValueError:
        raise UserError(f"{option} {text!r} must be numbers joined by '+', like 0.49+0.48+0.45") from None
