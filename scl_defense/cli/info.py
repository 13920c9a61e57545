"""``scl-defense info``: what a checkpoint holds, without running anything from it."""

import json
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.errors import printable


@click.command("info")
@click.argument("checkpoint", metavar="CKPT")
@common.json_option
def command(checkpoint: str, as_json: bool) -> None:
    """Show what a checkpoint holds: network, data, threat, recipe, plugins and versions."""
    from scl_defense.checkpoint import read

    content, sha256 = read(checkpoint)
    weights = content["network"]
    summary: dict[str, Any] = {
        "format": content["format"],
        "sha256": sha256,
        "model": content["model"],
        "model_options": content["model_options"],
        "parameters": sum(value.numel() for name, value in weights.items() if value.is_floating_point()),
        "classes": content["classes"],
        "image_shape": content["image_shape"],
        "mean": content["mean"],
        "std": content["std"],
        "threat": content["threat"],
        "trainer": content.get("trainer"),
        "generator": content.get("generator"),
        "batch_norm_branch": content.get("branch"),
        "weight_average": bool(content.get("training")),
        "passes": content.get("passes"),
        "epoch": content.get("epoch"),
        "best": content.get("best"),
        "config": json.loads(content["config"]),
        "plugins": content["plugins"],
        "versions": content.get("versions"),
        "device": content.get("device"),
        "threads": content.get("threads"),
    }
    if as_json:
        common.print_json(summary)
        return
    for name, value in summary.items():
        # The file is somebody's: what it says is shown, and no terminal obeys it.
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, item in value.items():
                click.echo(printable(f"  {key}: {item}"))
        elif name == "plugins":
            told = (f"{p['plugin']} ({p.get('distribution')} {p.get('version')})" for p in value)
            click.echo(printable("plugins: " + ", ".join(told)))
        elif isinstance(value, (list, tuple)):
            click.echo(printable(f"{name}: " + ", ".join(str(item) for item in value)))
        else:
            click.echo(printable(f"{name}: {value}"))
