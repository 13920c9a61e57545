"""``scl-defense train``: its options are the fields of TrainConfig."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.compose import check_name
from scl_defense.config import COMPONENT_FIELDS, TrainConfig, layered, options_of, read_toml, train_config
from scl_defense.errors import UserError
from scl_defense.launcher import leads

_SHORT = {"data": "d", "generator": "g", "trainer": "t", "model": "m"}


def _recipe_options(command: Any) -> Any:
    """One click option for every field of the recipe: command line, TOML file and Python share their names."""
    for option in reversed(options_of(TrainConfig)):
        flag = "--" + option.name.replace("_", "-")
        if option.name.endswith("_options"):
            of = option.name.removesuffix("_options")
            command = click.option(
                f"-{_SHORT[of]}", f"--{of}-option", option.name, multiple=True, metavar="NAME=VALUE",
                help=f"Option of the {COMPONENT_FIELDS[of]}, repeatable (see: plugins list NAME).",
            )(command)  # fmt: skip
            continue
        multiple = option.name == "logger"
        shown = option.default if not isinstance(option.default, (list, tuple)) else "+".join(option.default)
        if option.type == "bool":
            text = f"{option.description[0].upper()}{option.description[1:]}."
            command = click.option(flag, option.name, is_flag=True, default=None, help=text)(command)
            continue
        suffix = "" if option.default is None else f"  [default: {shown}]"
        kind = option.type.removesuffix("|none")
        metavar = "NAME" if option.name in COMPONENT_FIELDS or multiple else kind if "|" in kind else kind.upper()
        text = f"{option.description[0].upper()}{option.description[1:]}.{suffix}"
        if kind == "bool":
            text = f"{option.description[0].upper()}{option.description[1:]}."
            command = click.option(flag, option.name, is_flag=True, default=None, help=text)(command)
            continue
        command = click.option(flag, option.name, multiple=multiple, metavar=metavar, help=text)(command)
    return command


@click.command("train")
@_recipe_options
@click.option("--config", "config_file", metavar="FILE.toml", help="Recipe with the same names; flags win.")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run, to exactly the same weights.")
@click.option("--dry-run", is_flag=True, help="Check everything, time one step, write nothing.")
@common.plugin_option
@common.json_option
@common.quiet_option
def command(
    config_file: str | None,
    resume: str | None,
    dry_run: bool,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Train a network; writes RUNS/NAME/ with best.pt, last.pt, config.toml and metrics.jsonl.

    \b
    scl-defense train --generator contrastive-pgd
    scl-defense train --trainer cross-entropy --generator pgd -g steps=7 --data mnist
    scl-defense train --resume runs/NAME
    """
    host = common.host_for(plugins)
    given = _given(flags)
    if resume is not None and (given or config_file):
        raise UserError("--resume takes the run's own recipe; leave all other training options out")
    config = None
    if resume is None:
        config = train_config(layered(read_toml(config_file) if config_file else {}, given))
        # A misspelt name is answered before torch is imported.
        for name in ("trainer", "model"):
            host[name].entry(getattr(config, name))
        if config.generator is not None:
            check_name(host, config.generator)
        for name in config.logger:
            host["logger"].entry(name)
    from scl_defense.cli.progress import TrainProgress
    from scl_defense.train import train

    with TrainProgress(quiet=quiet or as_json or not leads()) as progress:
        result = train(config, resume=resume, host=host, on_event=progress, dry_run=dry_run)
    if not leads():  # one of several processes speaks
        return
    if dry_run:
        show_plan(result, as_json)
    else:
        show_result(result, as_json)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in flags.items():
        if name.endswith("_options"):
            if value:
                values[name] = common.key_values(value, f"-{_SHORT[name.removesuffix('_options')]}")
        elif value not in (None, ()):
            values[name] = value
    return values


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        common.print_json(plan)
        return
    shape = "x".join(str(size) for size in plan["image_shape"])
    click.echo(f"data     {plan['train_images']} training and {plan['val_images']} validation images of {shape}, "
               f"{plan['classes']} classes")  # fmt: skip
    click.echo(f"network  {plan['parameters']:,} parameters on {plan['device']}; threat {plan['threat']}")
    click.echo(f"time     {plan['steps']} steps of {plan['seconds_per_step'] * 1000:.0f} ms: "
               f"about {common.duration(plan['estimated_seconds'])} without validation")  # fmt: skip
    click.echo("nothing was written (--dry-run)")


def show_result(result: Any, as_json: bool) -> None:
    if as_json:
        common.print_json({**dataclasses.asdict(result), "threat": str(result.threat)})
        return
    click.echo(
        f"best checkpoint: epoch {result.best_epoch + 1} of {result.epochs}, validation accuracy "
        f"{result.clean:.1%} clean, {result.robust:.1%} robust ({result.threat}, short PGD), "
        f"{common.duration(result.seconds)}"
    )
    click.echo(f"next: scl-defense benchmark {_quoted(str(result.best))} --attacks fgsm,pgd,cw")


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)
