"""/v1/keys: make, list, rotate and revoke keys. Secrets never leave the service; what is told is public."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field

from assay.service.access import KeepsKeys, Shared
from assay.service.bodies import KEY_ID, described, json_body
from assay.service.errors import responses
from assay.watermark.keys import KeyInfo
from assay.watermark.schemes import config_from, newest

router = APIRouter(prefix="/v1/keys", tags=["keys"], responses=responses(404, 409))

KeyInPath = Annotated[str, InPath(pattern=KEY_ID, description="Id of a key.")]

ParameterName = Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ParameterValue = bool | int | Finite | Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")]


class NewKey(BaseModel):
    """What to make."""

    model_config = ConfigDict(extra="forbid")
    id: Annotated[str | None, Field(pattern=KEY_ID, description="Default: a random id.")] = None
    scheme: Annotated[str, Field(max_length=64, description='Such as "gumbel"; "ed25519" signs reports.')] = "gumbel"
    parameters: Annotated[dict[ParameterName, ParameterValue], Field(max_length=32)] = {}


class Key(BaseModel):
    """What is public about a key."""

    id: str
    scheme: str
    version: int
    parameters: dict[str, Any]
    fingerprint: str
    state: str
    created: datetime
    retired: datetime | None
    revoked: datetime | None

    @classmethod
    def of(cls, info: KeyInfo) -> Key:
        """From the key's description."""
        return cls(**info.to_dict())


class Keys(BaseModel):
    """All keys of the tenant, oldest first."""

    keys: list[Key]


@router.post("", status_code=201, openapi_extra=described(NewKey))
def create(shared: Shared, caller: KeepsKeys, wanted: Annotated[NewKey, Depends(json_body(NewKey))]) -> Key:
    """Make a key."""
    config = config_from(wanted.scheme, newest(wanted.scheme).version, wanted.parameters)
    return Key.of(shared.keys.create(caller.tenant, config, wanted.id, caller=caller))


@router.get("")
def list_keys(shared: Shared, caller: KeepsKeys) -> Keys:
    """List the keys."""
    return Keys(keys=[Key.of(info) for info in shared.keys.infos(caller.tenant)])


@router.post("/{id}/rotate", status_code=201)
def rotate(shared: Shared, caller: KeepsKeys, id: KeyInPath) -> Key:
    """Retire a key and make its successor with the same settings; the old one still detects."""
    return Key.of(shared.keys.rotate(caller.tenant, id, caller=caller))


@router.post("/{id}/revoke")
def revoke(shared: Shared, caller: KeepsKeys, id: KeyInPath) -> Key:
    """Revoke a key whose secret others may know. Cannot be undone."""
    return Key.of(shared.keys.revoke(caller.tenant, id, caller=caller))
