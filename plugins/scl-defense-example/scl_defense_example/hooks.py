"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

import click

from scl_defense import hookimpl
from scl_defense.hookspecs import Register


@hookimpl
def register_generators(register: Register) -> None:
    # A string, not the class: listing plugins must not import torch.
    register(
        "hybrid-pattern",
        "scl_defense_example.hybrid_pattern:HybridPattern",
        summary="model-free: low-pass the image, add a geometric high-frequency pattern (HIT)",
    )


@hookimpl
def register_commands(cli: click.Group) -> None:
    cli.add_command(preview)


@click.command("preview")
@click.option("--generator", required=True, metavar="NAME", help="Any generator that needs no network and no labels.")
@click.option("-g", "options", multiple=True, metavar="NAME=VALUE", help="Option of the generator, repeatable.")
@click.option("--out", required=True, metavar="FILE.png", help="Picture to write.")
@click.option(
    "--norm", type=click.Choice(["linf", "l2", "l1"]), default="linf", show_default=True, help="Norm of the ball."
)
@click.option("--eps", metavar="EPS", help="Radius, as 8/255 or 0.1; default: the usual one for digits.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the generator's randomness."
)
@click.option("--plugin", "plugins", multiple=True, metavar="FILE.py", help="Load this Python file as a plugin.")
def preview(
    generator: str, options: tuple[str, ...], out: str, norm: str, eps: str | None, seed: int, plugins: tuple[str, ...]
) -> None:
    """Draw clean digits, their adversarial versions and the magnified difference.

    \b
    scl-defense preview --generator hybrid-pattern -g pattern=square --out sheet.png
    """
    from scl_defense_example.preview import draw

    pairs = [pair.partition("=")[::2] for pair in options]
    magnified = draw(generator, dict(pairs), out, norm=norm, eps=eps, seed=seed, plugins=plugins)
    click.echo(f"{out}: clean, adversarial, and the difference magnified {magnified:.3g} times")
