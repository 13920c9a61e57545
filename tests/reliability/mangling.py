"""Damage to files, as hypothesis draws it: bytes flipped, cut, put in, doubled, and zip members damaged under a fresh
checksum, so that the damage reaches the reader behind it."""

import io
import zipfile
from collections.abc import Sequence

from hypothesis import strategies as st

# Numbers that are at the edge of something in some format, as bytes.
EDGES = [
    b"\x00", b"\x01", b"\x7f", b"\x80", b"\xff", b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00" * 8,
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f", b"\x00\x00\x00\x00\x01\x00\x00\x00", b"\n", b"{", b"}", b"[", b"]", b'"', b"\\", b"=", b",",
    b"-", b"1e999", b"NaN", b"-1", b"9" * 30, b"null", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[31m", b"../", b".",
    b"(",
    b"e", b":", b"/", b"+", b"'", b"#", b"true", b"\r",
]  # fmt: skip
DAMAGE = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "insert", "replace", "double", "swap"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.sampled_from(EDGES), st.binary(min_size=1, max_size=8)),
)
DAMAGES = st.lists(DAMAGE, min_size=1, max_size=4)


def damaged(payload: bytes, damages: Sequence[tuple[str, float, float, bytes]]) -> bytes:
    """``payload`` after these damages, one after the other; places are shares of its length."""
    found = bytearray(payload)
    for kind, at, other, data in damages:
        if not found:
            return bytes(data)
        place, second = int(at * len(found)), int(other * len(found))
        low, high = sorted((place, second))
        if kind == "flip":
            found[place] ^= data[0] or 1
        elif kind == "cut":
            del found[place:]
        elif kind == "drop":
            del found[low : min(high, low + 64)]
        elif kind == "insert":
            found[place:place] = data
        elif kind == "replace":
            found[place : place + len(data)] = data
        elif kind == "double":
            found[low:low] = found[low : min(high, low + 256)]
        else:
            found[place], found[second] = found[second], found[place]
    return bytes(found)


def members(payload: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def damaged_member(parts: dict[str, bytes], which: int, damages: Sequence[tuple[str, float, float, bytes]]) -> bytes:
    """The archive with one member damaged and every checksum right."""
    names = list(parts)
    name = names[which % len(names)]
    return zipped({**parts, name: damaged(parts[name], damages)})
