"""``scl-defense benchmark``: names the benchmark layer, never knows it."""

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.errors import UserError


@click.command("benchmark")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--attacks", default="fgsm,pgd,cw", show_default=True, metavar="LIST",
              help="Attacks with options (pgd:steps=40,art:cw,cw:eps=0.5; see: plugins list attacks), or a battery: "
              "quick (noise, fgsm, pgd), standard (quick + cw, deepfool, apgd-ce, apgd-t, fab-t, square), full "
              "(standard + cross-checks + autoattack).")  # fmt: skip
@click.option("--data", metavar="NAME|PATH", help="Data set; default: the one it was trained on.")
@click.option(
    "-d", "--data-option", "data_options", multiple=True, metavar="NAME=VALUE", help="Option of the data set."
)
@click.option("--data-root", metavar="DIR", help="Folder where data sets lie or are downloaded to.")
@click.option("--model", metavar="NAME", help="Network of a file of bare weights (needs --data).")
@click.option("-m", "--model-option", "model_options", multiple=True, metavar="NAME=VALUE", help="Its option.")
@click.option("--mean", metavar="A+B+C", help="Normalisation before that network, per channel in [0, 1]; default none.")
@click.option("--std", metavar="A+B+C", help="The same: its standard deviations.")
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
def command(
    checkpoint: str,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    data_options: tuple[str, ...],
    model_options: tuple[str, ...],
    mean: str | None,
    std: str | None,
    out: str | None,
    **settings: Any,
) -> None:
    """Attack a trained checkpoint on the test split; every example is checked again by us.

    \b
    scl-defense benchmark runs/RUN/best.pt --attacks fgsm,pgd,cw
    scl-defense benchmark runs/RUN/best.pt --attacks standard --n 200
    scl-defense benchmark runs/RUN/best.pt --attacks torchattacks:pgd,art:pgd,native:pgd --eps 0.2
    """
    common.host_for(plugins)  # a broken --plugin is answered first
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    settings["data_options"] = common.key_values(data_options, "-d") or None
    settings["model_options"] = common.key_values(model_options, "-m") or None
    settings |= {"mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
    out = out or str(_beside(path, {**settings, "plugins": plugins}))
    from scl_defense import benchmark
    from scl_defense.cli.progress import AttackProgress

    with AttackProgress(quiet=quiet or as_json) as progress:
        result = benchmark(
            path,
            plugins=plugins,
            out=out,
            progress=progress,
            command=shlex.join(["scl-defense", *sys.argv[1:]]),
            **settings,
        )
    if as_json:
        common.print_json({**result.to_json(), "file": out})
    else:
        _show(result)
        click.echo(f"result: {shlex.quote(out)}")
    if all(row.status == "failed" for row in result.attacks):
        raise click.exceptions.Exit(1)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split("+"))
    except ValueError:
        raise UserError(f"{option} {text!r} must be numbers joined by '+', like 0.49+0.48+0.45") from None


def _beside(checkpoint: Path, settings: dict[str, Any]) -> Path:
    """The same question again goes into the same file; another question never overwrites an answer."""
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in settings.items() if k != "device")).encode()).hexdigest()
    return checkpoint.with_name(f"{checkpoint.stem}-benchmark-{digest[:8]}.json")


def _show(result: Any) -> None:
    from importlib import import_module

    # The benchmark layer draws its own table; it is named here, never known.
    common.console().print(import_module(type(result).__module__).render(result))
