"""Generators by name, composites included: ``mix:A=0.5,B=0.5`` and ``file:PATH`` beside what is registered.

Imports no torch: a misspelt name inside a mixture is answered at once.
"""

import math
from collections.abc import Mapping
from typing import Any

from scl_defense.config import construct, make
from scl_defense.errors import UserError, nearest
from scl_defense.plugins import PluginHost

MIX, FILE = "mix:", "file:"


def make_generator(host: PluginHost, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """A generator by name: a registered one, a mixture, or stored examples.

    ``mix:contrastive-pgd=0.5,corner-noise=0.5`` is a :class:`scl_defense.mixture.Mixture`. Its options are ``by`` and
    those of its parts, ``contrastive-pgd.steps=5`` for every part of this name, ``2.steps=5`` for the second part.
    ``file:PATH`` is :class:`scl_defense.replay.StoredExamples`. Raises :class:`UserError` for a wrong name, share,
    option or value, and for a file that holds no examples.
    """
    options = dict(options or {})
    if name.startswith(FILE):
        from scl_defense.replay import StoredExamples

        stored = construct(StoredExamples, {"path": name.removeprefix(FILE), **options}, f"generator '{name}'")
        return stored.opened()
    if name.startswith(MIX):
        return _mixture(host, name, options)
    return make(host, "generator", name, options)


def check_name(host: PluginHost, name: str) -> None:
    """Raises :class:`UserError` for a name that :func:`make_generator` does not know. Imports no component."""
    if name.startswith(MIX):
        for part, _ in parts_of(name):
            check_name(host, part)
    elif not name.startswith(FILE):
        host["generator"].entry(name)


def parts_of(name: str) -> list[tuple[str, float]]:
    """``mix:a=0.5,b=2`` -> names and shares, as written (1 where none is). Raises :class:`UserError`."""
    found = []
    for piece in name.removeprefix(MIX).split(","):
        part, equals, written = (text.strip() for text in piece.rpartition("="))
        if not equals:
            part, written = written, "1"
        if not part:
            raise UserError(f"'{name}' has an empty part; write it like mix:contrastive-pgd=0.5,corner-noise=0.5")
        if part.startswith(MIX):
            raise UserError(f"'{name}' has a mixture as its part; list all parts in one mixture")
        try:
            share = float(written)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise UserError(f"share '{written}' of '{part}' in '{name}' must be a number above 0, like {part}=0.5")
        found.append((part, share))
    return found


def _mixture(host: PluginHost, name: str, options: dict[str, Any]) -> Any:
    parts = parts_of(name)
    for part, _ in parts:
        check_name(host, part)
    own, given = _sorted_options(name, [part for part, _ in parts], options)
    from scl_defense.mixture import Mixture, MixtureOptions, Part

    by = construct(MixtureOptions, own, f"generator '{name}'").by
    made = [
        Part(part, share, make_generator(host, part, chosen))
        for (part, share), chosen in zip(parts, given, strict=True)
    ]
    return Mixture(tuple(made), by)


def _sorted_options(
    name: str, parts: list[str], options: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The mixture's own options, and those of every part; one given by place wins over one given by name."""
    own: dict[str, Any] = {}
    by_name: list[dict[str, Any]] = [{} for _ in parts]
    by_place: list[dict[str, Any]] = [{} for _ in parts]
    for key, value in _flat(options).items():
        prefix, dot, option = key.rpartition(".")
        if not dot:
            own[key] = value
            continue
        # The command line writes names of options with underscores.
        places = [place for place, part in enumerate(parts) if part.replace("-", "_") == prefix.replace("-", "_")]
        if prefix.isdigit() and 1 <= int(prefix) <= len(parts):
            by_place[int(prefix) - 1][option] = value
        elif places:
            for place in places:
                by_name[place][option] = value
        else:
            known = sorted({*parts, *(str(place + 1) for place in range(len(parts)))})
            raise UserError(
                f"generator '{name}' has no part '{prefix}'{nearest(prefix, known)}; options are by=..., and "
                f"PART.OPTION=VALUE with PART one of {', '.join(known)}"
            )
    wrong = next((key for key in own if key != "by"), None)
    if wrong is not None:
        raise UserError(
            f"generator '{name}': there is no option '{wrong}'{nearest(wrong, ['by'])}; options are by=..., and "
            f"PART.OPTION=VALUE, like {parts[0]}.{wrong}=VALUE"
        )
    return own, [{**named, **placed} for named, placed in zip(by_name, by_place, strict=True)]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """TOML reads ``contrastive-pgd.steps = 5`` as a table in a table."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (
            {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, Mapping) else {key: value}
        )
    return flat
