"""``scl-defense export``: names the benchmark layer, never knows it."""

import dataclasses
import shlex

import click

from scl_defense.cli import common
from scl_defense.cli.progress import working


@click.command("export")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--format", type=click.Choice(["torch-export", "onnx"]), default="torch-export", show_default=True,
              help="The graph's form: FILE.pt2 or FILE.onnx.")  # fmt: skip
@click.option("--out", metavar="FILE", help="The file; default: beside the checkpoint.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@common.plugin_option
@common.json_option
def command(
    checkpoint: str, format: str, out: str | None, force: bool, plugins: tuple[str, ...], as_json: bool
) -> None:
    """Write the network as a graph for other programs, and check that its predictions agree.

    Images in [0, 1] go in, with any batch size; logits come out.

    \b
    scl-defense export runs/RUN/best.pt
    scl-defense export runs/RUN/best.pt --format onnx --out model.onnx
    """
    host = common.host_for(plugins)
    from scl_defense import export

    with working("tracing the network and comparing predictions", quiet=as_json):
        made = export(checkpoint, out, format=format, force=force, host=host)
    if as_json:
        common.print_json(dataclasses.asdict(made))
        return
    click.echo(f"{made.path}: {made.agree} of {made.images} images get the same class as from the network, "
               f"logits differ by {made.difference:.1g} at most")  # fmt: skip
    click.echo(f"next: scl-defense benchmark {shlex.quote(str(made.path))} --data NAME --attacks standard")
