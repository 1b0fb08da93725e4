"""Picture files written by hand, byte by byte, from samples: an oracle that knows no Pillow."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
_D50 = (0.9642, 1.0, 0.8249)
_TIFF_TYPES = {"H": 3, "I": 4, "f": 11, "h": 8, "i": 9, "d": 12, "B": 7}


def png(
    samples_HWC: np.ndarray,
    *,
    depth: int,
    colour_type: int,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    late_chunks: Sequence[tuple[bytes, bytes]] = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of samples (H, W, C) as they are stored; `late_chunks` come after the pixels."""
    height, width, channels = samples_HWC.shape
    assert channels == _CHANNELS[colour_type]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    passes = [samples_HWC]
    if interlaced:
        passes = [samples_HWC[y::dy, x::dx] for x, y, dx, dy in (*_ADAM7, (0, 1, 1, 2))]
    rows = b"".join(b"\0" + _packed(row, depth) for part in passes if part.size for row in part)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (
            (b"IHDR", header),
            *chunks,
            (b"IDAT", zlib.compress(rows)),
            *late_chunks,
            (b"IEND", b""),
        )
    )


def _packed(row_WC: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        return row_WC.astype(">u2").tobytes()
    bits = np.unpackbits(row_WC.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - depth :]
    return np.packbits(bits.reshape(-1)).tobytes()


def tiff(
    samples_HWC: np.ndarray,
    *,
    photometric: int,
    order: str = "<",
    planar: bool = False,
    tags: Mapping[int, tuple[str, Sequence[float]]] | None = None,
) -> bytes:
    """An uncompressed TIFF of one strip (or one a plane); `tags` are (type, values) by number."""
    height, width, channels = samples_HWC.shape
    samples = samples_HWC.astype(samples_HWC.dtype.newbyteorder(order))
    planes = [samples[..., c] for c in range(channels)] if planar else [samples]
    strips = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    fields: dict[int, tuple[str, Sequence[float]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * samples.dtype.itemsize] * channels),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", offsets),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", list(map(len, strips))),
        284: ("H", [2 if planar else 1]),
        339: ("H", [kind] * channels),
        **(tags or {}),
    }
    place = 8 + sum(map(len, strips))
    entries, outside = b"", b""
    start_outside = place + 2 + 12 * len(fields) + 4
    for number, (letter, values) in sorted(fields.items()):
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        entries += struct.pack(f"{order}HHI", number, _TIFF_TYPES[letter], len(values))
        if len(content) <= 4:
            entries += content.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", start_outside + len(outside))
            outside += content + b"\0" * (len(content) % 2)
    mark = b"II" if order == "<" else b"MM"
    return (
        mark
        + struct.pack(f"{order}HI", 42, place)
        + b"".join(strips)
        + struct.pack(f"{order}H", len(fields))
        + entries
        + struct.pack(f"{order}I", 0)
        + outside
    )


def exif(orientation: int) -> bytes:
    """An EXIF block (a TIFF without pixels) that holds an orientation alone."""
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def rgb_profile(primaries_33: np.ndarray, gamma: float) -> bytes:
    """An ICC matrix profile; the columns are red, green and blue in XYZ of D50."""
    xyz = [b"XYZ \0\0\0\0" + _fixed(*column) for column in np.asarray(primaries_33).T]
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    return _profile(b"RGB ", [(b"rXYZ", xyz[0]), (b"gXYZ", xyz[1]), (b"bXYZ", xyz[2])], curve)


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey with a power curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    return _profile(b"GRAY", [], curve)


def _profile(space: bytes, columns: list[tuple[bytes, bytes]], curve: bytes) -> bytes:
    curves = (b"kTRC",) if space == b"GRAY" else (b"rTRC", b"gTRC", b"bTRC")
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    parts = [
        (b"desc", text),
        (b"cprt", b"text\0\0\0\0none\0\0\0\0"),
        (b"wtpt", b"XYZ \0\0\0\0" + _fixed(*_D50)),
        *columns,
        *((name, curve) for name in curves),
    ]
    table, content = b"", b""
    start = 128 + 4 + 12 * len(parts)
    for name, part in parts:
        table += name + struct.pack(">II", start + len(content), len(part))
        content += part + bytes(-len(part) % 4)
    size = start + len(content)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*_D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + content


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)
