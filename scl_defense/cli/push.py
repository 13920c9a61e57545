"""``scl-defense push``: names the benchmark layer, never knows it."""

import dataclasses

import click

from scl_defense.cli import common
from scl_defense.cli.progress import working


@click.command("push")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--result", metavar="RESULT.json", help="What benchmark --out wrote of this checkpoint: for the card.")
@click.option("--public", is_flag=True, help="Anybody may see it; default: a new repository is private.")
@click.option("--revision", metavar="BRANCH", help="Another branch than main; it must be there.")
@click.option("--folder", metavar="DIR", help="Write the files here and upload nothing.")
@common.json_option
def command(
    checkpoint: str,
    repository: str,
    result: str | None,
    public: bool,
    revision: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Share a checkpoint on the Hugging Face Hub: safetensors, JSON, and a card that says how robust it is.

    \b
    scl-defense benchmark runs/RUN/best.pt --attacks standard --out result.json
    scl-defense push runs/RUN/best.pt OWNER/NAME --result result.json
    """
    from scl_defense import push

    with working("packing and sending", quiet=as_json):
        made = push(checkpoint, repository, result=result, public=public, revision=revision, folder=folder)
    if as_json:
        common.print_json(dataclasses.asdict(made))
        return
    click.echo(f"{made.url or made.folder}: {', '.join(made.files)}")
    if result is None:
        click.echo("note: the card says that nothing was measured; give a result with --result", err=True)
    click.echo(f"next: scl-defense pull {repository if made.folder is None else made.folder}")
