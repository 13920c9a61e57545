"""``scl-defense finetune``: the frozen-encoder protocols."""

from pathlib import Path
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.errors import UserError
from scl_defense.launcher import leads


@click.command("finetune")
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--protocol",
    default="slf",
    show_default=True,
    metavar="slf|alf|aff",
    help="slf: linear head on frozen features; alf: the same, adversarially; aff: TRADES on everything.",
)
@click.option("--epochs", metavar="INT", help="Passes over the training split; default: the protocol's.")
@click.option("--lr", metavar="FLOAT", help="Peak learning rate; default: the protocol's.")
@click.option("--seed", metavar="INT", help="Seed; default: that of the run that made the encoder.")
@click.option("--data-root", metavar="DIR", help="Folder where data sets lie; default: the run's.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps; default: auto.")
@click.option("--out", metavar="DIR", help="Folder of the runs; default: runs.")
@click.option("--name", metavar="NAME", help="Name of the run's folder.")
@click.option("--dry-run", is_flag=True, help="Check everything, time one step, write nothing.")
@common.plugin_option
@common.json_option
@common.quiet_option
def command(
    checkpoint: str, protocol: str, dry_run: bool, plugins: tuple[str, ...], as_json: bool, quiet: bool, **flags: Any
) -> None:
    """Judge a trained encoder by a fixed protocol; writes a run of its own, ready for benchmark.

    \b
    scl-defense finetune runs/acl-contrastive-pgd-online-digits-s0/best.pt --protocol slf
    scl-defense finetune runs/NAME/best.pt --protocol aff --epochs 10
    """
    host = common.host_for(plugins)
    if not Path(checkpoint).exists():
        raise UserError(f"checkpoint '{checkpoint}' does not exist")
    from scl_defense.cli.progress import TrainProgress
    from scl_defense.cli.train import show_plan, show_result
    from scl_defense.protocols import finetune_config
    from scl_defense.train import train

    given = {name: value for name, value in flags.items() if value is not None}
    config = finetune_config(checkpoint, protocol, **given)
    with TrainProgress(quiet=quiet or as_json or not leads()) as progress:
        result = train(config, host=host, on_event=progress, dry_run=dry_run)
    if leads():  # one of several processes speaks
        (show_plan if dry_run else show_result)(result, as_json)
