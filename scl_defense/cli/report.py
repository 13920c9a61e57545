"""``scl-defense report``: names the benchmark layer, never knows it."""

import shlex
from importlib import import_module

import click

from scl_defense.cli import common
from scl_defense.cli.progress import working


@click.command("report")
@click.argument("results", metavar="RESULT.json...", nargs=-1, required=True)
@click.option(
    "--out", metavar="FILE.html", help="The page; default: beside the first result, or in the study's folder."
)
@click.option("--examples", multiple=True, metavar="FILE.safetensors",
              help="Pictures: what benchmark --save-examples wrote; repeat it for several results.")  # fmt: skip
@click.option("--pictures", type=click.IntRange(min=0), default=300, show_default=True,
              help="The most examples in a gallery.")  # fmt: skip
@click.option("--tsne", is_flag=True, help="A t-SNE map beside the PCA of the embedding.")
@click.option("--data-root", metavar="DIR", help="Folder where data sets lie; nothing is downloaded.")
@click.option("--alone", is_flag=True, help="Numbers alone: open neither checkpoint nor data nor examples.")
@common.plugin_option
@common.json_option
@common.quiet_option
def command(
    results: tuple[str, ...],
    out: str | None,
    examples: tuple[str, ...],
    pictures: int,
    tsne: bool,
    data_root: str | None,
    alone: bool,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw one page that can be sent to others: of a result, of several side by side, or of a study.

    \b
    scl-defense report runs/RUN/result.json
    scl-defense report a.json b.json --out compared.html
    scl-defense report result.json --examples examples.safetensors
    scl-defense report studies/q1-generators-digits
    """
    layer = import_module("scl_defense_benchmarks.report")  # named here, never known
    with working("drawing the page", quiet=quiet or as_json):
        made = layer.report(
            list(results),
            out if out is not None else layer.page_beside(results),
            examples=examples or None,
            data_root=data_root,
            plugins=plugins,
            pictures=pictures,
            tsne=tsne,
            alone=alone,
        )
    if as_json:
        files = {"page": str(made.page), "beside": list(map(str, made.beside)), "missing": list(made.missing)}
        common.print_json(files)
        return
    if not quiet:
        for text in made.missing:
            click.echo(f"note: {text}", err=True)
    click.echo(f"report: {shlex.quote(str(made.page))} ({made.page.stat().st_size / 1e6:.1f} MB, opens in any browser)")
    if made.beside and not quiet:
        click.echo(f"beside it: {', '.join(path.name for path in made.beside)}")
