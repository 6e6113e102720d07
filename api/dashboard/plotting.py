"""The frontier of a plan as rows and answers keep it, drawn by the library."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from compression.page.plots import frontier_plot
from jobs.tables import Document


@dataclass(frozen=True, slots=True)
class Point:
    """A plan that could be chosen."""

    bytes: int
    predicted_loss: float


def frontier(plan: Document, target: int | None, *, with_chosen: bool) -> Markup:
    """Return the plot; a target far beyond the original would leave no room for anything else, and is left out."""
    points = [Point(point["bytes"], point["predicted_loss"]) for point in plan["frontier"]]
    original: int = plan["bytes_before"]
    chosen = (plan["bytes_after"], plan["predicted_loss"]) if with_chosen and plan["predicted_loss"] is not None else None
    shown = target if target is not None and target <= 1.5 * original else None
    return frontier_plot(points, chosen=chosen, target_bytes=shown, original_bytes=original)
