"""Calls every operation of the published document with generated requests, legal and illegal ones, and checks the answers.

    python -m tests.faults.fuzz_contract --cases 5000 --seed 1

The document is read, never listed here, so a new route is covered by being published. An answer is sound if it is no 5xx
(but a hub that does not answer is one: nothing here has a network), and has a status, a media type, headers and a body that
the document promises. Some requests are made to succeed: they name a model that exists, and jobs that do. Endless answers
are left out: no event stream is accepted and no ``Prefer: wait`` is sent.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

CHECKS = [content_type_conformance, response_headers_conformance, response_schema_conformance, status_code_conformance]
_STREAM, _NOWHERE = "text/event-stream", "http://127.0.0.1:9"
STEPS: list[list[dict[str, Any]]] = [
    [{"step": "quantize"}],
    [{"step": "expert_drop", "experts_kept": 4}],
    [{"step": "block_drop", "blocks_dropped": 1}, {"step": "quantize", "scheme": "W8A16"}],
]


@dataclass
class Answers:
    """What the service answered, by status, and what was wrong with it."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    faults: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def cases(self) -> int:
        """How many requests were sent."""
        return self.statuses.total()


@dataclass(frozen=True)
class World:
    """What exists: a model, and by parameter name values that lead somewhere."""

    model: str
    values: Mapping[str, tuple[str, ...]]


def fuzz(client: TestClient, world: World, cases: int, number: int, note: Callable[[str], object] = lambda line: None) -> Answers:
    """Send so many requests, spread over all operations, and return the answers."""
    os.environ["HF_ENDPOINT"] = _NOWHERE
    warnings.filterwarnings("ignore", module="schemathesis")
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    answers = Answers()
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            each = max(1, cases // (2 * len(operations)))
            _fuzz_operation(client, world, operation, mode, each, number, answers, note)
    return answers


def _fuzz_operation(
    client: TestClient, world: World, operation: Any, mode: GenerationMode, cases: int, number: int, answers: Answers, note: Any
) -> None:
    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def one(case: Any, data: st.DataObject) -> None:
        _lead_somewhere(case, world, data)
        fault = _fault(client, case, answers)
        if fault and (name := f"{operation.label}: {fault.splitlines()[0][:160]}") not in answers.faults:
            answers.faults[name] = fault
            note(f"{name}\n{fault}\n{case.as_curl_command()[:800]}\n")

    with suppress(Unsatisfiable):  # an operation without parameters cannot be called wrongly
        one()


def _lead_somewhere(case: Any, world: World, data: st.DataObject) -> None:
    """Put what exists in the place of what was made up, half the time."""
    for name in case.path_parameters or {}:
        if name in world.values and data.draw(st.booleans()):
            case.path_parameters[name] = data.draw(st.sampled_from(world.values[name]))
    if isinstance(case.body, dict) and "model" in case.body and data.draw(st.booleans()):
        case.body["model"] = world.model
        if data.draw(st.booleans()):
            case.body["recipe"] = {"steps": data.draw(st.sampled_from(STEPS))}
        if data.draw(st.booleans()):  # what else was made up is nearly always refused
            case.body = {name: case.body[name] for name in ("model", "recipe", "labels", "serving") if name in case.body}
    headers = case.headers or {}
    for name in list(headers):
        if name.lower() == "prefer" or (name.lower() == "accept" and _STREAM in str(headers[name])):
            del headers[name]


def _fault(client: TestClient, case: Any, answers: Answers) -> str:
    """Send the request; return what is wrong with the answer."""
    try:
        sent = case.as_transport_kwargs(base_url=str(client.base_url))
    except Exception:  # a request that cannot be written down is none
        return ""
    sent = {
        name: value for name, value in sent.items() if name in ("method", "url", "headers", "params", "json", "data", "cookies")
    }
    try:
        request = client.build_request(**_for_httpx(sent))
    except (ValueError, TypeError, UnicodeError):
        return ""
    response = client.send(request)
    answers.statuses[response.status_code] += 1
    away = response.status_code == 503 and response.json()["code"] == "source_unavailable"
    try:
        case.validate_response(response, checks=[*CHECKS, *([] if away else [not_a_server_error])])
    except AssertionError as error:
        return str(error)
    except BaseExceptionGroup as group:
        return "\n".join(str(error) for error in group.exceptions)
    return ""


def _for_httpx(sent: dict[str, Any]) -> dict[str, Any]:
    """Rename what requests and httpx call by different names."""
    data = sent.pop("data", None)
    if isinstance(data, bytes | str):
        sent["content"] = data
    elif data is not None:
        sent["data"] = data
    sent["headers"] = {name: value for name, value in dict(sent.get("headers") or {}).items() if name.lower() != "host"}
    return sent


def main() -> int:
    """Run the cases that the arguments ask for and print the counts."""
    from tests.faults.face import a_face

    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, a_face(Path(folder)) as (client, world):
        answers = fuzz(client, world, options.cases, options.seed, lambda line: print(line, flush=True))
    print(f"{answers.cases} requests from seed {options.seed}: {dict(sorted(answers.statuses.items()))}")
    print(f"{len(answers.faults)} faults")
    return 1 if answers.faults else 0


if __name__ == "__main__":
    sys.exit(main())
