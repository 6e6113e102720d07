"""The error tree. Every error names its code, and whether trying again can help.

    SlimtrimError
    ├── RequestError            the caller's turn: the request can never succeed as it stands
    │   ├── ValidationFailed, ImpossibleStep, NotAvailable, NotLoadableInProfile
    │   ├── TargetUnreachable, RecipeExceedsTarget
    │   ├── SourceNotAllowed, ModelNotFound, SourceUnavailable (the network's turn)
    │   └── UnsupportedArchitecture, NotAMoE, UnsafeCheckpoint, BrokenCheckpoint,
    │       RemoteCodeRequired, QuantizedSource
    ├── RunError                the machine's or the weights' turn: found while a job runs
    │   ├── GatedModel, DownloadFailed, OutOfGpuMemory, OutOfHostMemory, DiskFull
    │   └── ConstraintViolated, EvaluationFailed, NonFiniteWeights, VerificationFailed
    └── Stopped                 not an error: the run was asked to stop and did

``code`` is what programs switch on and never changes; the message names the value and the way out.
"""

from __future__ import annotations

from typing import Any


class SlimtrimError(Exception):
    """The root. ``details`` are extra members for the caller, such as ``smallest_possible_bytes``."""

    code: str = "internal"
    retryable: bool = False

    def __init__(self, message: str, **details: Any) -> None:
        message = message.encode(errors="backslashreplace").decode()  # half a letter of a stranger's could not be sent
        super().__init__(message)
        self.message = message
        self.details = details


class RequestError(SlimtrimError):
    """The request can never succeed as it stands."""

    code = "validation_failed"

    def __init__(self, message: str, *, pointer: str | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.pointer = pointer
        """JSON pointer to the value at fault, when there is one."""


class ValidationFailed(RequestError):
    """A value of the request is not what the contract allows."""


class ImpossibleStep(RequestError):
    """The recipe asks for a model that no checkpoint can describe."""

    code = "impossible_step"


class NotAvailable(RequestError):
    """Known to the contract, not built yet. Refused, never ignored."""

    code = "not_available"


class NotLoadableInProfile(RequestError):
    """The artifact would not open in the engines that its profile promises."""

    code = "not_loadable_in_profile"


class TargetUnreachable(RequestError):
    """No plan is that small; ``smallest_possible_bytes`` says what is."""

    code = "target_unreachable"


class RecipeExceedsTarget(RequestError):
    """The recipe leaves more than the target; ``bytes_after`` says how much."""

    code = "recipe_exceeds_target"


class SourceNotAllowed(RequestError):
    """The source lies outside what this installation may read."""

    code = "source_not_allowed"


class ModelNotFound(RequestError):
    """There is no such model at that source."""

    code = "model_not_found"


class SourceUnavailable(RequestError):
    """The source did not answer; it may later."""

    code = "source_unavailable"
    retryable = True


class UnsupportedArchitecture(RequestError):
    """The ``model_type`` has no row in ``architectures/``."""

    code = "unsupported_architecture"


class NotAMoE(RequestError):
    """The model has no routed experts."""

    code = "not_a_moe"


class UnsafeCheckpoint(RequestError):
    """Only pickled weights were found; unpickling runs code."""

    code = "unsafe_checkpoint"


class BrokenCheckpoint(RequestError):
    """A file is missing, truncated or contradicts itself."""

    code = "broken_checkpoint"


class RemoteCodeRequired(RequestError):
    """The model opens only with code of its own (``auto_map``); none is ever run."""

    code = "remote_code_required"


class QuantizedSource(RequestError):
    """The source's weights are quantized in a way that is not read."""

    code = "quantized_source"


class RunError(SlimtrimError):
    """Something went wrong while a job ran."""


class GatedModel(RunError):
    """The hub asks for a licence click or a token that this installation lacks."""

    code = "gated_model"


class DownloadFailed(RunError):
    """A file could not be fetched whole."""

    code = "download_failed"
    retryable = True


class OutOfGpuMemory(RunError):
    """The accelerator's memory did not suffice."""

    code = "out_of_gpu_memory"


class OutOfHostMemory(RunError):
    """The machine's memory did not suffice."""

    code = "out_of_host_memory"


class DiskFull(RunError):
    """A disk has no room for what must be written."""

    code = "disk_full"
    retryable = True


class ConstraintViolated(RunError):
    """The artifact is worse than ``constraints`` allow."""

    code = "constraint_violated"


class EvaluationFailed(RunError):
    """Something beside perplexity was to be measured, and the measuring failed."""

    code = "evaluation_failed"


class NonFiniteWeights(RunError):
    """A weight or an activation is NaN or infinite; the message names the tensor."""

    code = "non_finite_weights"


class VerificationFailed(RunError):
    """The artifact does not open, or is not the model that was computed."""

    code = "verification_failed"


class Stopped(SlimtrimError):
    """The run was asked to stop and did so at a block's end."""

    code = "stopped"
