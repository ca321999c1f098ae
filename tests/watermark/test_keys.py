"""Keys: what they accept, what they say, and that their secret stays inside."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta, timezone
from importlib import import_module
from typing import Any, ClassVar

import pytest
from rich.console import Console
from rich.traceback import Traceback

from assay._errors import RevokedKeyError
from assay.watermark.dual_gumbel import round_keys
from assay.watermark.gumbel import GumbelConfig, pivots, unmarked_key
from assay.watermark.keys import KeyInfo, SecretKey, use_key
from assay.watermark.schemes import SchemeConfig, config_from, known_schemes, newest, register, sampler_of
from assay.watermark.sequence import SequenceConfig, SequenceDecoder
from assay.watermark.signing import Ed25519Config, public_key, sign, verify

SECRET = bytes.fromhex("9b1e5c4d8f0a37e26d41c8b79350fa1e2c6b7d8897a4135f60e2cbd914f8a3b7")
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def forms(secret: bytes) -> list[str]:
    """The ways in which a secret would show, in full or by its first ten bytes."""
    import base64

    ints = [int(byte) for byte in secret]
    words = [int.from_bytes(secret[i : i + 4], "little") for i in range(0, 16, 4)]
    return [
        secret.hex()[:20],
        secret.hex().upper()[:20],
        base64.b64encode(secret).decode()[:12],
        repr(secret)[2:22],
        ", ".join(map(str, ints[:6])),
        " ".join(map(str, ints[:6])),
        ", ".join(map(str, words[:3])),
        secret.decode("latin-1")[:6],
    ]


def shown(secret: bytes, text: str) -> list[str]:
    return [form for form in forms(secret) if form in text]


def make(**changes: Any) -> SecretKey:
    return SecretKey(changes.pop("secret", SECRET), **{"id": "k1", "config": GumbelConfig(), "created": NOON} | changes)


def test_the_search_for_secrets_finds_them() -> None:
    import base64

    for text in (
        SECRET.hex(),
        repr(SECRET),
        str(list(SECRET)),
        base64.b64encode(SECRET).decode(),
        repr(bytearray(SECRET)),
    ):
        assert shown(SECRET, f"... {text} ...")


def test_generated_keys() -> None:
    one, other = SecretKey.generate(), SecretKey.generate()
    assert one.config == GumbelConfig()
    assert one.state == "active"
    assert one.id != other.id
    assert one.info.fingerprint != other.info.fingerprint
    assert one.info.created.tzinfo is UTC
    assert abs(datetime.now(UTC) - one.info.created) < timedelta(minutes=1)
    assert (use_key(one) != use_key(other)).any()


def test_fingerprint_is_of_the_secret_alone() -> None:
    assert make().info.fingerprint == make(id="other", config=Ed25519Config()).info.fingerprint
    assert make().info.fingerprint != make(secret=SECRET[:-1] + b"\0").info.fingerprint
    # Pinned: keyrings store it.
    assert make().info.fingerprint == "151384f43a0040d4ad786de145eaa7d8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secret": SECRET[:31]}, "secret must be 32 bytes, got 31 bytes"),
        ({"secret": SECRET.hex()}, "secret must be 32 bytes, got str"),
        ({"secret": bytearray(SECRET)}, "secret must be 32 bytes, got bytearray"),
        ({"id": ""}, "id must be"),
        ({"id": "a" * 65}, "id must be"),
        ({"id": "-a"}, "id must be"),
        ({"id": "a b"}, "id must be"),
        ({"id": "a\n"}, "id must be"),
        ({"id": "ä"}, "id must be"),
        ({"id": 7}, "id must be"),
        ({"state": "asleep"}, "state must be"),
        ({"config": {"window": 4}}, "config must be scheme settings"),
        ({"created": datetime(2026, 1, 1)}, "created must be a time with its zone"),
        ({"retired": "2026-01-01"}, "retired must be a time with its zone"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**changes)
    assert not shown(SECRET, str(caught.value))


def test_dates_are_kept_in_utc() -> None:
    east = timezone(timedelta(hours=9))
    key = make(created=datetime(2026, 11, 21, 21, tzinfo=east))
    assert key.info.created == NOON
    assert key.info.to_dict()["created"] == "2026-11-21T12:00:00+00:00"


def test_states() -> None:
    key = make()
    retired = key.with_state("retired", NOON + timedelta(days=1))
    revoked = retired.with_state("revoked", NOON + timedelta(days=2))
    assert (key.state, retired.state, revoked.state) == ("active", "retired", "revoked")
    assert revoked.info.retired == NOON + timedelta(days=1)
    assert revoked.info.revoked == NOON + timedelta(days=2)
    assert (use_key(key) == use_key(revoked)).all()
    assert len({key, retired}) == 2
    assert key == make()
    assert key != make(secret=SECRET[::-1])
    assert key != "k1"


def test_immutable() -> None:
    key = make()
    with pytest.raises(AttributeError, match="immutable"):
        key.info = None  # type: ignore[misc, assignment]
    with pytest.raises(AttributeError, match="immutable"):
        key._secret = bytes(32)


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize("config", [GumbelConfig(window=7), Ed25519Config()])
@pytest.mark.parametrize("state", ["active", "retired", "revoked"])
def test_info_round_trip(config: SchemeConfig, state: Any) -> None:
    key = make(config=config)
    if state != "active":
        key = key.with_state(state, NOON)
    text = json.dumps(key.info.to_dict())
    assert KeyInfo.from_dict(json.loads(text)) == key.info
    assert not shown(SECRET, text)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("id", None, "id must be"),
        ("scheme", "nope", r"scheme must be one of \[.*'ed25519/1'.*'gumbel/1'"),
        ("version", 99, "newer Assay"),
        ("version", True, "newer Assay"),
        ("parameters", {"window": 0}, "window must be"),
        ("parameters", {"width": 4}, r"parameters of 'gumbel/1' must be among \['window'\]"),
        ("parameters", [["window", 4]], "parameters of 'gumbel/1' must be"),
        ("fingerprint", "ab", "fingerprint must be 32"),
        ("fingerprint", "G" * 32, "fingerprint must be 32"),
        ("state", "Active", "state must be"),
        ("created", None, "created must be"),
        ("created", 7, "created must be an ISO 8601 time"),
        ("created", "2026-11-21", "created must be a time with its zone"),
        ("created", "0001-01-01T00:00:00+23:59", "created must be a time in the years 1 to 9999"),
        ("revoked", "9999-12-31T23:59:59-23:59", "revoked must be a time in the years 1 to 9999"),
        ("retired", "yesterday", "Invalid isoformat"),
    ],
)
def test_damaged_descriptions(entry: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyInfo.from_dict(make().info.to_dict() | {entry: value})


def test_misplaced_values_are_not_shown_and_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \['secret'\]") as caught:
        config_from("gumbel", 1, {"secret": SECRET.hex()})
    assert not shown(SECRET, str(caught.value))
    with pytest.raises(ValueError, match=r"parameters of 'hf-kgw/1' must include \['vocab_size'\]"):
        config_from("hf-kgw", 1, {})


def test_missing_entries() -> None:
    data = make().info.to_dict()
    del data["state"], data["created"]
    with pytest.raises(ValueError, match=r"\['created', 'state'\] are missing"):
        KeyInfo.from_dict(data)


# ---------------------------------------------------------------- the secret stays inside


def test_not_in_what_a_key_says(caplog: pytest.LogCaptureFixture) -> None:
    key = make()
    logging.getLogger("assay.test").warning("key %s %r %s", key, key, key.info)

    @dataclass
    class Holder:
        key: SecretKey

    console = Console(file=io.StringIO(), width=200)
    console.print(key, {"key": key}, Holder(key))
    texts = [repr(key), str(key), f"{key}", str([key]), repr(key.info), str(asdict(Holder(key)))]
    texts += [caplog.text, console.file.getvalue(), str(key.info.to_dict()), json.dumps(key, default=str)]  # type: ignore[attr-defined]
    for text in texts:
        assert "k1" in text
        assert not shown(SECRET, text)


def test_no_pickle_no_state() -> None:
    key = make()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="refuses to be pickled") as caught:
            pickle.dumps({"config": key}, protocol)
        assert not shown(SECRET, str(caught.value))
    for method in ("__reduce__", "__getstate__"):
        with pytest.raises(TypeError, match="refuses to be pickled"):
            getattr(key, method)()
    with pytest.raises(TypeError):
        vars(key)
    with pytest.raises(TypeError):
        json.dumps(key)
    # A copy of an immutable key is the key.
    assert copy.copy(key) is key
    assert copy.deepcopy([key])[0] is key


def test_what_holds_prf_keys_is_not_pickled_either() -> None:
    prf_key, unmarked = use_key(make()), unmarked_key(b"seed")
    holders: list[Any] = [round_keys(prf_key, unmarked), SequenceDecoder(prf_key, [b"a nonce of it"], SequenceConfig())]
    for config_class in map(newest, sorted({tag.split("/")[0] for tag in known_schemes()})):
        if hasattr(import_module(config_class.__module__), "sampler"):
            config = config_class(**{"vocab_size": 100} if config_class.scheme == "hf-kgw" else {})
            key = use_key(SecretKey(SECRET, id="k1", config=config))
            holders.append(sampler_of(config, key, unmarked))
    assert len(holders) == 15
    for holder in holders:
        assert not shown(prf_key.tobytes(), repr(holder))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            # Functions within functions have no name to be pickled by; classes refuse.
            with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
                pickle.dumps(holder, protocol)
    sampler = sampler_of(GumbelConfig(), prf_key, unmarked)
    assert copy.deepcopy(sampler) is sampler


def errors() -> list[Exception]:
    key, signer = make(), make(config=Ed25519Config(), id="s1")
    calls = [
        lambda: SecretKey(bytes.fromhex(SECRET.hex()), id="not an id", config=GumbelConfig()),
        lambda: SecretKey(bytes.fromhex(SECRET.hex()), id="a", config=GumbelConfig(), state="x"),  # type: ignore[arg-type]
        lambda: SecretKey(bytes.fromhex(SECRET.hex() + "00"), id="a", config=GumbelConfig()),
        lambda: key.with_state("asleep", NOON),  # type: ignore[arg-type]
        lambda: pickle.dumps(key),
        lambda: sign(b"", key),
        lambda: use_key(signer),
        lambda: pivots([1, 2, 3, -1], key),
        lambda: pivots([1, 2, 3], signer),
        lambda: sign(b"", signer.with_state("retired", NOON)),
    ]
    caught: list[Exception] = []
    for call in calls:
        try:
            call()
        except (ValueError, TypeError) as error:
            caught.append(error)
    assert len(caught) == len(calls)
    return caught


def test_not_in_tracebacks_with_local_variables() -> None:
    for error in errors():
        plain = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
        console = Console(file=io.StringIO(), width=300)
        console.print(Traceback.from_exception(type(error), error, error.__traceback__, show_locals=True))
        pretty = console.file.getvalue()  # type: ignore[attr-defined]
        assert "k1" in plain or "not an id" in plain or "secret must" in plain
        assert not shown(SECRET, plain), plain
        assert not shown(SECRET, pretty), pretty


# ---------------------------------------------------------------- signing


# RFC 8032, section 7.1, tests 1 and 3.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        """e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155
           5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b""",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        """6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac
           18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a""",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_rfc_8032_vectors(secret: str, public: str, message: str, signature: str) -> None:
    key = make(secret=bytes.fromhex(secret), config=Ed25519Config())
    assert public_key(key).hex() == public
    assert sign(bytes.fromhex(message), key) == bytes.fromhex(signature)
    assert verify(bytes.fromhex(message), bytes.fromhex(signature), bytes.fromhex(public))


def test_every_changed_bit_breaks_a_signature() -> None:
    key = make(config=Ed25519Config())
    data, public = b"report", public_key(key)
    signature = sign(data, key)
    assert verify(data, signature, public)
    for bit in range(512):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        assert not verify(data, bytes(changed), public)
    for bit in range(48):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        assert not verify(bytes(altered), signature, public)
    assert not verify(data, signature, public_key(make(secret=SECRET[::-1], config=Ed25519Config())))
    assert not verify(data, signature[:-1], public)
    assert not verify(data, b"", public)


def test_purposes_do_not_mix() -> None:
    watermark, signer = make(), make(config=Ed25519Config(), id="s1")
    with pytest.raises(ValueError, match=r"key must be for scheme 'ed25519', got 'gumbel/1' \(key 'k1'\)"):
        sign(b"", watermark)
    with pytest.raises(ValueError, match="key must be for scheme 'ed25519'"):
        public_key(watermark)
    with pytest.raises(ValueError, match=r"a watermark scheme, got 'ed25519/1' \(key 's1'\)"):
        use_key(signer)
    with pytest.raises(ValueError, match=r"watermark scheme, got 'ed25519/1'|scheme 'gumbel', got 'ed25519/1'"):
        pivots([1, 2, 3, 4, 5, 6], signer)


@pytest.mark.parametrize("state", ["retired", "revoked"])
def test_only_active_keys_sign(state: Any) -> None:
    key = make(config=Ed25519Config())
    signature = sign(b"x", key)
    gone = key.with_state(state, NOON)
    with pytest.raises(RevokedKeyError, match=f"in state '{state}'"):
        sign(b"x", gone)
    assert verify(b"x", signature, public_key(gone))


@pytest.mark.parametrize("public", [b"", bytes(31), "00" * 32, None])
def test_wrong_public_keys(public: Any) -> None:
    with pytest.raises(ValueError, match="public_key_bytes must be 32 bytes"):
        verify(b"", bytes(64), public)


# ---------------------------------------------------------------- schemes


def test_registry() -> None:
    assert {"ed25519/1", "gumbel/1"} <= set(known_schemes())
    assert newest("gumbel") is GumbelConfig
    assert config_from("gumbel", 1, {"window": 3}) == GumbelConfig(window=3)
    with pytest.raises(ValueError, match="scheme must be one of"):
        newest("gumbel/1")
    with pytest.raises(ValueError, match="registered already"):

        @register
        class Again(SchemeConfig):
            scheme: ClassVar[str] = "gumbel"
            version: ClassVar[int] = 1


def test_canonical_settings() -> None:
    assert GumbelConfig(window=12).canonical() == b'{"window":12}'
    assert Ed25519Config().canonical() == b"{}"


def test_a_scheme_is_found_without_importing_it() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from assay.watermark.schemes import config_from;"
        "assert 'assay.watermark.signing' not in sys.modules; print(config_from('ed25519', 1, {}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "Ed25519Config()", done.stderr
