"""The bundled model: what ships is what the card says, and the script that made it still runs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from assay.models import DEFAULT, load_model, load_tokenizer_for_generation

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "train_default_model.py"


@pytest.fixture(scope="module")
def card() -> dict[str, object]:
    loaded: dict[str, object] = json.loads((DEFAULT / "training.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_default_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hashes_are_those_of_the_card(card: dict[str, object]) -> None:
    assert sha256(DEFAULT / "model.safetensors") == card["weights_sha256"]
    assert sha256(DEFAULT / "tokenizer.json") == card["tokenizer_sha256"]
    for book, digest in card["corpus_sha256"].items():  # type: ignore[attr-defined]
        assert sha256(ROOT / "data" / "corpus" / f"{book}.txt.gz") == digest


def test_size_and_shape(card: dict[str, object]) -> None:
    files = ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json", "held-out.txt")
    assert sum((DEFAULT / name).stat().st_size for name in files) <= 4_000_000
    config = json.loads((DEFAULT / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["head_dim"] >= 32
    assert 2048 <= config["vocab_size"] <= 4096
    assert card["validation_bits_per_char"] <= 1.70  # type: ignore[operator]


def test_bits_per_token_on_a_book_it_never_saw(card: dict[str, object], script: ModuleType) -> None:
    # The whole book takes a minute; the card also holds the figure for its first 40 windows.
    tokenizer = load_tokenizer_for_generation()
    texts = list(script.passages(script.VALIDATION_BOOK))
    ids = script.encode(tokenizer.backend_tokenizer, texts)
    context = card["settings"]["context"]  # type: ignore[index]
    bits = script.bits_per_token(load_model(), ids, context, windows=40)
    assert bits == pytest.approx(card["validation_bits_per_token_40_windows"], abs=0.01)


def test_the_tokenizer_comes_from_the_corpus(card: dict[str, object], script: ModuleType) -> None:
    texts = [text for book in script.TRAIN_BOOKS for text in script.passages(book)]
    rebuilt = script.train_tokenizer(texts).to_str(pretty=False).encode()
    assert hashlib.sha256(rebuilt).hexdigest() == card["tokenizer_sha256"]


def test_the_validation_book_is_not_in_the_training_books(script: ModuleType) -> None:
    assert script.VALIDATION_BOOK not in script.TRAIN_BOOKS
    held_out = (DEFAULT / "held-out.txt").read_text(encoding="utf-8").split("\n")[0][:200]
    assert held_out in "\n".join(script.passages(script.VALIDATION_BOOK))
    assert all(held_out not in text for book in script.TRAIN_BOOKS for text in script.passages(book))


def test_twenty_steps_of_training(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--out",
        str(tmp_path),
        "--steps",
        "20",
        "--eval-every",
        "10",
        "--no-compile",
    ]
    command += ["--context", "64", "--batch", "4", "--skip-full-validation"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    log = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["log"]
    assert [row["step"] for row in log] == [10, 20], done.stdout
    assert log[1]["train_bits_per_token"] < log[0]["train_bits_per_token"] < 11.1
    assert (tmp_path / "model.safetensors").stat().st_size < 4_000_000


def test_samples_end_and_read_as_words() -> None:
    """EOS was trained: some of 32 samples of 240 tokens end by themselves. Nearly all words are words of the corpus."""
    import gzip
    import re

    import torch

    model, tokenizer = load_model(), load_tokenizer_for_generation()
    torch.manual_seed(0)
    start = torch.tensor([[tokenizer.convert_tokens_to_ids("<|endoftext|>")]])
    out = model.generate(start, do_sample=True, temperature=0.7, max_new_tokens=240, num_return_sequences=32, top_k=0)
    ended = (out[:, 1:] == 0).any(dim=1)
    assert int(ended.sum()) >= 3
    words: set[str] = set()
    for path in (ROOT / "data" / "corpus").glob("*.txt.gz"):
        words.update(re.findall(r"[a-z]+", gzip.decompress(path.read_bytes()).decode("utf-8").lower()))
    text = " ".join(tokenizer.batch_decode(out[:, :200], skip_special_tokens=True)).lower()
    found = re.findall(r"[a-z]+", text)
    assert sum(word in words for word in found) / len(found) > 0.9


def test_a_folder_without_a_usable_model_is_named(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ValueError, match="model must be 'default', a folder that holds") as caught:
            load_model(tmp_path)
        assert repr(str(tmp_path)) in str(caught.value)
        return str(caught.value)

    assert "model_type" in refusal()
    (tmp_path / "config.json").write_text("{bad")
    assert "JSON" in refusal()
    (tmp_path / "config.json").write_bytes((DEFAULT / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle could run code")
    assert "no file named model.safetensors" in refusal()
    (tmp_path / "model.safetensors").write_bytes((DEFAULT / "model.safetensors").read_bytes()[:1000])
    assert "header" in refusal()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer must be 'default', a folder that holds"):
        load_tokenizer_for_generation(tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be 'default', a folder or a hub id; there is no folder at"):
        load_tokenizer_for_generation(tmp_path / "nowhere")
