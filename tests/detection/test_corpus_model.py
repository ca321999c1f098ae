"""Corpora against keys with a model: rows equal to `detect`, what a run is pinned to, its report, the command."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

import assay
from assay._errors import RunError
from assay.cli import app
from assay.detection import testers
from assay.detection.corpus import RunSummary, engine, pool, run
from assay.detection.corpus.key_tests import KeySubject
from assay.detection.corpus.model_key_tests import ModelKeyTests, reader_of
from assay.detection.corpus.subject import Setup
from assay.detection.inputs import scorer_of
from assay.detection.model_view import ModelView
from assay.detection.text import LoadedTokenizer, load_tokenizer
from assay.kernels.scoring.model import ModelScorer
from assay.report import Report
from assay.watermark.dual_gumbel import DualGumbelConfig
from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey
from assay.watermark.schemes import known_schemes, newest
from tests.conftest import work_in_process

MakeKey = Callable[..., SecretKey]
TEMPERATURE = 0.6
DECODING = {"temperature": TEMPERATURE, "top_k": None, "top_p": None, "min_p": None}


def generate(key: SecretKey, prompt: str, tokens: int, seed: int) -> str:
    """Text of the bundled model under a key, after a prompt that is not part of it."""
    import torch

    from assay.models import load_model, load_tokenizer_for_generation
    from assay.watermark import for_transformers

    model, tokenizer = load_model(), load_tokenizer_for_generation()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=TEMPERATURE,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        watermarking_config=for_transformers(key),
    )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))


@pytest.fixture(scope="module")
def texts(make_key: MakeKey, human_text: str) -> list[str]:
    """Eight human passages of different lengths, four short marked texts of keys 1 and 2, and odd ones."""
    human = [human_text[4000 * i :][: 60 + 90 * i] for i in range(1, 9)]
    prompts = ("It was a cold", "She said that", "The old house", "When the men")
    marked = [generate(make_key(1 + i % 2), prompt, 24, seed=i) for i, prompt in enumerate(prompts)]
    return [*human[:4], *marked, *human[4:], "", "x", "\U0001f600\u0301 \u202e"]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """The texts, and one reject."""
    rows = [json.dumps({"text": text, "id": f"d{i}"}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:3], "{bad", *rows[3:]]) + "\n")
    return tmp_path / "a.jsonl"


@pytest.fixture
def in_process(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:  # extends the shared one
    """Test shards in this process, as on a machine without GPUs."""
    monkeypatch.setattr(engine, "visible_gpus", list)


@pytest.fixture(scope="module")
def scorer() -> ModelScorer:
    return scorer_of("default")


@cache
def tokenizer() -> LoadedTokenizer:
    return load_tokenizer()


def rows_of(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out / "results.parquet").to_pylist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("numbers", [[1], [1, 2, 3]], ids=["one key", "three keys"])
def test_every_row_is_what_detect_says_with_the_model(
    tmp_path: Path, corpus: Path, texts: list[str], make_key: MakeKey, scorer: ModelScorer, numbers: list[int]
) -> None:
    keys = [make_key(number) for number in numbers]
    run(corpus, keys, out=tmp_path / "out", model="default", temperature=TEMPERATURE, id_column="id", shard_rows=4)
    rows = rows_of(tmp_path / "out")
    assert [row["doc_id"] for row in rows] == [f"d{i}" for i in range(len(texts))]
    for text, row in zip(texts, rows, strict=True):
        expected = assay.detect(text, keys, model=scorer, tokenizer="default", temperature=TEMPERATURE)
        for name in ("n_tokens", "n_scored", "n_repeats_dropped", "scheme"):
            assert row[name] == getattr(expected, name)
        for name in ("statistic", "log_pvalue", "log_evalue"):
            assert row[name] == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-9)
        assert row["pvalue"] == pytest.approx(math.exp(row["log_pvalue"]))
        if expected.n_scored:
            assert row["key_id"] == expected.key_id


@pytest.mark.usefixtures("in_process")
def test_the_model_finds_what_the_tokens_alone_do_not_show(tmp_path: Path, corpus: Path, make_key: MakeKey) -> None:
    """24 tokens each, at a rate so strict that their p-values alone decide. Neither flags an unmarked text."""
    keys = [make_key(1), make_key(2)]
    run(corpus, keys, out=tmp_path / "plain", id_column="id", fdr=1e-5)
    run(corpus, keys, out=tmp_path / "aware", id_column="id", model="default", temperature=TEMPERATURE, fdr=1e-5)
    plain, aware = ({r["doc_id"] for r in rows_of(tmp_path / out) if r["flagged"]} for out in ("plain", "aware"))
    assert plain < aware
    assert aware == {"d4", "d5", "d6", "d7"}
    named = {row["doc_id"]: row["key_id"] for row in rows_of(tmp_path / "aware")}
    assert [named[f"d{i}"] for i in range(4, 8)] == ["test-1", "test-2", "test-1", "test-2"]


@pytest.mark.usefixtures("in_process")
def test_tokens_own_probabilities_come_from_one_batched_pass_of_a_shard(
    tmp_path: Path, corpus: Path, texts: list[str], make_key: MakeKey, scorer: ModelScorer, monkeypatch: Any
) -> None:
    """A scheme whose tests need no whole laws; two keys cost no second pass."""
    keys = [replace_config(make_key(number), DualGumbelConfig()) for number in (1, 2)]
    passes = []
    score = ModelScorer.score

    def counted(self: ModelScorer, documents: Any, **options: Any) -> Any:
        passes.append(len(documents))
        return score(self, documents, **options)

    monkeypatch.setattr(ModelScorer, "score", counted)
    run(corpus, keys, out=tmp_path / "out", model="default", shard_rows=8)
    assert passes == [1, 7, 8]  # the trial; 16 rows, of which one is a reject
    for text, row in zip(texts, rows_of(tmp_path / "out"), strict=True):
        expected = assay.detect(text, keys, model=scorer, tokenizer="default")
        for name in ("statistic", "log_pvalue", "log_evalue"):  # other batches: float32 rounding of the model
            assert row[name] == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6)


def replace_config(key: SecretKey, config: Any) -> SecretKey:
    return SecretKey(key._secret, id=key.id, config=config)


@pytest.mark.slow  # processes that load torch
def test_worker_processes_give_the_same_bytes_and_a_stopped_run_resumes(
    tmp_path: Path, corpus: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, two processes, and a run that was stopped in this process and resumed by two."""
    options: dict[str, Any] = {"model": "default", "temperature": TEMPERATURE, "device": "cpu", "shard_rows": 3}

    def stopped(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(work_in_process(*arguments), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "work", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, make_key(1), out=tmp_path / "stopped", **options)
    for out, workers in (("one", 1), ("two", 2), ("stopped", 2)):
        summary = run(corpus, make_key(1), out=tmp_path / out, workers=workers, **options)
        assert summary.resumed == (out == "stopped")
    for name in ("results.parquet", "rejects.jsonl"):
        one, two, resumed = ((tmp_path / out / name).read_bytes() for out in ("one", "two", "stopped"))
        assert one == two == resumed
    assert run(corpus, make_key(1), out=tmp_path / "two", **options).already_finished


@pytest.mark.usefixtures("in_process")
def test_a_run_is_pinned_to_its_model_and_its_decoding_rule(
    tmp_path: Path, corpus: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.models import load_model, load_tokenizer_for_generation

    key, out = make_key(1), tmp_path / "out"
    summary = run(corpus, key, out=out, model="default", temperature=TEMPERATURE, fdr=0.02)
    assert summary.model is not None
    assert (summary.model["name"], summary.model["temperature"]) == ("default", TEMPERATURE)
    assert summary.tests == ("gumbel-best-of-three",)
    assert [line for line in summary.assumptions if "Token probabilities come from model 'default'" in line]
    assert RunSummary.read(out) == summary
    with pytest.raises(RunError, match=r"model\.temperature was 0\.6 and is 0\.7"):
        run(corpus, key, out=out, model="default", temperature=0.7, fdr=0.02)
    with pytest.raises(RunError, match=r"model.* is 'not there'"):
        run(corpus, key, out=out, fdr=0.02)
    changed = load_model()
    changed.model.norm.weight.data[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    load_tokenizer_for_generation().save_pretrained(tmp_path / "changed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"model\.weights_sha256 was"):
        run(corpus, key, out=out, model="changed", tokenizer="default", temperature=TEMPERATURE, fdr=0.02)


def test_a_worker_refuses_another_model_than_the_drivers(make_key: MakeKey) -> None:
    reader = reader_of("default", tokenizer(), DECODING, "cpu")
    other = replace(reader, record=replace(reader.record, weights_sha256="00" * 32))
    with pytest.raises(ValueError, match=r"another one than the driver at 'default': weights_sha256 differ"):
        ModelKeyTests(tokenizer(), (), other).open()


def test_what_is_sent_to_workers_holds_no_model_and_shows_no_secret(make_key: MakeKey) -> None:
    key = make_key(1)
    tests = KeySubject([key], tokenizer(), reader_of("default", tokenizer(), DECODING, "auto")).tests()
    plain = KeySubject([key], tokenizer()).tests()
    assert len(pickle.dumps(Setup(tests, Path("folder")))) < len(pickle.dumps(Setup(plain, Path("folder")))) + 2000
    assert isinstance(tests, ModelKeyTests)
    assert tests.on("cuda").device == "cuda"
    assert "words=<hidden>" in repr(tests)


def test_the_name_of_the_test_is_that_of_every_schemes_best_of_its_tests(make_key: MakeKey) -> None:
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 64, size=40).astype(np.uint32)
    laws = np.log(rng.dirichlet(np.ones(64), size=40)).astype(np.float32)
    own = laws[np.arange(40), ids].astype(np.float64)
    reader = reader_of("default", tokenizer(), DECODING, "cpu")
    schemes = {tag.rpartition("/")[0] for tag in known_schemes()} - {"sequence"}
    settings: dict[str, dict[str, Any]] = {"hf-kgw": {"vocab_size": 64}, "payload-gumbel": {"bits": 4}}
    tested = 0
    for scheme in sorted(name for name in schemes if newest(name).purpose == "watermark"):
        key = SecretKey(b"k" * 32, id="k", config=newest(scheme)(**settings.get(scheme, {})))
        subject = KeySubject([key], tokenizer(), reader)
        (words,) = (one.words for one in subject.tests().keys)
        view = ModelView(lambda: own, lambda: iter([(0, laws)]))
        found = testers.tester(key.config).test_ids(ids, 0, words, key.config, test="auto", model=view)
        assert subject.description()["tests"] == (found.test,)
        assert KeySubject([key], tokenizer()).description()["tests"] == (
            f"{scheme}-{testers.tester(key.config).TESTS[0]}",
        )
        tested += 1
    assert tested > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": object()}, "model must be 'default', a folder or a hub id, from which every worker loads it"),
        ({"model": "default", "device": "gpu"}, 'device must be "auto", "cpu" or "cuda"'),
        ({"device": "cpu"}, "device must go with a model"),
        ({"model": "default", "temperature": 0.0}, "temperature"),
        ({"model": "default", "top_p": 2.0}, "top_p"),
        ({"model": "/nowhere/model", "tokenizer": "default"}, "there is no folder at '/nowhere/model'"),
    ],
)
def test_options_that_cannot_be_meant(
    tmp_path: Path, corpus: Path, make_key: MakeKey, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(corpus, make_key(1), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
def test_a_report_on_such_a_run_shows_excerpts_that_the_model_confirms(
    tmp_path: Path, corpus: Path, texts: list[str], make_key: MakeKey
) -> None:
    key = make_key(1)
    options: dict[str, Any] = {"model": "default", "temperature": TEMPERATURE, "id_column": "id"}
    run(corpus, key, out=tmp_path / "out", **options)
    report = Report.from_run(tmp_path / "out", keys=key)
    shown = {one.doc_id: "".join(one.excerpt.pieces) for one in report.documents if one.excerpt}
    assert shown == {"d4": texts[4], "d6": texts[6]}
    assert report.tests == ("gumbel-best-of-three",)
    assert "The tests used here are cautious" in report.to_html()
    lines = corpus.read_text().splitlines()
    row = json.loads(lines[5])
    first, second, *others = row["text"].split(" ")
    lines[5] = json.dumps(row | {"text": " ".join([second, first, *others])})
    corpus.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match="row 6, is no longer what the run tested"):
        Report.from_run(tmp_path / "out", keys=key)
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    summary["model"]["weights_sha256"] = "00" * 32
    (tmp_path / "out/summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="the run's model 'default' has other weights by now"):
        Report.from_run(tmp_path / "out", keys=key)


@pytest.mark.usefixtures("in_process")
def test_the_command(tmp_path: Path, corpus: Path, make_key: MakeKey) -> None:
    with pytest.warns(UserWarning, match="not encrypted"):
        Keyring.create(tmp_path / "keys.json", development=True).add(make_key(1))
    common = ["detect", str(corpus), "--key", "test-1", "--keyring", str(tmp_path / "keys.json")]
    with_model = [*common, "--model", "default", "--temperature", str(TEMPERATURE), "--id-column", "id"]
    done = CliRunner().invoke(app, [*with_model, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout)["model"]["temperature"] == TEMPERATURE
    run(corpus, make_key(1), out=tmp_path / "same", model="default", temperature=TEMPERATURE, id_column="id")
    assert (tmp_path / "out/results.parquet").read_bytes() == (tmp_path / "same/results.parquet").read_bytes()
    for more, message in (
        (["--device", "cpu", "--out", "o"], "--device is for --model"),
        (["--model", "default", "--prompt-file", str(corpus), "--out", "o"], "--prompt-file is for one text"),
    ):
        refused = CliRunner().invoke(app, [*common, *more])
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.replace("\u2502", "").split())
