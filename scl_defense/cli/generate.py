"""``scl-defense generate``: adversarial examples made once and stored."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import click

from scl_defense.cli import common, progress
from scl_defense.compose import check_name


@click.command("generate")
@click.option("--generator", metavar="NAME", help="What makes them: a generator or mix:A=0.5,B=0.5.  "
              "[default: contrastive-pgd]")  # fmt: skip
@click.option("-g", "--generator-option", "generator_options", multiple=True, metavar="NAME=VALUE",
              help="Option of the generator, repeatable (see: plugins list NAME).")  # fmt: skip
@click.option("--data", metavar="NAME|PATH", help="Data set; all of its training split is used.  [default: digits]")
@click.option(
    "-d", "--data-option", "data_options", multiple=True, metavar="NAME=VALUE", help="Option of the data set."
)
@click.option("--data-root", metavar="DIR", help="Folder where data sets lie or are downloaded to.")
@click.option("--norm", metavar="linf|l2|l1", help="Norm of the threat model.  [default: linf]")
@click.option("--eps", metavar="EPS", help="Radius, as 8/255 or 0.1; default: the data set's usual one.")
@click.option("--copies", metavar="K", help="Examples of every image; epoch e of training uses copy e mod K.  "
              "[default: 1]")  # fmt: skip
@click.option("--augment", metavar="none|weak|simclr", help="Augmentation of the reference view.  [default: weak]")
@click.option("--batch-size", metavar="N", help="Images that are each other's negatives.  [default: 128]")
@click.option("--limit", metavar="N", help="Only the images that train --limit N takes.")
@click.option("--dtype", metavar="float32|float16", help="Numbers in the file.  [default: float32]")
@click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.  [default: auto]")
@click.option("--seed", metavar="INT", help="Seed of every random stream.  [default: 0]")
@click.option("--out", metavar="FILE.safetensors", help="Default: a name from the recipe, in examples/.")
@click.option("--force", is_flag=True, help="Replace the file if it is there already.")
@click.option("--dry-run", is_flag=True, help="Check everything, time one batch, write nothing.")
@common.plugin_option
@common.json_option
@common.quiet_option
def command(
    out: str | None,
    force: bool,
    dry_run: bool,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Make adversarial examples of a training split once; train with them at the cost of one more clean view.

    \b
    scl-defense generate --generator contrastive-pgd --copies 10 --out digits.safetensors
    scl-defense train --generator file:digits.safetensors
    """
    host = common.host_for(plugins)
    options = {name: value for name, value in flags.items() if value not in (None, ())}
    for name, short in (("generator_options", "-g"), ("data_options", "-d")):
        if name in options:
            options[name] = common.key_values(options[name], short)
    check_name(host, options.get("generator", "contrastive-pgd"))  # a misspelt name is answered before torch is there
    from scl_defense.stored import generate_examples

    with GenerateProgress(quiet=quiet or as_json) as told:
        result = generate_examples(out, force=force, host=host, on_event=told, dry_run=dry_run, **options)
    if dry_run:
        _show_plan(result, as_json)
    else:
        _show_result(result, as_json)


class GenerateProgress(progress._Bar):
    """Told of every batch: one bar with the rate on a terminal, one line a copy elsewhere."""

    before = "copy {task.fields[copy]}"
    after = "{task.fields[rate]} img/s"
    _images = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._images += event["images"]
        rate = f"{self._images / max(event['seconds'], 1e-9):.0f}"
        shown = {"copy": f"{event['copy'] + 1}/{event['copies']}", "rate": rate}
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("generate", total=event["total"], **shown)
            self._bar.update(self._task, completed=event["done"], **shown)
        elif not self._quiet and event["done"] * event["copies"] % event["total"] == 0:
            left = event["seconds"] / event["done"] * (event["total"] - event["done"])
            text = f"copy {shown['copy']}  {rate} img/s  about {common.duration(left)} left"
            self._console.print(text, soft_wrap=True)


def _show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        common.print_json(plan)
        return
    click.echo(f"examples {plan['copies']} x {plan['images']} images, threat {plan['threat']}, {plan['megabytes']} MB")
    click.echo(f"time     {plan['batches']} batches of {plan['seconds_per_batch'] * 1000:.0f} ms on {plan['device']}: "
               f"about {common.duration(plan['estimated_seconds'])}")  # fmt: skip
    click.echo("nothing was written (--dry-run)")


def _show_result(result: Any, as_json: bool) -> None:
    if as_json:
        common.print_json({**dataclasses.asdict(result), "threat": str(result.threat)})
        return
    click.echo(
        f"{result.path}: {result.copies} x {result.images} examples inside {result.threat}, {result.megabytes} MB, "
        f"{common.duration(result.seconds)}"
    )
    click.echo(f"next: scl-defense train --generator {shlex.quote(f'file:{result.path}')}")
