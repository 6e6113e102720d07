"""The published document and what the service does agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.contract import problems
from api.errors import CODES
from compression import errors as library_errors
from jobs import errors as job_errors
from tests.api.checkpoints import write_mixtral
from tests.api.conftest import Face

ROOT = Path(__file__).parents[2]
CALLS = {
    "/v1/jobs": {"get", "post"},
    "/v1/jobs/{job_id}": {"get", "delete"},
    "/v1/jobs/{job_id}/cancel": {"post"},
    "/v1/jobs/{job_id}/retry": {"post"},
    "/v1/jobs/{job_id}/events": {"get"},
    "/v1/jobs/{job_id}/report": {"get"},
    "/v1/jobs/{job_id}/artifact": {"get"},
    "/v1/jobs/{job_id}/artifact/files/{path}": {"get"},
    "/v1/reports": {"get"},
    "/v1/plans": {"post"},
    "/v1/steps": {"get"},
    "/v1/architectures": {"get"},
    "/v1/queues": {"get"},
    "/livez": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}
"""The contract's table of calls, without the pages for people."""
REQUEST_CODES = {
    400: "malformed_json invalid_header invalid_cursor",
    401: "missing_api_key invalid_api_key",
    403: "insufficient_scope",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    409: "job_active job_finished report_not_ready artifact_not_ready idempotency_in_flight",
    412: "precondition_failed",
    413: "body_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "validation_failed model_not_found unsupported_architecture not_a_moe unsafe_checkpoint broken_checkpoint "
    "remote_code_required target_unreachable recipe_exceeds_target not_loadable_in_profile impossible_step not_available "
    "quantized_source idempotency_key_reused source_not_allowed",
    429: "rate_limited queue_full",
    500: "internal",
    503: "unavailable source_unavailable draining",
}
"""The contract's table of errors, with 412 and 500."""
FAILURE_CODES = (
    "model_not_found gated_model download_failed broken_checkpoint out_of_gpu_memory out_of_host_memory disk_full "
    "constraint_violated non_finite_weights verification_failed max_runtime attempts_exhausted worker_lost storage_unavailable "
    "internal evaluation_failed"
)
"""The contract's list of what ``status_reason`` may say, and what decision 0031 adds."""


@pytest.fixture
def document(face: Face) -> dict[str, Any]:
    """The published document."""
    return face.client.get("/openapi.json").json()


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set[str]()
        return own.union(*(references(member) for member in value.values()))
    return set[str]().union(*(references(item) for item in value)) if isinstance(value, list) else set()


def test_the_document_lists_exactly_the_calls_of_the_contract(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1")
    assert {path: set(operations) for path, operations in document["paths"].items()} == CALLS


def test_every_reference_leads_somewhere(document: dict[str, Any]):
    schemas = document["components"]["schemas"]

    assert {reference.rpartition("/")[2] for reference in references(document)} <= set(schemas)
    assert "x-schema" not in str(document)


def test_a_job_is_described_as_it_is(face: Face, document: dict[str, Any]):
    schemas = document["components"]["schemas"]
    job = face.post_job()

    assert set(schemas["JobView"]["properties"]) == set(job)
    assert set(schemas["JobView"]["required"]) == set(job), "every field is always present"
    assert set(schemas["Plan"]["properties"]) == set(job["plan"])
    assert set(schemas["JobRequest"]["properties"]) == set(job["request"])
    assert schemas["JobView"]["properties"]["plan"]["anyOf"][0] == {"$ref": "#/components/schemas/Plan"}
    assert set(schemas["QueueView"]["properties"]) == {"class", "position", "waiting_for"}


def test_the_body_of_a_job_is_described_with_every_step(document: dict[str, Any]):
    create = document["paths"]["/v1/jobs"]["post"]
    schemas = document["components"]["schemas"]
    steps = schemas["Recipe"]["properties"]["steps"]["items"]["discriminator"]["mapping"]

    assert create["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/JobRequest"}
    assert len(steps) == 9
    assert schemas["JobRequest"]["additionalProperties"] is False


def test_streams_retries_and_reports_are_described_as_they_are(document: dict[str, Any]):
    paths, schemas = document["paths"], document["components"]["schemas"]
    events, retry, reports = (
        paths[path][method]
        for path, method in (
            ("/v1/jobs/{job_id}/events", "get"), ("/v1/jobs/{job_id}/retry", "post"), ("/v1/reports", "get"),
        )
    )  # fmt: skip

    def parameters(operation: dict[str, Any], place: str) -> set[str]:
        return {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == place}

    assert set(events["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert (parameters(events, "header"), parameters(events, "query")) == ({"Last-Event-ID"}, {"limit", "after"})
    assert set(retry["responses"]["201"]["headers"]) == {"Location", "Idempotent-Replayed"}
    assert parameters(retry, "header") == {"Idempotency-Key", "Prefer"}
    assert parameters(reports, "query") == {"model", "max_bytes", "min_retention", "order", "limit", "after"}
    assert set(schemas["ReportOrder"]["enum"]) == {"newest", "bytes", "retention"}
    assert {"id", "recipe", "ratio", "retention", "finished_at", "links"} <= set(schemas["ReportSummary"]["required"])
    assert set(schemas["Webhook"]["properties"]) == {"url", "events"}
    limited = paths["/v1/jobs"]["get"]["responses"]["429"]["headers"]
    assert set(limited) == {"Retry-After", "RateLimit", "RateLimit-Policy"}


def test_every_problem_is_declared_as_problem_json(document: dict[str, Any]):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"], (path, status)


def test_the_statuses_that_these_tests_meet_are_declared(document: dict[str, Any]):
    declared = {
        (path, method): set(map(int, operation["responses"]))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }

    assert declared["/v1/jobs", "post"] >= {201, 400, 401, 403, 409, 413, 415, 422, 503}
    assert declared["/v1/jobs/{job_id}", "get"] >= {200, 304, 401, 403, 404}
    assert declared["/v1/jobs/{job_id}/cancel", "post"] >= {200, 202, 404}
    assert declared["/v1/jobs/{job_id}", "delete"] >= {204, 404, 409}
    assert declared["/v1/jobs/{job_id}/retry", "post"] >= {201, 400, 401, 403, 404, 409, 422, 429, 503}
    assert declared["/v1/jobs/{job_id}/events", "get"] >= {200, 204, 400, 401, 403, 404, 406, 422, 429, 503}
    assert declared["/v1/reports", "get"] >= {200, 400, 401, 403, 422, 429}
    for (path, _), statuses in declared.items():
        assert not path.startswith("/v1") or 429 in statuses, f"a caller may be told at {path} to wait"
    assert declared["/v1/jobs/{job_id}/artifact/files/{path}", "get"] >= {200, 206, 304, 401, 404, 409, 412, 416}


def test_the_codes_are_those_of_the_contract_with_their_statuses():
    assert {status: set(codes.split()) for status, codes in REQUEST_CODES.items()} == {
        status: {name for name, code in CODES.items() if code.status == status} for status in {c.status for c in CODES.values()}
    }
    assert set(problems(418)) >= {400, 418, 500, 503}


def test_every_error_of_the_request_tree_has_a_status():
    classes = [*vars(library_errors).values(), *vars(job_errors).values()]
    requests = {kind.code for kind in classes if isinstance(kind, type) and issubclass(kind, library_errors.RequestError)}

    assert requests <= set(CODES)


def test_every_code_is_explained_with_a_way_out():
    page = (ROOT / "docs" / "errors.md").read_text()
    explained = dict(re.findall(r"^\| `([a-z_]+)` \|(.+)\|$", page, flags=re.MULTILINE))
    every = set(CODES) | set(FAILURE_CODES.split())

    assert set(explained) == every
    for name, row in explained.items():
        first, happened, to_do = (cell.strip() for cell in row.split("|"))
        assert happened
        assert to_do
        assert name not in CODES or name == "internal" or first == str(CODES[name].status)


def test_a_served_plan_loads_neither_torch_nor_its_friends(tmp_path: Path):
    """In a fresh interpreter, since other tests of this run may have loaded them."""
    model = write_mixtral(tmp_path / "models" / "m")
    program = """
import sys
from pathlib import Path
from starlette.testclient import TestClient
from api.app import create_app
from jobs.database import migrate
from jobs.settings import Settings
folder = Path(sys.argv[1])
settings = Settings(data_dir=folder / "data", model_roots=(folder / "models",))
migrate(settings)
with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
    body = {"model": "file://" + sys.argv[2], "recipe": {"steps": [{"step": "quantize"}]}}
    assert client.post("/v1/jobs", json=body).status_code == 201
    assert client.get("/openapi.json").status_code == 200
heavy = sorted({"torch", "transformers", "safetensors"} & set(sys.modules))
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(model)], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
