"""Metrics for Prometheus. Needs a key with ``metrics:read`` where there are keys: the figures tell how busy the owner is."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from api.contract import problems
from api.dependencies import MetricsReader, Running

router = APIRouter(tags=["health"])
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", response_class=Response, responses={200: {"content": {_TEXT: {}}}, **problems(401, 403)})
def metrics(caller: MetricsReader, service: Running) -> Response:
    """Tell jobs, queues, attempts, workers and this process's requests in Prometheus' text format."""
    return Response(service.metrics.as_text(), media_type=_TEXT)
