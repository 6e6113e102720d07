"""Whether the process lives, and whether it can do its work. Neither asks a worker or a device anything."""

from __future__ import annotations

import shutil

from fastapi import APIRouter
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from api.contract import problems
from api.dependencies import Running
from api.errors import Problem
from api.schemas import Check, Health
from api.service import Service
from api.views import as_json
from compression.errors import SlimtrimError
from jobs.database import schema_is_current

router = APIRouter(tags=["health"])


@router.get("/livez", response_model=Health)
def livez() -> Response:
    """Say that the process answers; nothing else is looked at."""
    return as_json(Health(status="alive"))


@router.get("/readyz", response_model=Health, responses=problems(503))
def readyz(service: Running) -> Response:
    """Say whether jobs can be accepted. Database, schema, storage and disk must work; a silent broker only delays jobs."""
    checks = service.readiness.ask(
        {
            "database": lambda: _database(service),
            "schema": lambda: _schema(service),
            "storage": lambda: _storage(service),
            "disk": lambda: _disk(service),
            "broker": lambda: _broker(service),
        }
    )
    if service.draining.is_set():
        raise Problem("draining", "the service is stopping")
    failed = [f"{name}: {check.detail}" for name, check in checks.items() if check.required and not check.ok]
    if failed:
        raise Problem("unavailable", "; ".join(failed), checks={name: check.model_dump() for name, check in checks.items()})
    return as_json(Health(status="ready", checks=checks))


def _database(service: Service) -> Check:
    """Take the writer's lock and give it back: a database that can be read but not written cannot accept a job."""
    try:
        with service.open_session() as session:
            session.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        return Check(ok=False, required=True, detail=f"does not accept writes ({type(error).__name__})")
    return Check(ok=True, required=True, detail="accepts writes")


def _schema(service: Service) -> Check:
    try:
        with service.engine.connect() as connection:
            current = schema_is_current(connection)
    except SQLAlchemyError as error:
        return Check(ok=False, required=True, detail=f"cannot be read ({type(error).__name__})")
    return Check(ok=current, required=True, detail="is current" if current else "is not the one this version needs; migrate")


def _storage(service: Service) -> Check:
    try:
        service.storage.check()
    except SlimtrimError as error:
        return Check(ok=False, required=True, detail=error.message)
    return Check(ok=True, required=True, detail="takes and gives back")


def _disk(service: Service) -> Check:
    free, floor = shutil.disk_usage(service.settings.data_dir).free, service.settings.min_free_bytes
    return Check(ok=free >= floor, required=True, detail=f"{free} bytes are free; {floor} must stay free")


def _broker(service: Service) -> Check:
    waiting = service.announcer.pending()
    if waiting is None:
        return Check(ok=False, required=False, detail="does not answer; jobs wait until the maintenance loop announces them")
    return Check(ok=True, required=False, detail=f"{sum(waiting.values())} announcements wait to be heard")
