"""Settings of the service: frozen, from arguments or from environment variables ASSAY_*; secrets are not among them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a service runs.

    Attributes
    ----------
    data
        Folder for the database, uploads and runs; made with mode 0700 if it is missing.
    database_url
        SQLAlchemy URL; None is SQLite in `data`. For PostgreSQL "postgresql+psycopg://...".
    model
        The model of completions: a folder, a hub id, "default" for the bundled one, or None for none.
    max_body_bytes
        Larger request bodies are refused with 413.
    max_upload_bytes
        Largest corpus of a job.
    max_text_characters
        Longest text of one detection.
    max_batch
        Most texts in one batch.
    requests_per_second, burst
        Rate limit of each API key, in each server process.
    detections_per_key_per_day
        Oracle guard: how often one API key with the scope "detect" alone may test one watermark key in a day (UTC).
        At most 1e9. Unlimited queries would let an attacker strip or forge a mark.
    lease_seconds
        How long a job stays with a worker that gives no sign of life.
    job_workers
        Processes that work on jobs; 0 for a server that only accepts them.
    """

    data: Path = field(default_factory=lambda: Path("assay-data"))
    database_url: str | None = None
    model: str | None = "default"
    max_body_bytes: int = 8 * 2**20
    max_upload_bytes: int = 2**30
    max_text_characters: int = 1_000_000
    max_batch: int = 256
    requests_per_second: float = 1000.0
    burst: int = 2000
    detections_per_key_per_day: int = 10_000
    lease_seconds: float = 30.0
    job_workers: int = 1

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.detections_per_key_per_day > 10**9:
            raise ValueError(f"detections_per_key_per_day must be at most 1e9, got {self.detections_per_key_per_day}.")
        for name in ("requests_per_second", "lease_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.job_workers < 0:
            raise ValueError(f"job_workers must be at least 0, got {self.job_workers}.")

    @property
    def url(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{(self.data / 'assay.db').resolve()}"

    @classmethod
    def from_environment(cls, **given: Any) -> Settings:
        """Settings from ASSAY_DATA, ASSAY_DATABASE_URL and so on; what is given and not None goes first.

        Raises
        ------
        ValueError
            If a variable is not of its setting's kind, or out of range.
        """
        values: dict[str, Any] = {}
        for one in fields(cls):
            text = os.environ.get(f"ASSAY_{one.name.upper()}")
            if text is not None:
                try:
                    values[one.name] = _KINDS.get(one.name, str)(text)
                except ValueError:
                    raise ValueError(f"ASSAY_{one.name.upper()} must be a number, got {text!r}.") from None
        return cls(**values | {name: value for name, value in given.items() if value is not None})

    def __repr__(self) -> str:
        # A database URL may hold a password.
        shown = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "database_url"}
        kind = self.url.split(":", 1)[0]
        return f"Settings({', '.join(f'{k}={v!r}' for k, v in shown.items())}, database={kind!r})"


_POSITIVE = (
    "max_body_bytes",
    "max_upload_bytes",
    "max_text_characters",
    "max_batch",
    "burst",
    "detections_per_key_per_day",
)
_KINDS: dict[str, Any] = {
    "data": Path,
    "requests_per_second": float,
    "lease_seconds": float,
    **dict.fromkeys((*_POSITIVE, "job_workers"), int),
}
