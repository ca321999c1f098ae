"""The application: state, routes and middleware put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from assay import __version__
from assay.kernels import prf
from assay.service import errors
from assay.service.envelope import MasterKey
from assay.service.limits import BodyLimit
from assay.service.observe import Observed
from assay.service.routes import ROUTERS, STREAMED, accepted
from assay.service.settings import Settings
from assay.service.state import open_state


def create_app(settings: Settings | None = None, *, master: MasterKey | None = None) -> FastAPI:
    """The service as an ASGI application.

    Parameters
    ----------
    settings
        How it runs; None takes them from the environment, as a server process of `assay serve` does.
    master
        See `open_state`.
    """
    settings = settings or Settings.from_environment()
    state = open_state(settings, master=master)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(prf.load_compiled)
        yield
        generator = getattr(app.state, "generator", None)
        if generator is not None:  # made with the first completion
            generator.close()
        state.guard.close()
        state.engine.dispose()

    app = FastAPI(
        title="Assay",
        version=__version__,
        description="Tests where text came from, and says how sure it is.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.assay = state

    errors.install(app, accepted())
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, exempt=STREAMED)
    app.add_middleware(Observed)
    return app
