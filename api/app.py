"""The application: settings in, routes out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api.contract import install_contract
from api.dashboard import doors, forms, pages
from api.dashboard.trouble import install_pages_for_errors
from api.errors import install_error_handlers
from api.middleware import Manners
from api.routes import artifacts, catalog, events, health, jobs, metrics, plans, queues, reports
from api.service import open_service
from api.submission import code_version
from api.watching import Watching
from jobs.database import Announce
from jobs.settings import Settings
from jobs.traces import tracing


def create_app(settings: Settings, announce: Announce | None = None) -> FastAPI:
    """Return the application on these settings; the schema must be there (``jobs.database.migrate``).

    ``announce`` replaces the queue, for tests.
    """
    service = open_service(settings, announce)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        # Tracing here and not around the server, which ends by the signal that it was sent once everybody is answered.
        with tracing("api"):
            async with service.streams.running():
                yield
        service.close()

    app = FastAPI(
        title="slimtrim",
        summary="Makes Mixture-of-Experts language models fit the memory people have.",
        version=code_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        # Its own spans hold queries, in which links carry their signatures, and the texts of exceptions. Ours: api/watching.py.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    install_error_handlers(app)
    install_pages_for_errors(app)
    for router in (
        jobs.router, events.router, reports.router, artifacts.router, plans.router, queues.router, catalog.router, health.router,
        metrics.router, pages.router, forms.router, doors.router,
    ):  # fmt: skip
        app.include_router(router)
    install_contract(app)
    app.add_middleware(Manners, callers=service.callers)
    app.add_middleware(Watching, metrics=service.metrics)  # outermost: it sees what Manners refuses
    return app
