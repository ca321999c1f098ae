"""Sessions of the web page: a random token in a cookie, a file named by its hash; the API key itself is in neither.

The folder is that of the service's data, which all server processes share. A session ends at logout, after eight hours,
or when its API key is revoked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy.orm import sessionmaker

from assay.service.auth import Caller
from assay.service.database import ApiKey

SECONDS: Final = 8 * 3600
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


class WebSessions:
    """Who is logged in.

    Parameters
    ----------
    folder
        Where the files are; made with mode 0700.
    sessions
        Of the database, for the API keys.
    """

    def __init__(self, folder: Path, sessions: sessionmaker[Any]) -> None:
        self._folder = folder
        self._sessions = sessions

    def begin(self, caller: Caller) -> str:
        """A new session; the token for its cookie. Sessions that ran out are removed."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = time.time()
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process was quicker
                if path.stat().st_mtime < now - SECONDS:
                    path.unlink()
        token = new_token()
        content = json.dumps({"api_key_id": caller.api_key_id, "until": now + SECONDS})
        handle = os.open(self._path(token), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(content)
        return token

    def caller(self, token: str | None) -> Caller | None:
        """Who a token stands for; None if it is no live session, or its API key was revoked."""
        if not is_token(token):
            return None
        try:
            content = json.loads(self._path(str(token)).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        if content["until"] < time.time():
            return None
        with self._sessions() as session:
            row = session.get(ApiKey, content["api_key_id"])
        if row is None or row.revoked is not None:
            return None
        return Caller(row.tenant_id, row.id, frozenset(row.scopes.split()))

    def end(self, token: str | None) -> None:
        """Log out; nothing happens if the token is no session."""
        if is_token(token):
            self._path(str(token)).unlink(missing_ok=True)

    def _path(self, token: str) -> Path:
        return self._folder / hashlib.sha256(b"assay-session/1 " + token.encode()).hexdigest()


def new_token() -> str:
    """256 random bits, for a cookie."""
    return secrets.token_urlsafe(32)


def is_token(token: str | None) -> bool:
    """Whether a cookie's value has the form of a token."""
    return _TOKEN.fullmatch(token or "") is not None


def form_token(cookie_token: str) -> str:
    """What a form must send beside the cookie: another site can make a browser send the cookie, but not know this."""
    return hashlib.sha256(b"assay-form/1 " + cookie_token.encode()).hexdigest()
