"""The routes, one file per resource."""

from __future__ import annotations

from fastapi import APIRouter

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
