"""Bad input: each answered with its code and the place at fault, and nothing written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from api.middleware import MAX_BODY
from tests.api.checkpoints import mixtral_shapes, write_mixtral, write_safetensors, write_sharded
from tests.api.conftest import Face

QUANTIZE = {"step": "quantize"}


def refused(face: Face, body: Any, *, kind: str = "application/json") -> dict[str, Any]:
    """POST a body as a job and as a plan; assert that both refuse it alike and that no row was written."""
    before = face.rows()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, "Idempotency-Key": "once"}
    answers = [face.client.post(path, content=content, headers=headers) for path in ("/v1/jobs", "/v1/plans")]

    assert [answer.headers["content-type"] for answer in answers] == ["application/problem+json"] * 2
    job, plan = (answer.json() for answer in answers)
    assert {**job, "instance": None} == {**plan, "instance": None}
    assert job["status"] == answers[0].status_code
    assert face.rows() == before
    assert face.announced == []
    return job


def pointers(problem: dict[str, Any]) -> list[str]:
    return [fault["pointer"] for fault in problem["errors"]]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b'{"model": }', b"\xff\xfe", b'{"model": "\\ud800"}', b'{"a":' * 400 + b"1" + b"}" * 400]
)
def test_what_is_not_json_is_malformed(face: Face, body: bytes):
    problem = refused(face, body)

    assert (problem["status"], problem["code"], problem["retryable"]) == (400, "malformed_json", False)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "multipart/form-data"])
def test_a_body_of_another_type_is_refused(face: Face, kind: str):
    problem = refused(face, face.body(), kind=kind)

    assert (problem["status"], problem["code"]) == (415, "unsupported_media_type")


def test_a_body_of_two_mebibytes_is_too_large(face: Face):
    problem = refused(face, b" " * 2 * MAX_BODY)

    assert (problem["status"], problem["code"]) == (413, "body_too_large")


def test_a_mistyped_field_is_refused_where_it_stands(face: Face):
    problem = refused(face, face.body(target_memry="20GB"))

    assert (problem["status"], problem["code"]) == (422, "validation_failed")
    assert pointers(problem) == ["/target_memry"]
    assert "target_memry" in problem["detail"]


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"recipe": {"steps": [{"step": "prune", "sparsity": 1.5}]}}, "/recipe/steps/0/sparsity"),
        ({"recipe": {"steps": [QUANTIZE, {"step": "melt"}]}}, "/recipe/steps/1/step"),
        ({"recipe": {"steps": [{"step": "expert_drop"}]}}, "/recipe/steps/0"),
        ({"recipe": {"steps": [{"step": "expert_merge"}]}}, "/recipe/steps/0/experts_kept"),
        ({"recipe": {"steps": []}}, "/recipe/steps"),
        ({"recipe": "auto"}, ""),
        ({"recipe": {"steps": [QUANTIZE | {"a/b~c": 1}]}}, "/recipe/steps/0/a~1b~0c"),
        ({"calibration": {"source": {"inline": []}}}, "/calibration/source/inline"),
        ({"calibration": {"source": "ftp://x"}}, "/calibration/source"),
        ({"calibration": {"samples": "128"}}, "/calibration/samples"),
        ({"calibration": {"source": [{"source": "default", "weight": 0}]}}, "/calibration/source/0/weight"),
        ({"calibration": {"source": [{"source": "default", "weight": float("inf")}]}}, "/calibration/source/0/weight"),
        ({"constraints": {"min_retention": float("nan")}}, "/constraints/min_retention"),
        ({"target_memory": "20 lightyears"}, "/target_memory"),
        ({"target_memory": "9" * 400 + "GB"}, "/target_memory"),
        ({"target_memory": 10**400}, "/target_memory"),
        ({"target_memory": True}, "/target_memory"),
        ({"limits": {"max_attempts": 0}}, "/limits/max_attempts"),
        ({"webhook": {"url": "gopher://x"}}, "/webhook/url"),
        ({"webhook": {"url": "http://example.org/x"}}, "/webhook/url"),
        ({"webhook": {"url": "https://ann:secret@example.org/x"}}, "/webhook/url"),
        ({"webhook": {"url": "https://example.org:8443/x"}}, "/webhook/url"),
        ({"webhook": {"url": "https://127.0.0.1/x"}}, "/webhook/url"),
        ({"webhook": {"url": "https://[::ffff:10.0.0.1]/x"}}, "/webhook/url"),
        ({"webhook": {"url": "https://2130706433/x"}}, "/webhook/url"),
        ({"webhook": {"url": "https://localhost/x"}}, "/webhook/url"),
        ({"labels": {str(number): "x" for number in range(17)}}, "/labels"),
        ({"labels": {"team": 5}}, "/labels/team"),
        ({"revision": "../main"}, None),
    ],
)  # fmt: skip
def test_a_value_outside_the_contract_is_pointed_at(face: Face, members: dict[str, Any], pointer: str | None):
    if pointer is None:
        members = {**members, "model": "someone/model"}
        pointer = "/revision"
    problem = refused(face, face.body(**members))

    assert (problem["status"], problem["code"]) == (422, "validation_failed")
    assert pointers(problem) == [pointer]


def test_a_body_that_is_no_object_is_pointed_at_as_a_whole(face: Face):
    assert pointers(refused(face, [1, 2])) == [""]


def test_every_fault_is_told_at_once(face: Face):
    problem = refused(face, face.body(nonsense=1, serving={"batch_size": 0}, labels={"": "x"}))

    assert {"/nonsense", "/serving/batch_size"} < set(pointers(problem))


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({"recipe": {"steps": [{"step": "recover", "method": "lora"}]}}, "/recipe/steps/0/step"),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(face: Face, members: dict[str, Any], pointer: str):
    problem = refused(face, face.body(**members))

    assert (problem["status"], problem["code"]) == (422, "not_available")
    assert pointers(problem) == [pointer]
    assert "not available yet" in problem["detail"]


def test_a_dense_model_is_no_mixture(face: Face):
    folder = write_mixtral(face.roots / "dense")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "not_a_moe")
    assert pointers(problem) == ["/model"]


def test_an_unknown_mixture_is_unsupported(face: Face):
    folder = write_mixtral(face.roots / "other", model_type="moe_of_tomorrow")

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "unsupported_architecture")
    assert "mixtral" in problem["detail"]


def test_a_checkpoint_of_pickles_is_unsafe(face: Face):
    folder = write_mixtral(face.roots / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "unsafe_checkpoint")


def test_a_model_that_brings_code_is_refused(face: Face):
    folder = write_mixtral(face.roots / "coded", model_type="own_moe", auto_map={"AutoModel": "modeling.Model"})

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "remote_code_required")


def test_a_quantized_model_is_refused(face: Face):
    folder = write_mixtral(face.roots / "small", quantization_config={"quant_method": "fp8"})

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "quantized_source")


def test_a_truncated_file_is_broken(face: Face):
    folder = write_mixtral(face.roots / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "broken_checkpoint")
    assert "model.safetensors" in problem["detail"]


def test_a_header_that_claims_a_petabyte_is_broken(face: Face):
    folder = write_mixtral(face.roots / "vast")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**15) + b"{}")

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "broken_checkpoint")


def test_a_missing_shard_is_broken(face: Face):
    folder = write_sharded(face.roots / "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "broken_checkpoint")
    assert "model-00002-of-00002.safetensors" in problem["detail"]


def test_an_expert_without_one_matrix_is_broken(face: Face):
    folder = write_mixtral(face.roots / "gappy")
    shapes = mixtral_shapes()
    del shapes["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    write_safetensors(folder / "model.safetensors", shapes)

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "broken_checkpoint")


def test_a_folder_that_is_not_there_is_not_found(face: Face):
    problem = refused(face, face.body(model=f"file://{face.roots}/nothing"))

    assert (problem["status"], problem["code"]) == (422, "model_not_found")


@pytest.mark.parametrize("spelling", ["{roots}/../outside", "{roots}/mixtral/../../outside", "{outside}", "/etc", "{roots}/link"])
def test_a_path_outside_the_roots_is_not_allowed(face: Face, tmp_path: Path, spelling: str):
    outside = write_mixtral(tmp_path / "outside")
    (face.roots / "link").symlink_to(outside)

    problem = refused(face, face.body(model=f"file://{spelling.format(roots=face.roots, outside=outside)}"))

    assert (problem["status"], problem["code"]) == (422, "source_not_allowed")
    assert pointers(problem) == ["/model"]


def test_weights_that_are_a_link_out_of_the_roots_are_not_allowed(face: Face, tmp_path: Path):
    outside = write_mixtral(tmp_path / "outside")
    folder = write_mixtral(face.roots / "linked")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")

    problem = refused(face, face.body(model=f"file://{folder}"))

    assert (problem["status"], problem["code"]) == (422, "source_not_allowed")


@pytest.mark.parametrize("field", ["calibration", "evaluation"])
def test_text_outside_the_roots_is_not_allowed(face: Face, tmp_path: Path, field: str):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    source = {"source": f"file://{secret}"}
    members = {"calibration": source} if field == "calibration" else {"evaluation": {"perplexity": source}}

    problem = refused(face, face.body(**members))

    assert (problem["status"], problem["code"]) == (422, "source_not_allowed")
    assert "secret.txt" in problem["detail"]


def test_fewer_experts_than_a_token_uses_are_impossible(face: Face):
    problem = refused(face, face.body(recipe={"steps": [{"step": "expert_drop", "experts_kept": 1}]}))

    assert (problem["status"], problem["code"]) == (422, "impossible_step")
    assert pointers(problem) == ["/recipe/steps/0/experts_kept"]


def test_a_target_below_the_smallest_possible_says_what_is_possible(face: Face):
    problem = refused(face, face.body(target_memory=1000))

    assert (problem["status"], problem["code"]) == (422, "target_unreachable")
    assert problem["smallest_possible_bytes"] > 1000


def test_a_recipe_above_the_target_says_what_it_leaves(face: Face):
    smallest = refused(face, face.body(target_memory=1000))["smallest_possible_bytes"]

    problem = refused(face, face.body(target_memory=smallest))

    assert (problem["status"], problem["code"]) == (422, "recipe_exceeds_target")
    assert problem["bytes_after"] > smallest


def test_a_group_that_does_not_divide_is_not_loadable(face: Face):
    serving = {"tensor_parallel": 4}
    problem = refused(face, face.body(recipe={"steps": [QUANTIZE | {"group_size": 128}]}, serving=serving))

    assert (problem["status"], problem["code"]) == (422, "not_loadable_in_profile")
    assert pointers(problem) == ["/recipe/steps/0/group_size"]
