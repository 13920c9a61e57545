"""Where results go: no file that an evaluation reads, and none that somebody else wrote, is ever replaced."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scl_defense.errors import UserError
from scl_defense_benchmarks.results import COLUMNS, check_writable

_LONGEST_HEADER = 2**26  # of a safetensors file; ours has a line an attack


def check_targets(targets: Mapping[str, str | Path | None], sources: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` when a result must not be written where it was asked for. Only folders are made.

    targets: option (``--out``, ``--per-image``, ``--save-examples``) -> path, or ``None``. sources: what is read, by
    what it is called; what is no path of an existing file is no danger.
    """
    wanted = {option: Path(path) for option, path in targets.items() if path is not None}
    for option, ending, what in (
        ("--per-image", ".csv", "a line an attack and image"),
        ("--save-examples", ".safetensors", "examples are saved as float32"),
    ):
        if option in wanted and wanted[option].suffix != ending:
            raise UserError(f"'{wanted[option]}' must end in {ending}: {what}")
    for place, (option, path) in enumerate(wanted.items()):
        for other, elsewhere in list(wanted.items())[:place]:
            if _same(path, elsewhere):
                raise UserError(f"{other} and {option} are both '{path}'; give each a file of its own")
        not_a_source(option, path, sources)
    for option, path in wanted.items():
        if option == "--out":
            check_writable(path)
        else:
            _check_file(option, path)


def not_a_source(option: str, path: str | Path, sources: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` when ``path`` is one of the files that are read."""
    for what, source in sources.items():
        if isinstance(source, (str, Path)) and str(source) and _same(Path(path), Path(source)):
            raise UserError(f"{option} '{path}' is {what}, which is read; give another file name")


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file, by links of either kind too."""
    try:
        if one.resolve() == other.resolve():
            return True
        return one.exists() and other.exists() and os.path.samefile(one, other)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a NUL
        return False


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise UserError(f"'{path}' is a directory; give it a file name")
    if path.exists():
        if not path.is_file():  # reading a device or a pipe would never end
            raise UserError(f"'{path}' is no regular file; choose another {option}")
        if not (_is_per_image(path) if option == "--per-image" else _is_examples(path)):
            raise UserError(f"'{path}' exists and was not written by {option}; it is kept, choose another file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{path.parent}': {error.strerror}; choose another {option}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write in '{path.parent}'; choose another {option}")


def _is_per_image(path: Path) -> bool:
    header = ",".join(COLUMNS).encode()
    try:
        with path.open("rb") as stream:
            return stream.readline(len(header) + 3).rstrip(b"\r\n") == header
    except OSError:
        return False


def _is_examples(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= min(_LONGEST_HEADER, path.stat().st_size) else {}
        return str(header["__metadata__"]["schema"]).startswith("scl-defense-adversarial/")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def files_named(values: Iterable[Any]) -> dict[str, Any]:
    """The files among options such as ``file.py:factory`` or ``NAME``, by themselves: what may be read of each."""
    found: dict[str, Any] = {}
    for value in values:
        if isinstance(value, (str, Path)) and str(value):
            text = str(value)
            found |= {f"the file '{part}'": part for part in (text, text.rpartition(":")[0]) if part}
    return found
