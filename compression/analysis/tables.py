"""Everything the analysis has to say, as plain data: what the step ``analyze`` adds to the report.

Tables of all pairs of experts are given in full while they hold at most FULL_NUMBERS numbers over all layers together, which is
about 2.5 MB of JSON: Mixtral-8x7B's do. Beyond that each becomes its mean, its extremes and the pairs farthest up and down.
Numbers are not rounded. None stands for what cannot be said, never NaN.

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from compression.analysis import similarity
from compression.analysis.findings import findings
from compression.analysis.routing import lift, routing
from compression.study import ExpertStatistics, Study

FULL_NUMBERS = 2**17
NAMED_PAIRS = 16
"""Pairs named at either end of a table that is not given in full."""
_TABLES = 9
"""Tables of all pairs that a layer can have: three of matrices, three of averages, router rows, outputs, lift."""

Table = dict[str, Any]


def analysis_tables(study: Study) -> Table:
    """Return the findings, and a row for every block, mixture or dense, that the study has seen."""
    full = _TABLES * sum(len(layer.absolute_E) ** 2 for layer in study.experts.values()) <= FULL_NUMBERS
    blocks = sorted({*study.cosine_M, *study.experts})
    return {
        "domains": list(study.domains),
        "parts": sorted(study.parts),
        "pair_tables": "full" if full else "summaries",
        "findings": [_plain(asdict(finding)) for finding in findings(study)],
        "blocks": [_row(study, block, full=full) for block in blocks],
    }


def _plain(value: Any) -> Any:
    """Return the same as JSON has it: keys are text, tuples lists."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _row(study: Study, block: int, *, full: bool) -> Table:
    row: Table = {"block": block, "redundancy": similarity.redundancy(study, block)}
    layer = study.experts.get(block)
    if layer is None:
        return row | {"experts": 0}
    lifts_EE = lift(layer)
    return row | {
        "experts": len(layer.absolute_E),
        "routing": routing(layer, study.domains),
        "lift": None if lifts_EE is None else pair_table(lifts_EE, full=full),
        "outputs": _outputs(layer, full=full),
        "likeness": _likeness(layer, full=full),
    }


def _outputs(layer: ExpertStatistics, *, full: bool) -> Table | None:
    if layer.sample is None or not len(layer.sample.gram_SEE):
        return None
    cosine_EE = similarity.output_similarity(layer.sample)
    return {"tokens": len(layer.sample.gram_SEE), "cosine": pair_table(cosine_EE, full=full)}


def _likeness(layer: ExpertStatistics, *, full: bool) -> Table | None:
    found = layer.likeness
    if found is None:
        return None
    named = zip(similarity.MATRICES, found.matrix_3EE, found.average_3EE, strict=True)
    tables = {
        name: (pair_table(matrix_EE, full=full), pair_table(average_EE, full=full)) for name, matrix_EE, average_EE in named
    }
    return {
        "matrix": {name: matrix for name, (matrix, _) in tables.items()},
        "average": {name: average for name, (_, average) in tables.items()},
        "router": pair_table(found.router_EE, full=full),
        "router_follows": similarity.router_follows(found),
        "matching": similarity.matching(found),
    }


def pair_table(value_EE: Tensor, *, full: bool) -> Table:
    """Return a symmetric table of pairs of experts: whole, or its mean, its extremes and the pairs at either end."""
    experts = value_EE.shape[0]
    if experts < 2:
        return {"mean": None}
    value_Q = similarity.pairs_of(value_EE)
    table: Table = {"mean": float(value_Q.mean()), "lowest": float(value_Q.min()), "highest": float(value_Q.max())}
    if full:
        return table | {"all": value_EE.tolist()}
    pair_Q2 = torch.tril_indices(experts, experts, offset=-1).flip(0).mT
    order_Q = torch.sort(value_Q, descending=True, stable=True).indices
    ends = {"top": order_Q[:NAMED_PAIRS], "bottom": order_Q[-NAMED_PAIRS:].flip(0)}
    return table | {
        end: [[*pair_Q2[place].tolist(), float(value_Q[place])] for place in places.tolist()] for end, places in ends.items()
    }
