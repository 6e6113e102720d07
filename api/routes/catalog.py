"""What is supported, read off the code's own tables."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.contract import problems
from api.dependencies import AnyCaller
from api.headers import require_accept
from api.schemas import ArchitectureList, ArchitectureView, StepList, StepView
from api.views import as_json
from compression.architectures import ARCHITECTURES, Architecture
from compression.planner.availability import available_steps

router = APIRouter(tags=["catalog"])


@router.get("/v1/steps", response_model=StepList, responses=problems(401, 429))
def list_steps(request: Request, caller: AnyCaller) -> Response:
    """List every step of the contract with its settings, paper and evidence; ``available`` says what is built."""
    require_accept(request.headers, "application/json")
    return as_json(StepList(data=[StepView.model_validate(step) for step in available_steps()]))


@router.get("/v1/architectures", response_model=ArchitectureList, responses=problems(401, 429))
def list_architectures(request: Request, caller: AnyCaller) -> Response:
    """List the model types that can be compressed."""
    require_accept(request.headers, "application/json")
    return as_json(ArchitectureList(data=[_architecture_view(row) for row in ARCHITECTURES.values()]))


def _architecture_view(row: Architecture) -> ArchitectureView:
    return ArchitectureView(
        model_type=row.model_type,
        expert_count_keys=list(row.expert_count_keys),
        shared_experts=bool(row.shared_experts or row.shared_beside),
        group_limited_routing=row.group_keys is not None,
        latent_attention=row.latent_attention,
        fused_experts=row.fused_on_disk,
        quantize=not row.fused_on_disk and "quantize" not in row.refuses,
        refuses={str(part): reason for part, reason in row.refuses.items()},
    )
