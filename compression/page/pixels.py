"""Heat maps as pictures: a pixel per cell, in an indexed PNG of a few kilobytes that a page carries in itself."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

Colour = tuple[int, int, int]


def picture(cells: Sequence[Sequence[int]], palette: Sequence[Colour]) -> str:
    """Return a data URI of the PNG whose pixels are places in the palette; place 0 is transparent. Rows are equally long."""
    width, height = len(cells[0]), len(cells)
    lines = b"".join(b"\0" + bytes(row) for row in cells)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", b"".join(bytes(colour) for colour in palette)),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def shades(light: Colour, dark: Colour, count: int) -> list[Colour]:
    """Return colours from one to the other, both included."""
    steps = [place / max(1, count - 1) for place in range(count)]
    return [tuple(round(a + (b - a) * step) for a, b in zip(light, dark, strict=True)) for step in steps]  # pyright: ignore
