"""Keys that are integers of another system: used as they are, sealed like all others, and silent."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay._errors import KeyringError
from assay.watermark import schemes
from assay.watermark.foreign import parse
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keyring import Keyring, read_public
from assay.watermark.keys import SecretKey, integers_of, use_key
from assay.watermark.profiles.hf_kgw import HfKgwConfig
from assay.watermark.profiles.hf_synthid import HfSynthIdConfig
from assay.watermark.profiles.sglang_gumbel import SglangGumbelConfig
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig

KGW = HfKgwConfig(vocab_size=50257)
SYNTHID = HfSynthIdConfig(depth=3)
VLLM = VllmGumbelConfig()
SGLANG = SglangGumbelConfig(keys="dual")
CASES: list[tuple[Any, list[int]]] = [
    (KGW, [15485863]),
    (KGW, [2**63 - 1]),
    (SYNTHID, [-(2**63), -1, 2**63 - 1]),
    (VLLM, [2**64 - 1]),
    (SGLANG, [0, 2**64 - 1]),
]


@pytest.mark.parametrize(("config", "integers"), CASES)
def test_integers_go_in_and_come_out(config: Any, integers: list[int]) -> None:
    key = SecretKey.from_integers(config, integers, id="a")
    assert integers_of(key) == tuple(integers)
    expected = [value % 2**64 >> shift & 0xFFFFFFFF for value in integers for shift in (0, 32)]
    assert use_key(key).tolist() == expected
    # Whatever the id: another system has to find the same mark.
    assert (use_key(SecretKey.from_integers(config, np.array(integers, dtype=object), id="b")) == use_key(key)).all()


def test_own_schemes_keep_their_derivation() -> None:
    with pytest.raises(ValueError, match="of another system's scheme, got GumbelConfig"):
        SecretKey.from_integers(GumbelConfig(), [1])
    with pytest.raises(ValueError, match="for another system's scheme, got 'gumbel/1'"):
        integers_of(SecretKey.generate())


@pytest.mark.parametrize("config", [KGW, SYNTHID, VLLM, SGLANG])
def test_generated_keys_derive_their_integers(config: Any) -> None:
    key = SecretKey(bytes(range(32)), id="a", config=config)
    integers = integers_of(key)
    assert len(set(integers)) == config.n_integers
    assert all(config.lowest <= value <= config.highest for value in integers)
    assert integers == integers_of(SecretKey(bytes(range(32)), id="a", config=config))
    assert integers != integers_of(SecretKey(bytes(range(32)), id="b", config=config))
    assert (use_key(key) == use_key(SecretKey.from_integers(config, integers))).all()


def test_derived_integers_are_pinned() -> None:
    key = SecretKey(bytes(range(32)), id="a", config=VLLM)
    assert integers_of(key) == (15937327344189917016,)


def test_the_fingerprint_of_a_short_key_cannot_be_searched() -> None:
    one, two = (SecretKey.from_integers(KGW, [15485863], id="a") for _ in range(2))
    assert one.info.fingerprint != two.info.fingerprint


@pytest.mark.parametrize(
    ("integers", "message"),
    [
        ([424242], "must be 3 for HfSynthIdConfig"),
        ([1, 424242424242, 2**63], r"number 3 is not"),
        ([1, 2, 3.5], "number 3 is float"),
        ([1, True, 3], "number 2 is bool"),
        ([1, "424242", 3], "number 2 is str"),
        (424242, "got int"),
    ],
)
def test_refused_without_a_word_of_the_secret(integers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SecretKey.from_integers(SYNTHID, integers)
    frames = list(traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack)[1:]
    assert "424242" not in str(caught.value)
    assert not [frame for frame in frames if "424242" in str(frame.locals)]


def test_written_keys() -> None:
    assert parse(SYNTHID, " 654, -1\n0x1F ") == (654, -1, 31)
    assert parse(SGLANG, "10 0xff") == (16, 255)  # SGLang reads hexadecimal, with or without 0x
    for config, text in ((SYNTHID, "654 secret"), (SGLANG, "10 xyz")):
        message = parse(config, text)
        assert isinstance(message, str)
        assert "number 2 is not" in message
        assert "secret" not in message
        assert "xyz" not in message


def test_a_keyring_keeps_them_sealed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keyring = Keyring.create(path, passphrase="correct horse", scrypt_n=2**10)
    for number, (config, integers) in enumerate(CASES):
        keyring.add(SecretKey.from_integers(config, integers, id=f"k{number}"))
    again = Keyring.open(path, passphrase="correct horse")
    for number, (_, integers) in enumerate(CASES):
        assert again[f"k{number}"] == keyring[f"k{number}"]
        assert integers_of(again[f"k{number}"]) == tuple(integers)
    assert [info.config for info in read_public(path)] == [config for config, _ in CASES]
    text = path.read_text() + json.dumps(again.export_public())
    assert "15485863" not in text
    assert (15485863).to_bytes(8, "little").hex() not in text
    successor = keyring.rotate("k2", "next")
    assert successor.config == SYNTHID
    assert integers_of(successor) != integers_of(keyring["k2"])


def test_one_secret_under_two_ids_is_noticed(tmp_path: Path) -> None:
    keyring = Keyring.in_memory()
    keyring.add(SecretKey.from_integers(KGW, [5], id="a"))
    with pytest.raises(KeyringError, match="is in the keyring already, as 'a'"):
        keyring.add(SecretKey.from_integers(KGW, [5], id="b"))
    keyring.add(SecretKey.from_integers(HfKgwConfig(vocab_size=50265), [5], id="c"))  # the same key on another model


def test_a_tampered_length_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.warns(UserWarning, match="not encrypted"):
        keyring = Keyring.create(path, development=True)
    keyring.add(SecretKey.from_integers(VLLM, [5], id="a"))
    document = json.loads(path.read_text())
    document["keys"][0]["secret"] += "00"
    path.write_text(json.dumps(document))
    with pytest.raises(KeyringError, match="secret of key 'a' is damaged"):
        Keyring.open(path)


def test_registered() -> None:
    for config, _ in CASES:
        assert schemes.config_from(config.scheme, config.version, config.parameters()) == config
