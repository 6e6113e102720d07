"""scipy's integer programming (HiGHS), imported when it is first needed: that takes most of a second, and prints nothing here."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

_ONE_AT_A_TIME = threading.Lock()


class Row(NamedTuple):
    """A condition: low <= sum of terms <= high; ``terms`` by column."""

    terms: Mapping[int, float]
    low: float
    high: float


class Minimum(NamedTuple):
    """The value of every column, and the part of the objective by which a better solution may have been missed."""

    values: tuple[float, ...]
    gap: float
    bound: float
    """What no solution goes below."""


def import_solver() -> None:
    """Import the solver, which the first plan of a process would otherwise wait for."""
    for name in ("numpy", "scipy.optimize", "scipy.sparse"):
        import_module(name)


def minimise(costs: Sequence[float], rows: Iterable[Row], *, whole: Sequence[bool], gap: float, seconds: float) -> Minimum | None:
    """Return the least solution found; None where there is none, or none was found in time.

    Columns lie between 0 and 1; those that are ``whole`` are one of the two.
    """
    import numpy as np

    optimize: Any = import_module("scipy.optimize")  # untyped
    sparse: Any = import_module("scipy.sparse")

    rows = list(rows)
    places = np.array([place for place, row in enumerate(rows) for _ in row.terms])
    columns = np.array([column for row in rows for column in row.terms])
    terms = np.array([float(term) for row in rows for term in row.terms.values()])
    matrix = sparse.csr_array((terms, (places, columns)), shape=(len(rows), len(costs)))
    with _quiet():
        result: Any = optimize.milp(
            np.array(costs),
            integrality=np.array(whole),
            bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(matrix, [row.low for row in rows], [row.high for row in rows]),
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    if result.x is None:
        return None
    return Minimum(tuple(map(float, result.x)), float(result.mip_gap or 0.0), float(result.mip_dual_bound))


@contextmanager
def _quiet() -> Generator[None]:
    """Send what C code prints to standard output where errors go: HiGHS prints a line now and then, whatever it is told."""
    with _ONE_AT_A_TIME:
        libc = ctypes.CDLL(None)
        sys.stdout.flush()
        libc.fflush(None)
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
