"""Adversarial examples on request: one safetensors file, never more than one chunk of them in memory."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scl_defense.errors import UserError

SUFFIX = ".safetensors"


class ExampleFile:
    """Collects each attack's examples in raw files beside ``path`` and joins them at the end.

    The file has one float32 tensor (N, C, H, W) an attack, named by its label: row i is the example for image i, and
    the image itself where the attack made none (wrong from the start, or broken before). Metadata: ``attacks``, a JSON
    object of label -> ball.
    """

    def __init__(self, path: str | Path, images: Tensor):
        self.path, self.shape = Path(path), tuple(images.shape)
        if self.path.suffix != SUFFIX:
            raise UserError(f"'{path}' must end in {SUFFIX}: examples are saved as float32 safetensors")
        self.parts = _parts(self.path)
        self._images, self._size = images, images.numel() * 4
        self._gone, self._orphan = self.parts.with_suffix(".gone"), self.parts / "orphan"
        try:
            shutil.rmtree(self._gone, ignore_errors=True)
            if not self.parts.exists():
                # Whatever a state says of this folder's examples, they are not in it: until it is whole, each call
                # makes all of them. (A folder that begins a battery is told so by `clear`.)
                begun = self.parts.with_suffix(".new")
                shutil.rmtree(begun, ignore_errors=True)
                begun.mkdir(parents=True)
                (begun / self._orphan.name).touch()
                os.replace(begun, self.parts)
        except OSError as error:
            raise UserError(f"cannot make the folder '{self.parts}': {error.strerror}") from None

    def put(self, attack: int, places: Tensor, examples: Tensor) -> None:
        """Keep the examples of the images at ``places``, on disk when this returns."""
        kept = self._open(attack)
        kept[places.cpu().numpy()] = examples.detach().cpu().numpy()
        kept.flush()

    def copy(self, source: int, attack: int, places: Tensor) -> None:
        """The examples of another attack for these images: what a smaller ball has broken."""
        if len(places):
            where = places.cpu().numpy()
            kept = self._open(attack)
            kept[where] = self._open(source)[where]
            kept.flush()

    def has(self, attack: int) -> bool:
        """An earlier call for the same question has begun this attack's examples, and none of them is lost."""
        return not self._orphan.exists() and self._is_there(attack)

    def _is_there(self, attack: int) -> bool:
        raw = self._raw(attack)
        return raw.exists() and raw.stat().st_size == self._size

    def _raw(self, attack: int) -> Path:
        return self.parts / f"{attack}.f32"

    def _open(self, attack: int) -> np.memmap:
        raw = self._raw(attack)
        try:
            if not self._is_there(attack):
                fresh = raw.with_suffix(".new")
                with open(fresh, "wb") as stream:
                    for image in self._images.split(256):
                        stream.write(image.cpu().numpy().astype("<f4").tobytes())
                os.replace(fresh, raw)
            return np.memmap(raw, dtype="<f4", mode="r+", shape=self.shape)
        except OSError as error:
            raise UserError(f"cannot write '{raw}': {error.strerror}") from None

    def finish(self, attacks: Mapping[str, str], *, keep: bool = False) -> None:
        """Write the whole file at once under its name. attacks: label -> ball, in the battery's order. keep: the raw
        files too, for whoever goes on with the battery; :func:`discard` takes them away.
        """
        size = self._size
        header: dict[str, Any] = {
            "__metadata__": {
                "format": "pt",
                "schema": "scl-defense-adversarial/1",
                "attacks": json.dumps(dict(attacks)),
            }
        }
        for number, label in enumerate(attacks):
            span = [number * size, (number + 1) * size]
            header[label] = {"dtype": "F32", "shape": list(self.shape), "data_offsets": span}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.parts / "joined"
        try:
            with open(temporary, "wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                for number in range(len(attacks)):
                    self._open(number)
                    with open(self._raw(number), "rb") as raw:
                        shutil.copyfileobj(raw, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise UserError(f"cannot write '{self.path}': {error.strerror}") from None
        if not keep:
            self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # as a whole or not at all: a state may still speak of them
            os.replace(self.parts, self._gone)
        shutil.rmtree(self._gone, ignore_errors=True)

    def clear(self) -> None:
        """Throw away what an earlier, other run left here."""
        self._remove()
        self.parts.mkdir(parents=True, exist_ok=True)


def _parts(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def discard(path: str | Path) -> None:
    """Take away the raw files that :meth:`ExampleFile.finish` has kept beside the examples in ``path``."""
    shutil.rmtree(_parts(Path(path)), ignore_errors=True)
