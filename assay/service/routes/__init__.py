"""The routes, one file per resource."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.routing import APIRoute

from assay.service.routes import audit, completions, detect, health, jobs, keys, pages, reports, telemetry

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    keys.router,
    detect.router,
    jobs.router,
    audit.router,
    completions.router,
    reports.router,
    telemetry.router,
    pages.router,
)

STREAMED = frozenset({"/v1/detect/stream", "/v1/jobs"})
"""Paths whose bodies are read piece by piece and limited by their routes."""


def accepted() -> list[APIRoute]:
    """The routes that do something; one that a described resource hides only says which method would."""
    every = [(router, route) for router in ROUTERS for route in router.routes]
    return [r for router, r in every if isinstance(r, APIRoute) and r.include_in_schema == router.include_in_schema]
