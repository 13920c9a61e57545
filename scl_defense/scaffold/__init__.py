"""A new plugin's skeleton: a distribution of its own that installs, passes the contract test and shows its option.

The texts are the files in ``templates/``; ``@NAME@`` and its kin stand where the author's name goes.
"""

import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from scl_defense.errors import UserError, nearest
from scl_defense.plugins import PluginHost, default_host
from scl_defense.registry import KINDS

PREFIX = "scl-defense-"
LONGEST = 50
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TAKEN = {"plugins", "benchmarks"}  # their packages would be scl_defense_plugins and scl_defense_benchmarks

# kind -> how its option is given on the command line, with a value that is not the default.
_USES = {
    "generator": "scl-defense train --generator @NAME@ -g tile=3 --epochs 5",
    "trainer": "scl-defense train --trainer @NAME@ -t weight=0.7 --epochs 5",
    "attack": "scl-defense benchmark runs/NAME/best.pt --attacks @NAME@:steps=40",
    "model": "scl-defense train --model @NAME@ -m width=8 --epochs 5",
    "dataset": "scl-defense train --data @NAME@ -d per_class=100 --epochs 5",
    "logger": "scl-defense train --logger @NAME@ --epochs 5",
}
_SUMMARIES = {
    "generator": "model-free: random signs, one for every tile of the image",
    "trainer": "cross-entropy on clean and adversarial views, mixed by a weight",
    "attack": "projected ascent of the margin between the logits",
    "model": "two convolutions and the mean over all places",
    "dataset": "drawn stripes in four directions, with noise: no files needed",
    "logger": "one line of comma-separated values an epoch",
}


def write_plugin(
    name: str, kind: str = "generator", out: str | Path = ".", *, host: PluginHost | None = None
) -> list[Path]:
    """Write the distribution ``scl-defense-NAME`` with one component of this kind into the folder ``out``.

    name: lower case letters, digits and dashes; it becomes the component's name. Returns the files written, the
    folder is there as a whole or not at all. Raises :class:`UserError` for a name that cannot be used, and where
    something of this name is there already.
    """
    if kind not in KINDS:
        raise UserError(f"there is no kind of component '{kind}'{nearest(kind, KINDS)} (kinds: {', '.join(KINDS)})")
    name = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(name) or len(name) > LONGEST:
        raise UserError(
            f"'{name}' cannot be a plugin's name; write lower case letters, digits and single dashes, at most "
            f"{LONGEST}, beginning with a letter, like my-{kind}"
        )
    if name in _TAKEN:
        raise UserError(f"the package scl_defense_{name} is a part of scl-defense; choose another name than '{name}'")
    registry = (default_host() if host is None else host)[kind]
    if name in registry:
        raise UserError(f"{kind} '{name}' is there already, from {registry.entry(name).owner}; choose another name")
    folder = Path(out) / f"{PREFIX}{name}"
    if folder.exists():
        raise UserError(f"'{folder}' exists and is left as it is; choose another name or another --out")
    texts = texts_of(name, kind)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scl-defense-new-", dir=folder.parent) as part:
            whole = Path(part) / folder.name
            for path, text in texts.items():
                (whole / path).parent.mkdir(parents=True, exist_ok=True)
                (whole / path).write_text(text, encoding="utf-8")
            os.rename(whole, folder)
    except OSError as error:
        raise UserError(f"cannot write '{folder}': {error.strerror or error}; choose another --out") from None
    return [folder / path for path in texts]


def texts_of(name: str, kind: str) -> dict[str, str]:
    """Path in the distribution -> text."""
    package = f"scl_defense_{name.replace('-', '_')}"
    values = {
        "NAME": name,
        "KIND": kind,
        "DISTRIBUTION": f"{PREFIX}{name}",
        "PACKAGE": package,
        "CLASS": "".join(part.capitalize() for part in name.removesuffix(f"-{kind}").split("-")) + kind.capitalize(),
        "SUMMARY": _SUMMARIES[kind],
        "USE": _USES[kind],
        "VERSION": _lowest_version(),
    }
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/__init__.py": "__init__.py",
        f"{package}/hooks.py": "hooks.py",
        f"{package}/{kind}.py": f"component/{kind}.py",
        f"tests/test_{package.removeprefix('scl_defense_')}.py": f"test/{kind}.py",
    }
    return {path: _filled(template, values) for path, template in places.items()}


def command_of(name: str, kind: str) -> str:
    """The command that uses the new component with its option."""
    return _USES[kind].replace("@NAME@", name.removeprefix(PREFIX))


def _filled(template: str, values: dict[str, str]) -> str:
    text = (files(__name__) / "templates" / f"{template}.txt").read_text(encoding="utf-8")
    for _ in range(2):  # a value may hold another one
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
    return text


def _lowest_version() -> str:
    """Major and minor number of what is installed: what a new plugin was written against."""
    try:
        return ".".join(version("scl-defense").split(".")[:2])
    except PackageNotFoundError:  # a bare source tree
        return "0.1"
