"""``scl-defense plugins``: what is installed and from where; one component's options; the contract test; a new one."""

import itertools
import re
import shlex
import textwrap
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.cli.progress import working
from scl_defense.errors import UserError, nearest
from scl_defense.plugins import PluginHost
from scl_defense.registry import KINDS, Entry

_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


@click.group("plugins")
def command() -> None:
    """What is installed and from where, what failed and why; the contract test; a new plugin."""


@command.command("list")
@click.argument("name", required=False)
@common.plugin_option
@common.json_option
def list_(name: str | None, plugins: tuple[str, ...], as_json: bool) -> None:
    """List everything, one kind (generators, attacks, models, ...), or one component's options."""
    host = common.host_for(plugins)
    kinds = [kind for kind in KINDS if name in (None, kind, f"{kind}s")]
    if kinds:
        _show_all(host, kinds, as_json, whole=name is None)
        return
    entries = _find(host, str(name))
    if as_json:
        common.print_json([_described(entry) for entry in entries])
        return
    for entry in entries:
        _show_one(_described(entry))


@command.command("check")
@click.argument("name")
@click.option("-o", "--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of the component.")
@click.option("--data-root", metavar="DIR", help="Where a data set's files lie (they may be downloaded into it).")
@common.plugin_option
@common.json_option
def check(name: str, options: tuple[str, ...], data_root: str | None, plugins: tuple[str, ...], as_json: bool) -> None:
    """Run the contract test on a component: the same checks that the built-ins pass.

    NAME may be narrowed to one kind: generator:pgd, attack:pgd.
    """
    host = common.host_for(plugins)
    entries = _find(host, name)
    given = common.key_values(options, "-o")
    from scl_defense.testing import check_entry

    with working(f"the contract test of {name}", quiet=as_json):
        reports = [result for entry in entries for result in check_entry(entry, given, root=data_root)]
    if as_json:
        common.print_json(
            [{"component": r.component, "check": r.check, "passed": r.passed, "message": r.message} for r in reports]
        )
    else:
        for report in reports:
            click.echo(f"{'pass' if report.passed else 'FAIL'}  {report.component}  {report.check}"
                       + (f": {report.message}" if report.message else ""))  # fmt: skip
        failed = sum(not report.passed for report in reports)
        click.echo(f"{len(reports)} checks, {failed} failed")
    if any(not report.passed for report in reports):
        raise click.exceptions.Exit(1)


@command.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="generator", show_default=True, help="What it adds.")
@click.option("--out", default=".", show_default=True, metavar="DIR", help="Folder to write scl-defense-NAME/ into.")
@common.json_option
def new(name: str, kind: str, out: str, as_json: bool) -> None:
    """Write a new plugin: a distribution that installs and passes the contract test as it is.

    \b
    scl-defense plugins new my-noise --kind generator
    pip install -e "scl-defense-my-noise[test]"
    scl-defense plugins check my-noise
    """
    from scl_defense import scaffold

    written = scaffold.write_plugin(name, kind, out)
    folder, shown = written[0].parent, name.removeprefix(scaffold.PREFIX)
    if as_json:
        common.print_json(
            {"folder": str(folder), "name": shown, "kind": kind, "files": [str(path) for path in written]}
        )
        return
    click.echo(f"wrote {folder}:")
    for path in written:
        click.echo(f"  {path.relative_to(folder)}")
    click.echo(f"next: pip install -e {shlex.quote(f'{folder}[test]')}")
    click.echo(f"      scl-defense plugins list {shown}")
    click.echo(f"      scl-defense plugins check {kind}:{shown}")
    click.echo(f"      {scaffold.command_of(shown, kind)}")
    click.echo(f"      python -m pytest {shlex.quote(str(folder))}")


def _find(host: PluginHost, name: str) -> list[Entry]:
    """Entries of this name in any kind; ``kind:name`` and ``distribution:name`` narrow it."""
    kind, _, bare = name.partition(":")
    if kind in KINDS and bare in host[kind]:
        return [host[kind].entry(bare)]
    found = [entry for kind in KINDS for entry in host[kind] if name in (entry.name, entry.qualified)]
    if not found:
        every = {entry.name for kind in KINDS for entry in host[kind]}
        raise UserError(f"no component is named '{name}'{nearest(name, every)} (see: scl-defense plugins list)")
    return found


def _described(entry: Entry) -> dict[str, Any]:
    from scl_defense.config import options_of

    cls = entry.load()
    row = _row(entry)
    row["documentation"] = (cls.__doc__ or "").strip()
    row["options"] = [
        {"name": o.name, "type": o.type, "default": o.default, "description": o.description} for o in options_of(cls)
    ]
    return row


def _row(entry: Entry) -> dict[str, Any]:
    return {"kind": entry.kind, "name": entry.name, "summary": entry.summary, "distribution": entry.owner.name,
            "version": entry.owner.version, "source": entry.owner.source}  # fmt: skip


def _show_all(host: PluginHost, kinds: list[str], as_json: bool, whole: bool) -> None:
    rows = [_row(entry) for kind in kinds for entry in host[kind]]
    conflicts = {name: found for kind in kinds for name, found in host[kind].conflicts().items()}
    if as_json:
        aside = [{"plugin": q.plugin, "distribution": q.owner.name, "version": q.owner.version, "reason": q.reason}
                 for q in host.quarantined]  # fmt: skip
        common.print_json(
            {"plugins": host.provenance(), "components": rows, "quarantined": aside, "conflicts": sorted(conflicts)}
        )
        return
    console = common.console()
    from rich.table import Table

    width = max((len(row["name"]) for row in rows), default=0)
    for kind in kinds:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 2), title=f"{kind}s", title_justify="left")
        table.add_column(no_wrap=True, min_width=width)
        table.add_column()
        for entry in host[kind]:
            mark = "" if entry.owner.name == "scl-defense" else f" [{entry.owner}]"
            table.add_row(entry.name, _plain(entry.summary + mark))
        console.print(table)
    if whole:
        console.print(
            "plugins: " + ", ".join(f"{name} ({owner})" for name, owner in sorted(host.loaded.items())), markup=False
        )
    for name, found in conflicts.items():
        owners = " and ".join(str(entry.owner) for entry in found)
        console.print(
            f"conflict: '{name}' is registered by {owners}; write {found[0].qualified} or {found[1].qualified}",
            markup=False,
        )
    for q in host.quarantined:
        console.print(f"set aside: {q.plugin} ({q.owner}): {q.reason}", markup=False)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _show_one(row: dict[str, Any]) -> None:
    width = common.console().width
    click.echo(f"{row['kind']} {row['name']}, from {row['distribution']} {row['version']}")
    click.echo(_wrapped(row["documentation"], width))
    if not row["options"]:
        click.echo("  no options")
    for option in row["options"]:
        text = f"{option['name']} ({option['type']}) [default: {option['default']}]  {option['description']}"
        click.echo(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="      ", **_WHOLE_WORDS))
    click.echo()


def _wrapped(documentation: str, width: int) -> str:
    """A docstring two columns in: paragraphs filled to the width; what is indented (an equation) stands as it is."""
    first, _, rest = documentation.replace("``", "").partition("\n")
    lines = [first, *textwrap.dedent(rest).splitlines()]
    out: list[str] = []
    for indented, group in itertools.groupby(lines, key=lambda line: line[:1] in ("", " ")):
        if indented:
            out += [f"  {line}".rstrip() for line in group]
        else:
            filled = textwrap.fill(" ".join(group), width - 2, **_WHOLE_WORDS)
            out += [f"  {line}" for line in re.sub(r"::$", ":", filled).splitlines()]
    return "\n".join(out)
