"""The heat maps of the report: what became of every expert, how much each was used, how alike experts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compression.page.derived import DROPPED, KEPT, MERGED
from compression.page.pixels import Colour, picture, shades

Json = dict[str, Any]
_DROPPED: Colour = (196, 88, 74)
_MERGED: Colour = (222, 168, 62)
_BITS: tuple[tuple[float, str, Colour], ...] = (
    (2.9, "under 3 bits", (186, 222, 214)),
    (3.9, "3 to 4 bits", (140, 201, 189)),
    (5.5, "4 to 5.5 bits", (87, 172, 158)),
    (9.5, "5.5 to 9.5 bits", (36, 135, 121)),
    (math.inf, "more", (9, 88, 78)),
)
"""Bits per stored entry, scales included, up to which a kept expert has its colour."""
_WHOLE: Colour = (70, 88, 104)
_SHADES = 24
_CELL, _WIDEST = 26, 940
"""Of a cell and of a map, in CSS pixels."""


def fates(experts: Sequence[Json]) -> Json:
    """Return the picture of what became of every expert, and its legend; blocks downward, experts to the right."""
    palette = [(0, 0, 0), _DROPPED, _MERGED, _WHOLE, *(colour for _, _, colour in _BITS)]
    names = ["", "dropped", "merged into another", "kept as it was", *(f"kept, {name}" for _, name, _ in _BITS)]
    rows = [
        [_fate(letter, bits) for letter, bits in zip(row["fate"], row["bits"], strict=True)] for row in experts if row["fate"]
    ]
    seen = sorted({cell for row in rows for cell in row})
    return _map(rows, palette, [(_css(palette[cell]), names[cell]) for cell in seen], [r["block"] for r in experts if r["fate"]])


def usage(blocks: Sequence[Json]) -> Json | None:
    """Return the picture of how many calibration tokens every expert was sent, against an even share; None without a study."""
    seen = [block for block in blocks if block["expert_tokens"]]
    if not seen:
        return None
    colours = shades((232, 238, 236), (6, 74, 66), _SHADES)
    palette = [(0, 0, 0), _DROPPED, *colours]
    rows = [[_used(tokens, block["expert_tokens"]) for tokens in block["expert_tokens"]] for block in seen]
    legend = [(_css(_DROPPED), "no token")]
    legend += [
        (_css(colours[_shade(share)]), name)
        for share, name in ((0.06, "1/16 of an even share"), (0.25, "1/4"), (1.0, "even"), (4.0, "4 times"))
    ]
    return _map(rows, palette, legend, [block["index"] for block in seen])


def likenesses(analysis: Json | None) -> list[Json]:
    """Return a picture per block of how alike the outputs of its experts are, where the analysis has all pairs."""
    found: list[Json] = []
    palette = [(0, 0, 0), *shades((236, 240, 239), (6, 74, 66), 64)]
    for block in (analysis or {}).get("blocks", ()):
        pairs = ((block.get("outputs") or {}).get("cosine") or {}).get("all")
        if pairs:
            rows = [[1 + round(63 * min(1.0, max(0.0, value))) for value in row] for row in pairs]
            found.append(_map(rows, palette, [], [block["block"]]))
    return found


def _fate(letter: str, bits: float | None) -> int:
    if letter == KEPT:
        return 3 if bits is None else 4 + next(place for place, (most, _, _) in enumerate(_BITS) if bits <= most)
    return {DROPPED: 1, MERGED: 2}[letter]


def _used(tokens: int, block: Sequence[int]) -> int:
    return 1 if tokens == 0 else 2 + _shade(tokens * len(block) / sum(block))


def _shade(share: float) -> int:
    """Return the place of a share among the shades: a sixteenth of the even one is the lightest, sixteen times the darkest."""
    return round((_SHADES - 1) * min(1.0, max(0.0, (math.log2(share) + 4) / 8)))


def _map(
    rows: Sequence[Sequence[int]], palette: Sequence[Colour], legend: Sequence[tuple[str, str]], blocks: Sequence[int]
) -> Json:
    width = max((len(row) for row in rows), default=0)
    if not width:
        return {"picture": None, "legend": [], "blocks": [], "width": 0, "across": 0, "down": 0}
    even = [[*row, *[0] * (width - len(row))] for row in rows]
    return {
        "picture": picture(even, palette),
        "legend": list(legend),
        "blocks": list(blocks),
        "width": width,
        "across": min(_WIDEST, width * _CELL),
        "down": len(rows) * max(5, min(_CELL, _WIDEST // width)),
    }


def _css(colour: Colour) -> str:
    return "#" + bytes(colour).hex()
