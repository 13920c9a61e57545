"""``scl-defense pull``: names the benchmark layer, never knows it."""

import dataclasses
import shlex

import click

from scl_defense.cli import common
from scl_defense.cli.progress import working


@click.command("pull")
@click.argument("source", metavar="OWNER/NAME")
@click.option("--out", metavar="FILE.pt", help="The checkpoint; default: NAME.pt. Card and result go beside it.")
@click.option("--revision", metavar="COMMIT", help="A commit, tag or branch; default: main.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@common.json_option
def command(source: str, out: str | None, revision: str | None, force: bool, as_json: bool) -> None:
    """Fetch a checkpoint that somebody pushed. Nothing in it is code, and none is run.

    \b
    scl-defense pull OWNER/NAME
    scl-defense pull OWNER/NAME --revision v1 --out model.pt
    """
    from scl_defense import pull

    with working("fetching and checking", quiet=as_json):
        made = pull(source, out, revision=revision, force=force)
    if as_json:
        common.print_json(dataclasses.asdict(made))
        return
    beside = [path.name for path in (made.card, made.result) if path is not None]
    click.echo(f"{made.checkpoint}" + (f" (beside it: {', '.join(beside)})" if beside else ""))
    click.echo(f"next: scl-defense benchmark {shlex.quote(str(made.checkpoint))} --attacks fgsm,pgd,cw")
