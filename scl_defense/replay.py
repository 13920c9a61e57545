"""Training from examples that were made once: the file, checked before it is believed, and the generator reading it.

A file is a safetensors file: ``adversarial`` (K, N, C, H, W) in [0, 1], ``indices`` (N,) their places in the training
split, and one entry of metadata, a JSON record of recipe, threat, data fingerprint, plugins and versions.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from scl_defense.data import Data
from scl_defense.errors import ComponentError, UserError, why
from scl_defense.threat import ThreatModel
from scl_defense.types import Context, GeneratorBatch, component

FORMAT = "scl-defense-examples/1"
RECORD = "scl_defense"  # one entry: safetensors writes several in a random order, and equal runs must give equal files
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class _Content:
    """adversarial: (K, N, C, H, W) in [0, 1]. indices: (N,) increasing places in the training split."""

    adversarial: Tensor
    indices: Tensor
    record: Mapping[str, Any]
    sha256: str

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel.parse(self.record["threat"])


@component
class StoredExamples:
    """Examples from a file of ``scl-defense generate``, instead of making new ones.

    In epoch e copy ``e % K`` is used (with ``views`` > 1 the next ones too), its rows put through the very
    augmentation draws of the view that it goes beside, then projected onto that view's ball. So an epoch costs what
    one more clean view costs. Model-free whatever made the file: the recipe inside says what did.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_row: ClassVar[bool] = True

    path: Annotated[str, Field(min_length=1, description="file written by scl-defense generate")]
    sha256: Annotated[str | None, Field(description="refuse any other file (filled in when it is read)")] = None
    views: Annotated[int, Field(ge=1, le=8, description="adversarial views: so many copies at a time")] = 1

    @cached_property
    def content(self) -> _Content:
        """The file, read once. Raises :class:`UserError` when it is damaged or something else."""
        found = _read(Path(self.path))
        if self.sha256 is not None and self.sha256 != found.sha256:
            raise UserError(f"examples '{self.path}' are not the file that was asked for: sha256 {found.sha256}")
        return found

    def opened(self) -> "StoredExamples":
        """The same with its file read and its fingerprint among its options, so that a checkpoint records it."""
        content = self.content
        if self.views > len(content.adversarial):
            raise UserError(
                f"examples '{self.path}' hold {len(content.adversarial)} copies, not the {self.views} that views asks "
                "for; make more with scl-defense generate --copies"
            )
        known = dataclasses.replace(self, sha256=content.sha256)
        known.__dict__["content"] = content
        return known

    def prepare(self, data: Data, threat: ThreatModel) -> None:
        """Raises :class:`UserError` unless the examples were made from this data inside this ball."""
        content = self.content
        if content.record["data_sha256"] != data.fingerprint("train"):
            raise UserError(
                f"examples '{self.path}' were made from other data than '{data.name}' "
                f"(recipe: data={content.record['recipe'].get('data')}); make them again with scl-defense generate"
            )
        if tuple(content.adversarial.shape[2:]) != tuple(data.image_shape):
            theirs, ours = tuple(content.adversarial.shape[2:]), tuple(data.image_shape)
            raise UserError(f"examples '{self.path}' are images {theirs}, those of '{data.name}' are {ours}")
        if content.threat.norm != threat.norm or content.threat.radius > threat.radius:
            raise UserError(
                f"examples '{self.path}' lie in the ball {content.threat}, larger or other than {threat}; make them "
                f"again with scl-defense generate --norm {threat.norm} --eps {threat.eps}"
            )

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        content, device = self.content, batch.views.device
        kept = context.cache.get("stored")
        if kept is None or kept[0] != (self.path, device):
            kept = ((self.path, device), content.adversarial.to(device), content.indices.to(device))
            context.cache["stored"] = kept
        _, stored, indices = kept
        rows = torch.searchsorted(indices, batch.indices).clamp(max=len(indices) - 1)
        missing = int((indices[rows] != batch.indices).sum())
        if missing:
            raise UserError(
                f"examples '{self.path}' cover {len(indices)} images and lack {missing} of this batch; make them "
                "without --limit, or train with the same --limit"
            )
        if context.reaugment is None:
            raise ComponentError(f"{context.generator} was called without context.reaugment: which view is meant?")
        adversarial = []
        for place in range(self.views):
            examples = stored[(context.epoch * self.views + place) % len(stored), rows].to(batch.views.dtype)
            view = place % len(batch.views)
            again = context.reaugment(examples, view)
            # Colour changes, crops of L2 balls and rounding in the file can lead out of the view's ball.
            adversarial.append(context.threat.project(batch.views[view], again))
        return torch.stack(adversarial)


def _read(path: Path) -> _Content:
    if path.is_dir():
        raise UserError(f"examples '{path}' are a directory; give the file, written by scl-defense generate")
    if path.exists() and not path.is_file():
        raise UserError(f"examples '{path}' are no regular file; give the file, written by scl-defense generate")
    try:
        payload = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"examples '{path}' cannot be read: {why(error)}") from None
    record = _record_of(payload)
    if record is None:
        raise UserError(
            f"'{path}' holds no stored examples; make them with scl-defense generate --out FILE.safetensors"
        )
    if record["format"] != FORMAT:
        raise UserError(f"examples '{path}' have format {record['format']!r}; this version reads {FORMAT}")
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:
        raise UserError(
            f"examples '{path}' are truncated or damaged ({type(error).__name__}); copy them again"
        ) from None
    fault = _fault_of(tensors, record)
    if fault:
        raise UserError(f"examples '{path}' are malformed: {fault}; make them again with scl-defense generate")
    return _Content(tensors["adversarial"], tensors["indices"], record, hashlib.sha256(payload).hexdigest())


def _record_of(payload: bytes) -> dict[str, Any] | None:
    """Our record in a safetensors header, or ``None`` for any other file."""
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or not 0 < length <= len(payload) - 8:
        return None
    try:
        record = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"][RECORD])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("format"), str) else None


def _fault_of(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str | None:
    for name, kind in (("recipe", dict), ("data_sha256", str), ("threat", str)):
        if not isinstance(record.get(name), kind):
            return f"the record lacks {name}"
    try:
        ThreatModel.parse(record["threat"])
    except UserError as error:
        return str(error)
    if set(tensors) != {"adversarial", "indices"}:
        return f"it must hold the tensors adversarial and indices, not {', '.join(sorted(tensors)) or 'none'}"
    adversarial, indices = tensors["adversarial"], tensors["indices"]
    if adversarial.dtype not in DTYPES.values() or adversarial.dim() != 5 or 0 in adversarial.shape:
        return f"adversarial must be (K, N, C, H, W) float, not {adversarial.dtype} {tuple(adversarial.shape)}"
    if indices.dtype != torch.int64 or indices.shape != adversarial.shape[1:2]:
        return f"indices must be ({adversarial.shape[1]},) int64, not {indices.dtype} {tuple(indices.shape)}"
    if int(indices[0]) < 0 or not bool((indices.diff() > 0).all()):
        return "indices must increase from 0 or more"
    low, high = adversarial.aminmax()
    if not (float(low) >= 0 and float(high) <= 1):  # NaN is neither
        return f"images must lie in [0, 1], not {float(low):.3g} to {float(high):.3g}"
    return None
