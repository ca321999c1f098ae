"""API keys and scopes. A key is `assay_<id>_<secret>`: 256 random bits of secret, of which only the hash is stored.

A random secret of 256 bits needs no slow hash: guessing it is out of reach, and SHA-256 keeps requests quick.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from assay.service.database import ApiKey, Tenant

Scope = Literal["detect", "embed", "keys", "admin"]
SCOPES: Final[tuple[str, ...]] = get_args(Scope)
_TOKEN = re.compile(r"assay_([a-z2-7]{16})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CACHE_SECONDS = 5.0  # a revoked key may work for so long in another server process


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes
    ----------
    tenant, api_key_id
        Ids.
    scopes
        What the key may do; "admin" includes all others.
    """

    tenant: str
    api_key_id: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the caller has a scope."""
        return scope in self.scopes or "admin" in self.scopes


def create_api_key(
    sessions: sessionmaker[Any], tenant: str, scopes: Iterable[str], *, name: str = ""
) -> tuple[str, str]:
    """A new API key; the tenant is made if it is new.

    Returns
    -------
    id, token. The token is shown this once and cannot be read again.

    Raises
    ------
    ValueError
        On a tenant's name or scope that is not accepted.
    """
    wanted = frozenset(scopes)
    if not _NAME.fullmatch(tenant):
        raise ValueError(f"tenant must be 1-64 letters, digits, '.', '_' or '-', got {tenant!r}.")
    if not wanted or not wanted <= set(SCOPES):
        raise ValueError(f"scopes must be among {list(SCOPES)}, at least one, got {sorted(wanted)}.")
    id = base64.b32encode(secrets.token_bytes(10)).decode().lower()
    secret = secrets.token_urlsafe(32)
    now = datetime.now(UTC)
    with sessions.begin() as session:
        if session.get(Tenant, tenant) is None:
            session.add(Tenant(id=tenant, created=now))
            session.flush()
        stored = ApiKey(
            id=id,
            tenant_id=tenant,
            name=name[:200],
            secret_sha256=_hash(secret),
            scopes=" ".join(sorted(wanted)),
            created=now,
            revoked=None,
        )
        session.add(stored)
    return id, f"assay_{id}_{secret}"


def revoke_api_key(sessions: sessionmaker[Any], tenant: str, id: str) -> bool:
    """Revoke a key of a tenant; whether there was one. Other server processes notice within five seconds."""
    with sessions.begin() as session:
        found = session.scalar(select(ApiKey).where(ApiKey.id == id, ApiKey.tenant_id == tenant))
        if found is None:
            return False
        found.revoked = found.revoked or datetime.now(UTC)
        return True


class Authenticator:
    """Turns tokens into callers; keeps what it read for five seconds, so that a request costs no query."""

    def __init__(self, sessions: sessionmaker[Any]) -> None:
        self._sessions = sessions
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, bytes, Caller | None]] = {}

    def caller(self, token: str | None) -> Caller | None:
        """Who a token stands for; None if it is no valid key, without saying why."""
        match = _TOKEN.fullmatch(token or "")
        if match is None:
            return None
        id, secret = match.groups()
        stored, found = self._look_up(id)
        # Compared also where there is no such key, so that ids cannot be found out by timing.
        matches = hmac.compare_digest(stored, _hash(secret))
        return found if matches else None

    def knows(self, token: str | None) -> bool:
        """Whether `caller` will answer without a query."""
        match = _TOKEN.fullmatch(token or "")
        if match is None:
            return True
        return self._is_fresh(match.group(1))

    async def still(self, caller: Caller) -> bool:
        """Whether a caller's API key is in force, for what goes on long after `caller` has said so."""
        id = caller.api_key_id
        _, found = self._look_up(id) if self._is_fresh(id) else await asyncio.to_thread(self._look_up, id)
        return found == caller

    def forget(self) -> None:
        """Read every key anew; after a change in this process."""
        with self._lock:
            self._known.clear()

    def _is_fresh(self, id: str) -> bool:
        with self._lock:
            known = self._known.get(id)
        # A little earlier than it is forgotten: the database would be asked on the caller's thread.
        return known is not None and known[0] > time.monotonic() + 0.1

    def _look_up(self, id: str) -> tuple[bytes, Caller | None]:
        now = time.monotonic()
        with self._lock:
            known = self._known.get(id)
            if known is not None and known[0] > now:
                return known[1:]
        with self._sessions() as session:
            row = session.get(ApiKey, id)
        stored, found = bytes(32), None
        if row is not None and row.revoked is None:
            stored, found = row.secret_sha256, Caller(row.tenant_id, row.id, frozenset(row.scopes.split()))
        with self._lock:
            if len(self._known) > 10_000:  # guesses fill it: start anew
                self._known.clear()
            self._known[id] = (now + _CACHE_SECONDS, stored, found)
        return stored, found


def _hash(secret: str) -> bytes:
    return hashlib.sha256(b"assay-api-key/1 " + secret.encode()).digest()
