from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from compression import errors
from compression.errors import (
    BrokenCheckpoint,
    DiskFull,
    DownloadFailed,
    RequestError,
    RunError,
    SlimtrimError,
    SourceUnavailable,
    Stopped,
    TargetUnreachable,
)

REFUSALS = {
    "validation_failed", "model_not_found", "unsupported_architecture", "not_a_moe", "unsafe_checkpoint", "broken_checkpoint",
    "remote_code_required", "target_unreachable", "recipe_exceeds_target", "not_loadable_in_profile", "impossible_step",
    "not_available", "quantized_source", "source_not_allowed", "source_unavailable",
}  # fmt: skip
FAILURES = {
    "gated_model", "download_failed", "out_of_gpu_memory", "out_of_host_memory", "disk_full", "constraint_violated",
    "non_finite_weights", "verification_failed", "evaluation_failed",
}  # fmt: skip


def tree(root: type[SlimtrimError]) -> Iterator[type[SlimtrimError]]:
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:  # other packages may hang their own branches on it
            yield child
            yield from tree(child)


def test_the_codes_are_those_of_the_contract_and_each_class_has_its_own():
    refusals = [error.code for error in tree(RequestError)]
    failures = [error.code for error in tree(RunError)]

    assert sorted(refusals) == sorted(REFUSALS)
    assert sorted(failures) == sorted(FAILURES)
    assert not REFUSALS & FAILURES


def test_trying_again_helps_only_where_the_world_may_have_changed():
    assert {error for error in tree(SlimtrimError) if error.retryable} == {SourceUnavailable, DownloadFailed, DiskFull}


def test_every_class_is_drawn_in_the_tree_at_the_top():
    assert errors.__doc__ is not None
    for error in tree(SlimtrimError):
        assert error.__name__ in errors.__doc__


def test_an_error_carries_its_message_its_place_and_what_the_caller_needs():
    error = TargetUnreachable("too small", pointer="/target_memory", smallest_possible_bytes=7)

    assert str(error) == error.message == "too small"
    assert error.pointer == "/target_memory"
    assert error.details == {"smallest_possible_bytes": 7}
    assert BrokenCheckpoint("torn").pointer is None


def test_one_except_catches_everything_that_the_library_raises():
    for error in tree(SlimtrimError):
        with pytest.raises(SlimtrimError):
            raise error("said why")


def test_being_stopped_is_neither_a_refusal_nor_a_failure():
    assert not issubclass(Stopped, RequestError | RunError)


def test_an_error_survives_the_way_from_one_process_to_another():
    error = TargetUnreachable("too small", pointer="/target_memory", smallest_possible_bytes=7)

    copy = pickle.loads(pickle.dumps(error))

    assert (copy.message, copy.pointer, copy.details) == (error.message, error.pointer, error.details)
