"""Whatever a body holds, the answer is a named refusal whose pointers lead to places in that body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.dependencies import parse_job_request
from api.errors import Problem
from api.pointers import join
from api.schemas import JobRequest
from compression.recipe import STEPS

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "default", "keep"])
)
NAMES = st.text(max_size=6) | st.sampled_from(["step", "prune", "steps", "recipe", "inline", "source", "0", "Recipe", "a/b~"])
VALUES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3), max_leaves=8
)  # fmt: skip
STEP = st.fixed_dictionaries({"step": st.sampled_from([*STEPS, "melt"])}, optional={"sparsity": VALUES, "experts_kept": VALUES})
BODIES = st.fixed_dictionaries(
    {},
    optional={
        **{name: VALUES for name in JobRequest.model_fields},
        "recipe": st.fixed_dictionaries({"steps": st.lists(STEP | VALUES, max_size=3)}) | VALUES,
        "calibration": st.fixed_dictionaries(
            {"source": VALUES | st.lists(st.fixed_dictionaries({"source": VALUES}), max_size=2)}
        ),
        "nonsense": VALUES,
    },
)


def follow(pointer: str, body: Any) -> Any:
    """Walk a JSON pointer; KeyError, IndexError or TypeError where it leads nowhere."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        body = body[int(name)] if isinstance(body, list) else body[name]
    return body


@settings(max_examples=400, deadline=None)
@given(BODIES | VALUES)
def test_every_refusal_is_named_and_points_into_the_body(body: Any):
    try:
        parse_job_request(json.dumps(body).encode())
    except Problem as problem:
        refusal = problem
    else:
        return

    assert refusal.code in ("validation_failed", "malformed_json")
    assert refusal.errors or refusal.code == "malformed_json"
    for fault in refusal.errors:
        pointer, last = fault["pointer"], fault["pointer"].rpartition("/")[2]
        if fault["code"] == "missing" or last == "step":
            pointer = pointer.rpartition("/")[0]  # the member is not there; what should hold it is
        follow(pointer, body)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_by_name(body: bytes):
    with pytest.raises(Problem) as caught:
        parse_job_request(body)
    assert caught.value.code in ("malformed_json", "validation_failed")


def test_a_mebibyte_of_unknown_fields_is_told_briefly():
    body = json.dumps({f"x{number}": 0 for number in range(80_000)}).encode()

    with pytest.raises(Problem) as caught:
        parse_job_request(body)

    assert len(caught.value.errors) == 50


@pytest.mark.parametrize(
    ("parts", "pointer"), [((), ""), (("a", 0, "b"), "/a/0/b"), (("a/b", "c~d"), "/a~1b/c~0d"), (("",), "/")]
)
def test_a_pointer_is_written_as_rfc_6901_says(parts: tuple[str | int, ...], pointer: str):
    assert join(parts) == pointer
