"""What several commands share: option types, consoles, output."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from scl_defense.errors import SclDefenseError, UserError, printable
from scl_defense.plugins import PluginHost, default_host

plugin_option = click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE.py", help="Load this Python file as a plugin (it runs code)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
report_option = click.option(
    "--report/--no-report",
    default=None,
    help="Write a page for others, FILE.html, beside it; default: yes, unless --quiet or --json.",
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress, only the result.")


def key_values(pairs: Sequence[str], option: str) -> dict[str, str]:
    """``("steps=20", ...)`` -> a dict. Raises :class:`UserError` for a piece without '=' or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UserError(f"{option} {pair!r} must be written name=value, like {option} steps=20")
        if name in found:
            raise UserError(f"{option} {name} is given twice; give it once")
        found[name] = value
    return found


def host_for(plugins: Sequence[str]) -> PluginHost:
    return default_host(plugins)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def console(stderr: bool = False) -> Any:
    """A rich console: colour only on a terminal, ``NO_COLOR`` honoured, 80 columns when piped."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def interactive() -> bool:
    return sys.stderr.isatty()


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def write_page(source: str | Path, **settings: Any) -> str | None:
    """The page of a result or of a study's folder, where ``report`` puts it; a fault costs the page alone.

    settings: of the report layer. Returns the path, or ``None`` after saying on stderr why there is no page.
    """
    layer = import_module("scl_defense_benchmarks.report")  # named here, never known
    try:
        return str(layer.report([source], layer.page_beside([source]), **settings).page)
    except (SclDefenseError, OSError) as error:
        why = printable(" ".join(str(error).split()))
        click.echo(f"note: the page was not written: {why} (the result is whole; see: scl-defense report)", err=True)
        return None
