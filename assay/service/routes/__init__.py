"""The routes, one file per resource."""

from __future__ import annotations

from fastapi import APIRouter

from assay.service.routes import detect, health, keys

ROUTERS: tuple[APIRouter, ...] = (health.router, keys.router, detect.router)

STREAMED = frozenset({"/v1/detect/stream"})
"""Paths whose bodies are read piece by piece and limited by their routes."""
