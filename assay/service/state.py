"""What routes and job workers share: settings, database, keys and limits, opened together; nothing is global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from assay.detection.text import LoadedTokenizer, load_tokenizer
from assay.service.accounts import OracleGuard
from assay.service.auth import Authenticator
from assay.service.database import open_engine, sessions
from assay.service.envelope import LocalMasterKey, MasterKey
from assay.service.keystore import KeyStore
from assay.service.limits import RateLimiter
from assay.service.migrate import upgrade
from assay.service.settings import Settings


@dataclass(frozen=True)
class State:
    """What the routes share; `request.app.state.assay`.

    Attributes
    ----------
    settings, engine, sessions
        Settings and database.
    authenticator, keys, rates, guard
        Who calls, their keys, and their limits.
    tokenizer
        Of the model whose marks are looked for.
    """

    settings: Settings
    engine: Engine
    sessions: sessionmaker[Any]
    authenticator: Authenticator
    keys: KeyStore
    rates: RateLimiter
    guard: OracleGuard
    tokenizer: LoadedTokenizer


def open_database(settings: Settings) -> tuple[Engine, sessionmaker[Any]]:
    """The database alone, brought up to date: what needs no key."""
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = open_engine(settings.url)
    upgrade(engine)
    return engine, sessions(engine)


def open_state(settings: Settings, *, master: MasterKey | None = None) -> State:
    """Database, keys and limits; the database is brought up to date first.

    Parameters
    ----------
    settings
        How the service runs.
    master
        Opens the stored keys; None takes ASSAY_MASTER_KEY, else the file `master.key` in the data folder, which is made
        if it is missing.

    Raises
    ------
    KeyringError
        If the master key cannot be used.
    """
    engine, made = open_database(settings)
    if master is None:
        master = LocalMasterKey.from_environment()
    if master is None:
        master = LocalMasterKey.from_file(settings.data / "master.key", create=True)
    return State(
        settings=settings,
        engine=engine,
        sessions=made,
        authenticator=Authenticator(made),
        keys=KeyStore(made, master),
        rates=RateLimiter(settings.requests_per_second, settings.burst),
        guard=OracleGuard(engine, settings.detections_per_key_per_day),
        tokenizer=load_tokenizer(settings.model),
    )
