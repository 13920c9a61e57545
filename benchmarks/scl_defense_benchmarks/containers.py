"""What kind of file a checkpoint is, and its content without running code from it.

Read as plain data: torch files of every age (as tensors alone), safetensors. A pickle that names anything else is
refused, unless the user trusts it; then what it would import is said before it is loaded.
"""

import hashlib
import io
import pickle
import pickletools
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from scl_defense.checkpoint import inflated, read_tensors, tangled
from scl_defense.errors import UserError
from scl_defense_benchmarks.trusted_pickle import load_trusted

Kind = Literal["torch", "old torch", "old torch tar", "torchscript", "export", "safetensors", "onnx", "pickle", "other"]
_TORCH_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:-1]  # the first object of files before torch 1.6
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}


def kind_of(path: Path) -> Kind:
    """By content; only safetensors and ONNX, which have no mark of their own, by the name's ending."""
    if path.suffix.lower() == ".safetensors":
        return "safetensors"
    if path.suffix.lower() == ".onnx":
        return "onnx"
    if not path.is_file():
        raise UserError(f"'{path}' is no regular file; give a checkpoint")
    with path.open("rb") as stream:
        start = stream.read(512)
    if start[:2] == b"PK":
        return _kind_of_zip(path)
    if start[:1] == b"\x80" and _TORCH_MAGIC in start[:32]:
        return "old torch"
    if b"ustar" in start:
        return "old torch tar"
    return "pickle" if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" else "other"


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "torch"  # the reader says what is damaged
    if any(name.endswith("/constants.pkl") or "/code/__torch__" in name for name in names):
        return "torchscript"
    if any(name.endswith(("/models/model.json", "serialized_exported_program.json")) for name in names):
        return "export"
    return "torch"


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_content(path: Path, *, trust: bool = False, say: Callable[[str], None] | None = None) -> Any:
    """What a file of weights holds: tensors, dicts, lists and numbers; with ``trust`` whatever a pickle builds.

    say: is told, before a trusted pickle is loaded, what it imports (default: a line on stderr). Raises
    :class:`UserError`, one line, for a file that cannot be read safely or at all.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        return _safetensors(path)
    if kind not in ("torch", "old torch", "old torch tar", "pickle"):
        return read_tensors(path)[0]  # says what the file is
    names = imports_of(path, kind)
    foreign = sorted(names - _harmless(names))
    if kind in ("torch", "old torch") and not foreign:
        return read_tensors(path)[0] if kind == "torch" else _old_tensors(path)
    named = ", ".join(foreign[:8]) + (", ..." if len(foreign) > 8 else "")
    if not trust:
        if kind == "torch":
            try:
                return read_tensors(path)[0]
            except UserError as error:
                if "would run code" not in str(error):
                    raise
        what = f"it names {named}" if foreign else "its format is a pickle that cannot be read as plain tensors"
        raise UserError(
            f"'{path}' would run code when loaded ({what}); save its state_dict where you trust it, or accept what it "
            "runs with --trust-pickle"
        )
    (say or _to_stderr)(f"'{path}' is loaded as code, as you said; it imports: {', '.join(sorted(names)) or 'nothing'}")
    return load_trusted(path, torch_file=kind != "pickle")


def imports_of(path: Path, kind: Kind) -> set[str]:
    """``module.name`` of all that the pickles of this file would import; found by reading them, not by running them."""
    names: set[str] = set()
    for stream in _pickles(path, kind):
        try:
            # Old torch files hold several pickles in a row; after the last one come raw numbers.
            for _ in range(5 if kind == "old torch" else 1):
                names |= _globals(stream)
        except Exception as error:  # pickletools and struct have one for each way of being damaged
            raise UserError(
                f"'{path}' is not a readable checkpoint: its pickle is damaged ({type(error).__name__}); copy it again"
            ) from None
    return names


def _pickles(path: Path, kind: Kind) -> Iterable[io.BytesIO]:
    payload = path.read_bytes()
    if kind == "torch":
        try:
            with zipfile.ZipFile(io.BytesIO(payload)) as archive:
                if bomb := inflated(archive, len(payload)):
                    raise UserError(f"'{path}' is not a readable checkpoint: {bomb}")
                return [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".pkl")]
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
            read_tensors(path)  # says what is damaged
            return []
    if kind == "old torch tar":
        try:
            with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
                if sum(member.size for member in archive) > len(payload):  # a sparse one, all zeros
                    raise UserError(f"'{path}' is a tar file whose parts are larger than it; it is no checkpoint")
                files = [archive.extractfile(member) for member in archive if member.isfile()]
                # "storages" and "tensors" are pickles in a row with raw numbers between: the first one is read.
                return [io.BytesIO(file.read()) for file in files if file is not None]
        except tarfile.TarError as error:
            raise UserError(f"'{path}' is a damaged tar file ({type(error).__name__}); copy it again") from None
    return [io.BytesIO(payload)]


def _globals(stream: io.BytesIO) -> set[str]:
    """The imports of one pickle. A name that is put together while loading is given as ``(computed)``."""
    found: set[str] = set()
    memo: dict[int, str | None] = {}
    texts: list[str | None] = []  # what was pushed last; None: no text
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            found.add(".".join(str(argument).split(" ", 1)))
            texts.append(None)
        elif name == "STACK_GLOBAL":
            module, attribute = ([None, None, *texts])[-2:]
            found.add(f"{module}.{attribute}" if module and attribute else "(computed)")
            texts = [None]
        elif name in _STRINGS:
            texts.append(str(argument))
        elif name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else None
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = texts[-1] if texts else None
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            texts.append(memo.get(int(argument)))
        elif name.startswith("EXT"):
            found.add("(computed)")
        elif name not in ("PROTO", "FRAME"):
            texts.append(None)
    return found


def _harmless(names: set[str]) -> set[str]:
    """Of these names, those that torch's own restricted reader accepts."""
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = set(_get_allowed_globals())
    # The same function under the name that Python 2 gave it.
    return {name for name in names if name in allowed or name.replace("__builtin__.", "builtins.") in allowed}


def _old_tensors(path: Path) -> Any:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch's own text recommends loading unsafely; that advice must not reach the user
        raise UserError(
            f"'{path}' is not a readable checkpoint: it is damaged or cut short ({type(error).__name__}); copy it again"
        ) from None
    if fault := tangled(content):
        raise UserError(f"'{path}' is not a readable checkpoint: {fault}")
    return content


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"'{path}' is no readable safetensors file: {' '.join(str(error).split())}") from None


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
