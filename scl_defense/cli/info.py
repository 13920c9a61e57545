"""``scl-defense info``: what a checkpoint holds, without running anything from it."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.errors import UserError, printable, why


@click.command("info")
@click.argument("checkpoint", metavar="CKPT")
@common.json_option
def command(checkpoint: str, as_json: bool) -> None:
    """Show what a checkpoint holds: network, data, threat, recipe, plugins and versions.

    \b
    Of a file that another program saved: its parts, the names and shapes of its
    tensors, and how to audit it.
    """
    from scl_defense.checkpoint import check_content, read_tensors

    if checkpoint.endswith(".safetensors"):
        _foreign(checkpoint, *_safetensors(checkpoint), as_json)
        return
    content, sha256 = read_tensors(checkpoint)
    if not isinstance(content, dict) or "format" not in content:
        _foreign(checkpoint, content, sha256, as_json)
        return
    check_content(checkpoint, content)
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


_MOST, _LONGEST = 40, 200  # tensors and letters of a text that are shown to people; --json gives all


def _foreign(checkpoint: str, content: Any, sha256: str, as_json: bool) -> None:
    """What the file of another program, or one of stored examples, holds: every tensor with its shape, and the rest."""
    from scl_defense.replay import RECORD

    tensors, other = _parts(content)
    stored = _record(other.get(RECORD))  # what ``scl-defense generate`` wrote
    if stored is not None:
        other = {name: str(value) for name, value in stored.items()}
    ours = other.get("format", "examples of scl-defense") if stored is not None else None
    if as_json:
        shapes = {name: list(shape) for name, shape in tensors.items()}
        common.print_json({"format": ours, "sha256": sha256, "tensors": shapes, "other": other})
        return
    click.echo(printable(f"format: {ours or 'not of scl-defense; plain tensors, read without running code'}"))
    click.echo(f"sha256: {sha256}")
    click.echo(f"tensors: {len(tensors)}")
    for name, shape in list(tensors.items())[:_MOST]:
        click.echo(printable(f"  {name}: {' x '.join(map(str, shape)) or 'a number'}"))
    if len(tensors) > _MOST:
        click.echo(f"  and {len(tensors) - _MOST} more (--json lists all)")
    if other:
        click.echo("beside them:")
        for name, kind in list(other.items())[:_MOST]:
            click.echo(printable(f"  {name}: {kind if len(kind) <= _LONGEST else kind[:_LONGEST] + ' ...'}"))
    if tensors:
        if ours:
            click.echo(f"next: scl-defense train --generator {shlex.quote(f'file:{checkpoint}')}")
        else:
            click.echo(f"next: scl-defense benchmark {shlex.quote(checkpoint)} --model FILE.py:CLASS --data NAME")


def _record(text: str | None) -> dict[str, Any] | None:
    try:
        record = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _safetensors(checkpoint: str) -> tuple[dict[str, Any], str]:
    """Its tensors and what its header says beside them, and the file's sha256."""
    import safetensors.torch

    try:
        payload = Path(checkpoint).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"'{checkpoint}' cannot be read: {why(error)}") from None
    try:
        tensors: dict[str, Any] = dict(safetensors.torch.load(payload))
    except safetensors.SafetensorError as error:
        raise UserError(f"'{checkpoint}' is no readable safetensors file: {' '.join(str(error).split())}") from None
    length = int.from_bytes(payload[:8], "little")
    about = json.loads(payload[8 : 8 + length]).get("__metadata__") or {}
    return about | tensors, hashlib.sha256(payload).hexdigest()


def _parts(content: Any, prefix: str = "", depth: int = 4) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of the tensors and types of what is none, by their dotted place. An optimizer's tensors are no weights."""
    import torch

    tensors: dict[str, tuple[int, ...]] = {}
    other: dict[str, str] = {}
    if isinstance(content, torch.Tensor):
        tensors[prefix or "the file"] = tuple(content.shape)
    elif isinstance(content, dict) and depth and not {"state", "param_groups"} <= content.keys():
        for name, item in content.items():
            below = _parts(item, f"{prefix}.{name}" if prefix else str(name), depth - 1)
            tensors |= below[0]
            other |= below[1]
    elif isinstance(content, (bool, int, float, str)):
        other[prefix or "the file"] = str(content)
    else:
        other[prefix or "the file"] = type(content).__name__
    return tensors, other
