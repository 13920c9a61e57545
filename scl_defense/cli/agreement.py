"""``scl-defense agreement``: the same attack of several libraries on the same images."""

from importlib import import_module
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.cli.progress import AttackProgress
from scl_defense.cli.subject import as_given, found, subject_options


@click.command("agreement")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--attacks", default="fgsm,pgd:random_start=false,pgd", show_default=True, metavar="LIST",
              help="Attacks without their library, with options that every library's version has.")  # fmt: skip
@subject_options
@click.option("--norm", type=click.Choice(["linf", "l2", "l1", "l0"]), help="Norm; default: the checkpoint's.")
@click.option("--eps", metavar="EPS", help="Radius, as 8/255 or 0.1; default: the checkpoint's.")
@click.option("--n", type=click.IntRange(min=1), default=200, show_default=True, help="Test images (stratified).")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Images at a time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every attack.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@common.plugin_option
@common.json_option
def command(checkpoint: str, as_json: bool, **settings: Any) -> None:
    """Run the same attack of torchattacks, ART, our own and plugins, and compare: exit code 1 where they disagree.

    \b
    scl-defense agreement runs/RUN/best.pt
    scl-defense agreement runs/RUN/best.pt --attacks cw,pgd:steps=40 --n 100
    """
    common.host_for(settings["plugins"])  # a broken --plugin is answered first
    path = found(checkpoint)
    # The benchmark layer is named here, never known.
    layer = import_module("scl_defense_benchmarks.agreement")
    with AttackProgress(quiet=as_json) as progress:
        result = layer.agreement(path, progress=progress, **as_given(settings))
    if as_json:
        common.print_json(result.to_json())
    else:
        common.console().print(layer.render(result))
    if not result.agree:
        raise click.exceptions.Exit(1)
