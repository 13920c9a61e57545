"""Networks that come with their own graph: TorchScript, ``torch.export``, ONNX. No Python of the file is run.

TorchScript is a small language of its own: its archives can do what its operators do, and two of those touch files,
so archives that name them are refused. A ``torch.export`` archive is turned into Python source by torch when it is
loaded, and its shape expressions are evaluated: only archives whose operators, names and expressions are plain are
handed to torch. ONNX is data, read by onnx and rebuilt from torch layers by onnx2torch.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.checkpoint import inflated
from scl_defense.errors import UserError
from scl_defense_benchmarks.containers import Kind

# Operators of TorchScript that read or write files, and those that are not torch's own.
_FILE_OPERATORS = re.compile(rb"\b(?:torch\.(?:from_file|save|load|_load)\b|ops\.(?!aten\b|prim\b|quantized\b)\w+)")
_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_(?:int|float|not|max|min|ite|sum|sqrt)"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
)
_NAME = re.compile(r"\w*")
# Of shape expressions, as sympy writes them: Add(Symbol('s0', positive=True, integer=True), Integer(1)).
_WORDS = {
    *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv"),
    *("CeilDiv", "CleanDiv", "TruncToInt", "positive", "nonnegative", "negative", "integer", "True", "False"),
}


class Graph(nn.Module):
    """A loaded graph as a network: its modes cannot be switched, its batch may be fixed.

    batch: the only number of images that the graph takes, or ``None``; smaller batches are filled up with copies.
    """

    def __init__(self, network: nn.Module, batch: int | None = None):
        super().__init__()
        self.network, self.batch = network, batch

    def train(self, mode: bool = True) -> "Graph":
        self.training = mode  # an exported graph raises when asked; what it does was fixed when it was exported
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.batch is None or len(images) == self.batch:
            return self.network(images)
        found = []
        for part in images.split(self.batch):
            filled = torch.cat([part, part[:1].expand(self.batch - len(part), *part.shape[1:])])
            found.append(self.network(filled)[: len(part)])
        return torch.cat(found)


def load_graph(path: Path, kind: Kind, *, trust: bool = False) -> nn.Module:
    """The network in such a file, on the CPU, in float32. Raises :class:`UserError`, one line."""
    loaders = {"torchscript": _torchscript, "export": _exported, "onnx": _onnx}
    try:
        if kind != "onnx":
            with zipfile.ZipFile(path) as archive:
                if bomb := inflated(archive, path.stat().st_size):
                    raise UserError(f"'{path}' is not a readable checkpoint: {bomb}")
        return loaders[kind](path, trust)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile, protobuf and onnx2torch each have their own
        text = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' cannot be read as {kind}: {type(error).__name__}: {text}") from None


def _torchscript(path: Path, trust: bool) -> nn.Module:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".py") and not trust and (found := _FILE_OPERATORS.search(archive.read(name))):
                raise UserError(
                    f"'{path}' uses {found.group().decode()}, which can read or write files; accept that with "
                    "--trust-pickle"
                )
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch.jit is deprecated; its files are still about
            warnings.simplefilter("ignore", category)
        network = torch.jit.load(str(path), map_location="cpu")
    return network.float().eval()


def _exported(path: Path, trust: bool) -> nn.Module:
    if not trust:
        _check_archive(path)
    program = torch.export.load(str(path))
    user_inputs = set(program.graph_signature.user_inputs)
    shapes = [n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder" and n.name in user_inputs]
    if len(shapes) != 1:
        raise UserError(f"'{path}' takes {len(shapes)} inputs; a classifier takes one tensor of images")
    batch = shapes[0][0] if isinstance(shapes[0][0], int) else None
    return Graph(program.module(), batch)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                fault = _unusual(json.loads(archive.read(name)))
                if fault:
                    raise UserError(
                        f"'{path}' has {fault} in its graph, which could run code; accept that with --trust-pickle"
                    )
            elif name.endswith((".pt", ".pkl")):
                with archive.open(name) as stream:
                    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
                if foreign:
                    raise UserError(f"'{path}' would run code when loaded (it names {', '.join(sorted(foreign)[:5])})")
            elif "/constants/" in name and "custom_obj" in name:
                raise UserError(f"'{path}' holds an object of a class of its own ({name}), which could run code")


def _unusual(part: Any, key: str = "") -> str | None:
    """The first operator, name or expression of an archive's description that is not plain, or ``None``."""
    if isinstance(part, dict):
        pairs = ((name, value) for name, value in part.items() if name != "metadata")
        return next((fault for name, value in pairs if (fault := _unusual(value, name))), None)
    if isinstance(part, list):
        return next((fault for value in part if (fault := _unusual(value, key))), None)
    if not isinstance(part, str):
        return None
    if key == "target" and "." in part and not _TARGET.fullmatch(part):
        return f"the operator {part[:80]!r}"
    if key in ("name", "as_name") and not _NAME.fullmatch(part):
        return f"the name {part[:80]!r}"
    if key in ("expr_str", "as_expr"):
        words = set(re.findall(r"[A-Za-z_]\w*", part)) - _WORDS
        if not re.fullmatch(r"[\w\s+\-*/(),.<>=']*", part) or any(not re.fullmatch(r"[a-z]\d+", w) for w in words):
            return f"the expression {part[:80]!r}"
    return None


def _onnx(path: Path, trust: bool) -> nn.Module:
    try:
        import onnx
        import onnx2torch
    except ImportError:
        raise UserError(f"'{path}' is an ONNX file; reading it needs: pip install 'scl-defense[onnx]'") from None
    model = onnx.load(str(path))
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in weights]
    if len(inputs) != 1:
        raise UserError(f"'{path}' takes {len(inputs)} inputs; a classifier takes one tensor of images")
    sizes = inputs[0].type.tensor_type.shape.dim
    batch = int(sizes[0].dim_value) if len(sizes) and sizes[0].HasField("dim_value") and sizes[0].dim_value else None
    return Graph(onnx2torch.convert(model).float().eval(), batch)
