"""``scl-defense benchmark``: names the benchmark layer, never knows it."""

from typing import Any

import click

from scl_defense.cli import common
from scl_defense.errors import UserError


@click.command("benchmark")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--attacks", default="fgsm,pgd,cw", show_default=True, metavar="LIST",
              help="Attacks with options: pgd:steps=40,art:cw,cw:eps=0.5 (see: plugins list attacks).")  # fmt: skip
@click.option("--data", metavar="NAME|PATH", help="Data set; default: the one it was trained on.")
@click.option("-d", "--data-option", "data_options", multiple=True, metavar="NAME=VALUE", help="Option of the data set.")
@click.option("--data-root", metavar="DIR", help="Folder where data sets lie or are downloaded to.")
@click.option("--norm", type=click.Choice(["linf", "l2", "l1"]), help="Norm; default: the checkpoint's.")
@click.option("--eps", metavar="EPS", help="Radius, as 8/255 or 0.1; default: the checkpoint's.")
@click.option("--n", type=click.IntRange(min=1), help="Attack only so many test images (stratified).")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Images at a time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every attack.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--out", metavar="FILE.json", help="Result file; default: beside the checkpoint.")
@common.plugin_option
@common.json_option
@common.quiet_option
def command(plugins: tuple[str, ...], as_json: bool, quiet: bool, data_options: tuple[str, ...], **options: Any) -> None:
    """Attack a trained checkpoint on the test split; every example is checked again by us.

    \b
    scl-defense benchmark runs/RUN/best.pt --attacks fgsm,pgd,cw
    scl-defense benchmark runs/RUN/best.pt --attacks torchattacks:pgd,art:pgd,native:pgd --eps 0.2
    """
    host = common.host_for(plugins)
    from pathlib import Path

    if not Path(options["checkpoint"]).exists():
        raise UserError(f"checkpoint '{options['checkpoint']}' does not exist")
    from scl_defense import benchmark

    with common.AttackProgress(quiet=quiet or as_json) as progress:
        result = benchmark(
            options.pop("checkpoint"),
            data_options=common.key_values(data_options, "-d") or None,
            host=host,
            progress=progress,
            **options,
        )
    if as_json:
        common.print_json(result.to_json())
    else:
        result.show(common.console())
