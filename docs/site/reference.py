"""The pages of the reference, made from the code: commands, components, hooks, the result. Nothing is written here."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import click

from scl_defense import hookspecs
from scl_defense.cli.app import COMMANDS, cli
from scl_defense.config import options_of
from scl_defense.plugins import PluginHost
from scl_defense.registry import KINDS, Entry

GENERATED = "*This page is made from the code.*\n"
# How an option of a component of this kind is given on the command line.
FLAGS = {
    "generator": "`train --generator NAME -g OPTION=VALUE`",
    "trainer": "`train --trainer NAME -t OPTION=VALUE`",
    "attack": "`benchmark CKPT --attacks NAME:OPTION=VALUE`",
    "model": "`train --model NAME -m OPTION=VALUE`",
    "dataset": "`train --data NAME -d OPTION=VALUE`",
    "logger": "`train --logger NAME`",
}


def pages() -> dict[str, str]:
    """Path of a page -> its Markdown."""
    host = PluginHost()
    return {
        "reference/cli.md": cli_page(),
        "reference/components.md": components_page(host),
        "reference/hooks.md": hooks_page(),
        "reference/result.md": result_page(),
    }


# -- commands


def cli_page() -> str:
    parts = ["# Commands\n", GENERATED]
    parts.append("Exit codes: 0 done, 1 failed or not met, 2 wrong usage or input, 130 and 143 stopped by a signal.\n")
    for name in sorted(COMMANDS):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parts += list(_command(command, f"scl-defense {name}", 2))
    return "\n".join(parts)


def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below this one with what is typed to call it."""
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            if below is not None:
                yield from walk(below, f"{path} {name}")


def _command(command: click.Command, path: str, level: int) -> Iterator[str]:
    for name, part in walk(command, path):
        yield f"{'#' * (level + name.count(' ') - 1)} `{name}`\n"
        text, _, example = inspect.cleandoc(part.help or "").partition("\b")
        yield f"{escaped(text.strip())}\n"
        if example.strip():
            yield f"```console\n{_prompted(example)}\n```\n"
        if isinstance(part, click.Group):
            continue
        arguments = " ".join(p.make_metavar(click.Context(part)) for p in part.params if isinstance(p, click.Argument))
        yield f"```text\n{name} [OPTIONS] {arguments}".rstrip() + "\n```\n"
        rows = [p.get_help_record(click.Context(part)) for p in part.params]
        yield table(("option", "meaning"), [(code(row[0]), escaped(row[1])) for row in rows if row])


def _prompted(example: str) -> str:
    return "\n".join(f"$ {line.strip()}" for line in example.strip().splitlines() if line.strip())


# -- components


def components_page(host: PluginHost) -> str:
    parts = ["# Components\n", GENERATED]
    for kind in KINDS:
        parts.append(f"## {kind.capitalize()}s\n")
        parts.append(f"Used as {FLAGS[kind]}.\n")
        for entry in host[kind]:
            parts += list(_component(entry))
    return "\n".join(parts)


def _component(entry: Entry) -> Iterator[str]:
    cls = entry.load()
    yield f"### {entry.kind} `{entry.name}`\n"
    yield f"{escaped(entry.summary[0].upper() + entry.summary[1:])}. From {entry.owner}.\n"
    yield docstring(cls)
    said = declared(cls)
    if said:
        yield f"{said}\n"
    options = options_of(cls)
    if not options:
        yield "No options.\n"
        return
    rows = [(f"`{o.name}`", code(o.type), code(o.default), escaped(o.description)) for o in options]
    yield table(("option", "type", "default", "meaning"), rows)


def declared(cls: type) -> str:
    """What a component says of itself beside its options."""
    found = []
    needs = getattr(cls, "needs", None)
    if isinstance(needs, frozenset):
        named = ", ".join(f"`{need}`" for need in sorted(needs))
        found.append(f"Needs {named}." if needs else "Model-free: needs nothing.")
    if isinstance(getattr(cls, "norms", None), frozenset):
        kind = " Looks for the smallest perturbation." if getattr(cls, "minimal", False) else ""
        found.append(f"Norms: {', '.join(sorted(cls.norms))}. Access: {cls.access}.{kind}")  # type: ignore[attr-defined]
    if isinstance(getattr(cls, "usual", None), tuple):
        name, options = cls.usual  # type: ignore[attr-defined]
        given = "".join(f" {key}={value}" for key, value in options.items())
        found.append(f"Usual generator: `{name}{given}`.")
    if isinstance(getattr(cls, "budgets", None), Mapping):
        found.append("Usual radii: " + ", ".join(f"{n} {eps}" for n, eps in cls.budgets.items()) + ".")  # type: ignore[attr-defined]
    return " ".join(found)


# -- hooks


def hooks_page() -> str:
    parts = ["# Hooks\n", GENERATED]
    parts.append(
        "Each is a function of this name in the module that the entry point names, marked `@hookimpl`. How a plugin is "
        "made is told [on the page for plugins](../plugins.md).\n"
    )
    for name, value in vars(hookspecs).items():
        if hasattr(value, f"{hookspecs.PROJECT}_spec"):
            parts.append(f"## `{name}`\n")
            parts.append(f"```python\ndef {name}{signature(value)}\n```\n")
            parts.append(docstring(value))
    parts += ["## `Register`\n", f"```python\nregister{signature(hookspecs.Register.__call__)}\n```\n"]
    parts.append(docstring(hookspecs.Register))
    return "\n".join(parts)


def signature(function: Any) -> str:
    text = str(inspect.signature(function)).replace("'", "").replace("self, ", "")
    return text.replace("pathlib.", "").replace("typing.", "").replace("scl_defense.hookspecs.", "")


# -- the result


def result_page() -> str:
    from scl_defense_benchmarks import results
    from scl_defense_benchmarks.diagnostics import Conclusion

    whole = results.EvaluationResult
    parts = ["# The result of a benchmark\n", GENERATED]
    parts.append(
        "`benchmark` writes one JSON file; `scl_defense.benchmark(...)` returns the same as an object. A list with one "
        "value an image is in the order of `indices`. Fields may be added; none changes its meaning within a minor "
        f"version. In the file there are also `schema`, here `{results.SCHEMA}`, "
        "`conclusion`, the verdict, and `outcome_codes`, what the numbers in `outcomes` mean:\n"
    )
    parts.append(table(("outcome", "code"), [(code(name), code(number)) for name, number in results.OUTCOMES.items()]))
    for cls in dict.fromkeys([whole, *_parts(whole), Conclusion]):
        parts += [f"## {cls.__name__}\n", docstring(cls)]
        rows = [(f"`{f.name}`", code(_type(f.type))) for f in dataclasses.fields(cls)]
        parts.append(table(("field", "type"), rows))
    return "\n".join(parts)


def _parts(cls: type) -> Iterator[type]:
    """The dataclasses that a result is made of, outermost first."""
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *_inside(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield part
                yield from _parts(part)


def _inside(hint: Any) -> Iterator[Any]:
    for part in typing.get_args(hint):
        yield part
        yield from _inside(part)


def _type(hint: Any) -> str:
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(?:[a-z_]+\.)+([A-Z]\w*)", r"\1", str(text))


# -- Markdown


def docstring(thing: Any) -> str:
    """A docstring of this project as Markdown: ``code`` -> `code`, roles gone, blocks after ``::`` fenced."""
    lines, out = inspect.cleandoc(thing.__doc__ or "").splitlines(), []
    fenced = False
    for place, line in enumerate(lines):
        indented = line.startswith("    ")
        if not fenced and indented and place >= 2 and out and out[-1] == "" and _before(out).endswith(":"):
            out.append("```text")
            fenced = True
        if fenced and line.strip() and not indented:
            while out and not out[-1]:
                out.pop()
            out += ["```", ""]
            fenced = False
        out.append(line[4:] if fenced else _prose(line))
    return "\n".join([*out, *(["```"] if fenced else [])]) + "\n"


def _before(out: list[str]) -> str:
    return next((line for line in reversed(out) if line.strip()), "").rstrip()


def _prose(line: str) -> str:
    line = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"``\1``", line)
    line = re.sub(r"::$", ":", line)
    pieces = re.split(r"(``[^`]+``)", line)
    text = "".join(f"`{p[2:-2]}`" if p.startswith("``") else escaped(p) for p in pieces)
    return re.sub(r"(?<![\w\\])\\\*(\w+)\\\*(?!\w)", r"*\1*", text)  # a *word* is meant to be emphasised


def escaped(text: str) -> str:
    """Text in which Markdown sees no markup: names_with_underscores, a * b, <angles>, | bars, $."""
    return re.sub(r"([\\*_<>|$\[\]])", r"\\\1", text).replace("\\>", "&gt;").replace("\\<", "&lt;")


def code(value: Any) -> str:
    text = str(value) if value != "" else '""'
    return "`" + text.replace("`", "'") + "`"  # a bar in code ends no cell of a table


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"
