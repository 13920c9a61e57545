"""Checkpoints: plain data and tensors only, written atomically, checked before they are believed.

A checkpoint of this project is a zip written by ``torch.save`` that ``torch.load(weights_only=True)`` reads: tensors,
dicts, lists, strings and numbers. Nothing in it is code.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scl_defense.config import make
from scl_defense.errors import ComponentError, SclDefenseError, UserError, has_controls, why
from scl_defense.models import Network
from scl_defense.plugins import PluginHost, default_host
from scl_defense.shown import Table
from scl_defense.threat import ThreatModel

FORMAT = "scl-defense-checkpoint/1"
WEIGHTS = ("network", "training", "twin", "optimizer")
INFLATED = 1 << 28  # bytes; what a zip may unpack to whatever its size (torch stores without compression)
MOST_LISTS, MOST_PARTS, DEEPEST = 50_000, 10_000_000, 64  # a few bytes can describe more than a machine holds
_REQUIRED = {
    "network": dict,
    "model": str,
    "model_options": dict,
    "classes": list,
    "image_shape": list,
    "mean": list,
    "std": list,
    "threat": str,
    "config": str,
    "plugins": list,
}


@dataclass(frozen=True)
class LoadedClassifier:
    """A trained classifier and what its file says of it. ``network``: images in [0, 1] -> logits, in eval mode."""

    network: nn.Module
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threat: ThreatModel | None
    data: str | None
    data_options: Mapping[str, Any]
    path: Path
    sha256: str
    data_root: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def table(self, width: int = 100) -> Table:
        """What the file says of itself, on a few lines. ``rows`` of it: one mapping."""
        row = {
            "path": str(self.path),
            "sha256": self.sha256,
            "network": self.meta.get("model") or type(self.network).__name__,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "images": "x".join(map(str, self.image_shape)),
            "classes": ", ".join(self.classes),
            "data": self.data or "-",
            "threat": "-" if self.threat is None else str(self.threat),
            "trainer": self.meta.get("trainer") or "-",
            "generator": self.meta.get("generator") or "-",
        }
        cells = [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in row.items()]
        return Table(("classifier", ""), cells, [row], width=width)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def atomic_write_bytes(path: str | Path, payload: bytes) -> None:
    """Write a file so that its name holds either the old or the whole new content, also after a crash.

    Raises :class:`UserError` naming the path when the disk or the permissions say no; the old file is kept.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)  # the umask is the user's
        with open(descriptor, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # directories cannot be synced everywhere
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        raise UserError(
            f"cannot write '{path}' ({len(payload)} bytes): {error.strerror}; what was there before is kept"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path, name: str = "") -> None:
    """Take away temporary files that a killed process left here of files whose names begin so.

    The caller holds the lock of these files: nobody is writing them.
    """
    for stale in folder.glob(".*.part"):
        if re.fullmatch(rf"\.{re.escape(name)}.*\.\d+\.part", stale.name) and stale.is_file():
            with contextlib.suppress(OSError):
                stale.unlink()


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. ``content``: plain data and tensors; the format's name is added."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **_in_order(content)}, buffer)
    payload = buffer.getvalue()
    # What cannot be read back under weights_only must never be written: found here, not when it is needed.
    torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    atomic_write_bytes(path, payload)


def _in_order(content: Any) -> Any:
    """Tensors row by row, whatever order a network computes in: a reader sees values, not how they lay in memory."""
    if isinstance(content, torch.Tensor):
        return content.contiguous()
    if isinstance(content, Mapping):
        return {name: _in_order(value) for name, value in content.items()}
    return content


def read_tensors(path: str | Path) -> tuple[Any, str]:
    """Any torch file's plain content and the file's sha256, without running code from it.

    Raises :class:`UserError` with one line saying what the file is when it cannot be read safely.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"'{path}' is a directory, not a checkpoint; give the file, for example {path / 'best.pt'}")
    if path.exists() and not path.is_file():
        raise UserError(f"'{path}' is no regular file; give a checkpoint, for example runs/NAME/best.pt")
    try:
        payload = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint '{path}' cannot be read: {why(error)}") from None
    fault = _fault_of(payload)
    if fault:
        raise UserError(f"'{path}' is not a readable checkpoint: {fault}")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(payload))
        if foreign:
            names = ", ".join(sorted(foreign)[:5])
            raise UserError(f"'{path}' would run code when loaded (it names {names}); only plain tensors are accepted")
        content = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except UserError:
        raise
    except Exception as error:
        # torch's own text recommends loading unsafely; that advice must not reach the user.
        raise UserError(
            f"'{path}' is not a readable checkpoint: its content is damaged ({type(error).__name__})"
        ) from None
    if fault := tangled(content):
        raise UserError(f"'{path}' is not a readable checkpoint: {fault}")
    return content, hashlib.sha256(payload).hexdigest()


def tangled(content: Any) -> str | None:
    """What is wrong with the shape of plain data from a file: too deep, or endless when written out; else ``None``.

    A list that holds one list twice, which holds one list twice, ..., is small in a file and in memory; whoever walks
    through it (to write it as JSON, to print it) never comes to an end.
    """
    waiting, lists, parts = [(content, 1)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            continue
        lists, parts = lists + 1, parts + len(value)
        if lists > MOST_LISTS or parts > MOST_PARTS or depth > DEEPEST:
            return f"what it describes is larger than {MOST_LISTS:,} lists or deeper than {DEEPEST} levels"
        inside = [*value, *value.values()] if isinstance(value, Mapping) else value
        waiting += [(one, depth + 1) for one in inside if isinstance(one, (Mapping, list, tuple, set, frozenset))]
    return None


def inflated(archive: zipfile.ZipFile, size: int) -> str | None:
    """Whether a zip of ``size`` bytes claims to unpack to far more: asked before anything is unpacked."""
    total = sum(member.file_size for member in archive.infolist())
    return f"it would unpack to {total / 1e9:.3g} GB from {size} bytes" if total > max(INFLATED, 20 * size) else None


def _fault_of(payload: bytes) -> str | None:
    if not payload:
        return "the file is empty (0 bytes)"
    if payload.lstrip()[:1] == b"<":
        return f"it looks like an HTML page ({len(payload)} bytes): did a download fail?"
    if payload[:2] == b"\x80\x02" or b"ustar" in payload[:512]:
        return "it is a pickle as torch wrote them before 1.6; load it where you trust it and torch.save it again"
    if payload[:2] != b"PK":
        return "it is no zip file as torch.save writes them; is it a checkpoint at all?"
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            if bomb := inflated(archive, len(payload)):
                return bomb
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        return f"it is truncated or damaged ({len(payload)} bytes); copy it again"
    return f"its part '{bad}' is damaged (wrong checksum); copy it again" if bad else None


def read(path: str | Path) -> tuple[dict[str, Any], str]:
    """The content of a checkpoint of this project and its sha256. Raises :class:`UserError` for any other file."""
    content, sha256 = read_tensors(path)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"'{path}' was not written by scl-defense: it has no 'format' entry")
    check_content(path, content)
    return content, sha256


def check_content(path: str | Path, content: dict[str, Any]) -> None:
    """Raise :class:`UserError` unless ``content``, read from ``path``, is a checkpoint that this version reads."""
    if content["format"] != FORMAT:
        raise UserError(f"'{path}' has format {content['format']!r}; this version reads {FORMAT}")
    fault = _malformed(content)
    if fault:
        raise UserError(f"checkpoint '{path}' is malformed: {fault}")


def _malformed(content: dict[str, Any]) -> str | None:
    """What is wrong with the fields of a checkpoint of our format, on one line, or ``None``."""
    for name, kind in _REQUIRED.items():
        if name not in content:
            return f"it lacks {name}"
        if not isinstance(content[name], kind):
            return f"{name} is a {type(content[name]).__name__}, not a {kind.__name__}"
    if not all(isinstance(value, torch.Tensor) for value in content["network"].values()):
        return "network must hold tensors alone"
    if any(value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes()
           for value in content["network"].values()):  # fmt: skip
        return "network holds a tensor that is larger than its data"
    if not all(isinstance(plugin, dict) and "plugin" in plugin for plugin in content["plugins"]):
        return "plugins must be a list of names and versions"
    shape, mean, std = content["image_shape"], content["mean"], content["std"]
    if len(shape) != 3 or not all(isinstance(size, int) and 0 < size <= 4096 for size in shape):
        return f"image_shape {shape} must be three sizes from 1 to 4096"
    if len(mean) != shape[0] or len(std) != shape[0] or not all(isinstance(v, float) for v in (*mean, *std)):
        return f"mean {mean} and std {std} must be {shape[0]} numbers each"
    if len(content["classes"]) < 2 or not all(isinstance(name, str) for name in content["classes"]):
        return "classes must be at least two names"
    if odd := next((name for name in content["classes"] if has_controls(name)), None):
        return f"class {odd!r} holds control characters"
    head = content["network"].get("classifier.weight")
    if head is None or head.dim() != 2 or len(content["classes"]) != len(head):
        return f"it names {len(content['classes'])} classes, not those that its network tells apart"
    try:
        config = json.loads(content["config"])
    except ValueError:
        return "config is not JSON"
    return None if isinstance(config, dict) else "config is not a JSON object"


def load_classifier(
    path: str | Path,
    *,
    host: PluginHost | None = None,
    device: torch.device | str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> LoadedClassifier:
    """Rebuild the classifier of a checkpoint, in eval mode, every parameter accounted for.

    A file that this project did not write is offered to the plugins' ``load_checkpoint`` hooks with ``options``.
    Raises :class:`UserError` when the file is damaged, nobody can read it, or a needed plugin is missing.

    >>> import scl_defense, torch
    >>> run = scl_defense.train(generator="none", trainer="cross-entropy", epochs=1, limit=64,
    ...                         batch_size=32, val_limit=32, val_steps=1)
    >>> loaded = scl_defense.load(run.best)
    >>> loaded.network(torch.rand(5, *loaded.image_shape)).shape
    torch.Size([5, 10])
    """
    path, host = Path(path), host or default_host()
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        content, sha256 = read(path)
    except UserError as error:
        loaded = _foreign(host, path, options or {}) if path.is_file() and not _is_ours(path) else None
        if loaded is None:
            raise error
        loaded.network.to(device).eval()
        return loaded
    config = json.loads(content["config"])
    try:
        model = make(host, "model", content["model"], content["model_options"])
    except UserError as error:
        origin = next(
            (p["distribution"] for p in content["plugins"] if p["plugin"] == content.get("model_owner")), None
        )
        raise UserError(f"checkpoint '{path}' needs {error}" + (f"; it came from {origin}" if origin else "")) from None
    state = {
        name: value
        for name, value in content["network"].items()
        if name.partition(".")[0] in ("normalize", "encoder", "classifier")
    }
    _check_size(path, model, content, state)
    network = Network(model(tuple(content["image_shape"])), len(content["classes"]), content["mean"], content["std"])
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights in '{path}' do not fit its model: {' '.join(str(error).split())[:300]}") from None
    return LoadedClassifier(
        network=network.to(device).eval(),
        classes=tuple(content["classes"]),
        image_shape=tuple(content["image_shape"]),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        threat=ThreatModel.parse(content["threat"]),
        data=config.get("data"),
        data_options=config.get("data_options", {}),
        data_root=config.get("data_root"),
        path=path,
        sha256=sha256,
        meta={name: value for name, value in content.items() if name not in WEIGHTS} | {"config": config},
    )


load = load_classifier  # the short name, for notebooks: scl_defense.load("best.pt").network(images)


def _check_size(path: Path, model: Any, content: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`UserError` when the described network is larger than the weights in the file, before it is built.

    Options of a few bytes can ask for more memory than the machine has.
    """
    try:
        with torch.device("meta"):  # shapes alone
            described = model(tuple(content["image_shape"]))
        asked = sum(tensor.numel() for tensor in described.state_dict().values())
    except (SclDefenseError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return  # not every model can be built without numbers; building it says what is wrong
    given = sum(tensor.numel() for tensor in state.values())
    if asked > 2 * given + 1_000_000:
        raise UserError(
            f"the weights in '{path}' do not fit its model: it describes {asked:,} numbers, holds {given:,}"
        )


def _is_ours(path: Path) -> bool:
    try:
        content, _ = read_tensors(path)
    except UserError:
        return False
    return isinstance(content, dict) and str(content.get("format", "")).startswith("scl-defense-checkpoint/")


def _foreign(host: PluginHost, path: Path, options: Mapping[str, Any]) -> LoadedClassifier | None:
    answer, who = host.first("load_checkpoint", path=path, options=dict(options))
    if answer is not None and not isinstance(answer, LoadedClassifier):
        raise ComponentError(f"load_checkpoint of {who} gave a {type(answer).__name__}, not a LoadedClassifier")
    return answer


def provenance_of(host: PluginHost, kind: str, name: str) -> str:
    """The plugin that owns a component, as recorded in ``plugins`` of a checkpoint."""
    owner = host[kind].entry(name).owner
    for plugin, known in host.loaded.items():
        if known == owner:
            return plugin
    raise ComponentError(f"{kind} '{name}' has no loaded owner")
