"""What the process counts. Labels name kinds of work, never a tenant, a key or a text."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

REQUESTS = Counter("assay_requests", "Requests answered.", ["route", "status"])
SECONDS = Histogram(
    "assay_request_seconds",
    "Time to answer a request.",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0),
)
DETECTIONS = Counter("assay_detections", "Texts tested.")
TOKENS = Counter("assay_tokens", "Tokens of tested texts.")
