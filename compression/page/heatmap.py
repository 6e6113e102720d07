"""Heat maps as PNG data URIs: one pixel per block and expert, enlarged by the browser, so 61 x 256 cells take a few kB."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

from markupsafe import Markup

Colour = tuple[int, int, int, int]


def png_uri(rows: Sequence[Sequence[Colour]]) -> str:
    """Return the picture as a data URI; equal pixels give equal bytes on the same zlib."""
    height, width = len(rows), len(rows[0])
    raw = b"".join(b"\0" + b"".join(struct.pack("4B", *pixel) for pixel in row) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = (b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(raw, 9)), _chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"".join(parts)).decode()


def heat_map(title: str, what: str, rows: Sequence[Sequence[Colour]], *, kind: str, labels: Sequence[str]) -> Markup:
    """Return the picture with its title; ``kind`` tells the page's script what to say of the cell under the pointer."""
    if not rows or not rows[0]:
        return Markup("")
    high = len(rows)
    pixels = 22 * high if high <= 20 else min(max(120, 6 * high), 460)
    return Markup(
        '<figure class="heat"><figcaption>{} <small>{}</small></figcaption><span class="heat-y">block {}</span>'
        '<img class="heat-map" data-heat="{}" data-columns="{}" data-rows="{}" alt="{}" src="{}" height="{}">'
        '<span class="heat-y">block {}</span><p class="heat-x">expert 0 to {}</p><output class="heat-said"></output></figure>'
    ).format(
        title, what, labels[0], kind, len(rows[0]), high, f"{title}. {what}", png_uri(rows), pixels, labels[-1], len(rows[0]) - 1
    )  # fmt: skip


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
