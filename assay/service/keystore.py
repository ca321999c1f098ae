"""A tenant's watermark and signing keys in the database, secrets under envelope encryption."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from assay._errors import KeyringError, RevokedKeyError, UnknownKeyError
from assay.service import audit
from assay.service.auth import Caller
from assay.service.database import WatermarkKey
from assay.service.envelope import MasterKey, seal, unseal
from assay.watermark.keys import KeyInfo, SecretKey
from assay.watermark.schemes import SchemeConfig

_CACHE_SECONDS = 5.0  # a key revoked in another server process may be used for so long


class KeyStore:
    """Keys by tenant and id.

    Parameters
    ----------
    sessions
        Of the database.
    master
        Opens the secrets.
    """

    def __init__(self, sessions: sessionmaker[Any], master: MasterKey) -> None:
        self._sessions = sessions
        self._master = master
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[float, SecretKey]] = {}
        self._usable: dict[str, tuple[float, tuple[SecretKey, ...]]] = {}

    def create(
        self, tenant: str, config: SchemeConfig, id: str | None = None, *, caller: Caller | None = None
    ) -> KeyInfo:
        """A new key; with a caller, the change and its entry in the audit log are one transaction.

        Raises
        ------
        KeyringError
            If the tenant has a key of that id.
        ValueError
            If the id is not accepted.
        """
        key = SecretKey.generate(id, config)
        try:
            with self._sessions.begin() as session:
                session.add(self._sealed(tenant, key))
                if caller is not None:
                    session.add(audit.event(caller, "keys.create", key.id, scheme=config.tag))
        except IntegrityError:
            raise KeyringError(f"id must be free, {key.id!r} is taken. Choose another, or leave it out.") from None
        self._forget(tenant, key.id)
        return key.info

    def infos(self, tenant: str) -> list[KeyInfo]:
        """What is public about the tenant's keys, oldest first."""
        with self._sessions() as session:
            rows = session.scalars(select(WatermarkKey).where(WatermarkKey.tenant_id == tenant)).all()
        found = [KeyInfo.from_dict(row.info) for row in rows]
        return sorted(found, key=lambda info: (info.created, info.id))

    def key(self, tenant: str, id: str) -> SecretKey:
        """A key in any state.

        Raises
        ------
        UnknownKeyError
            If the tenant has none of that id.
        KeyringError
            If its secret does not open.
        """
        now = time.monotonic()
        with self._lock:
            known = self._known.get((tenant, id))
            if known is not None and known[0] > now:
                return known[1]
        with self._sessions() as session:
            row = _row(session, tenant, id)
            found = self._opened(row)
        with self._lock:
            self._known[tenant, id] = (now + _CACHE_SECONDS, found)
        return found

    def for_detection(self, tenant: str) -> list[SecretKey]:
        """The tenant's active and retired watermark keys."""
        now = time.monotonic()
        with self._lock:
            known = self._usable.get(tenant)
        if known is not None and known[0] > now:
            return list(known[1])
        usable = [i.id for i in self.infos(tenant) if i.state != "revoked" and i.config.purpose == "watermark"]
        found = [self.key(tenant, id) for id in usable]
        with self._lock:
            self._usable[tenant] = (now + _CACHE_SECONDS, tuple(found))
        return found

    def knows(self, tenant: str, ids: Sequence[str] | None) -> bool:
        """Whether these keys, or with None those `for_detection`, will be found without a query."""
        soon = time.monotonic() + 0.1
        with self._lock:
            known = [self._usable.get(tenant)] if ids is None else [self._known.get((tenant, id)) for id in ids]
        return all(one is not None and one[0] > soon for one in known)

    def rotate(self, tenant: str, id: str, *, caller: Caller | None = None) -> KeyInfo:
        """Retire an active key and make its successor with the same settings.

        Raises
        ------
        UnknownKeyError, RevokedKeyError
            If there is no such key, or it is not active.
        """
        at = datetime.now(UTC).replace(microsecond=0)
        with self._sessions.begin() as session:
            row = _row(session, tenant, id, lock=True)
            key = self._opened(row)
            if key.state != "active":
                raise RevokedKeyError(f"key {id!r} is {key.state}: only an active key can be rotated.")
            row.info = key.with_state("retired", at).info.to_dict()
            successor = SecretKey.generate(f"{id[:50]}-{secrets.token_hex(3)}", key.config)
            session.add(self._sealed(tenant, successor))
            if caller is not None:
                session.add(audit.event(caller, "keys.rotate", id, successor=successor.id))
        self._forget(tenant, id)
        return successor.info

    def revoke(self, tenant: str, id: str, *, caller: Caller | None = None) -> KeyInfo:
        """Revoke a key whose secret others may know; revoking it again changes nothing.

        Raises
        ------
        UnknownKeyError
            If there is no such key.
        """
        at = datetime.now(UTC).replace(microsecond=0)
        with self._sessions.begin() as session:
            row = _row(session, tenant, id, lock=True)
            key = self._opened(row)
            if key.state != "revoked":
                key = key.with_state("revoked", at)
                row.info = key.info.to_dict()
            if caller is not None:
                session.add(audit.event(caller, "keys.revoke", id))
        self._forget(tenant, id)
        return key.info

    def _forget(self, tenant: str, id: str) -> None:
        with self._lock:
            self._known.pop((tenant, id), None)
            self._usable.pop(tenant, None)

    def _sealed(self, tenant: str, key: SecretKey) -> WatermarkKey:
        wrapped, sealed = seal(self._master, key._secret, tenant=tenant, key_id=key.id)
        return WatermarkKey(
            tenant_id=tenant,
            id=key.id,
            info=key.info.to_dict(),
            wrapped_data_key=wrapped,
            sealed_secret=sealed,
            master_key_id=self._master.id,
        )

    def _opened(self, row: WatermarkKey) -> SecretKey:
        info = KeyInfo.from_dict(row.info)
        key = SecretKey(
            unseal(self._master, row.wrapped_data_key, row.sealed_secret, tenant=row.tenant_id, key_id=row.id),
            id=row.id,
            config=info.config,
            state=info.state,
            created=info.created,
            retired=info.retired,
            revoked=info.revoked,
        )
        if key.info.fingerprint != info.fingerprint:
            raise KeyringError(f"key {row.id!r} does not match its description: the database was changed.")
        return key


def _row(session: Session, tenant: str, id: str, *, lock: bool = False) -> WatermarkKey:
    query = select(WatermarkKey).where(WatermarkKey.tenant_id == tenant, WatermarkKey.id == id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise UnknownKeyError(f"there is no key {id!r}. List the keys to see their ids.")
    return row
