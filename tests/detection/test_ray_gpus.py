"""Model scoring on a Ray cluster: one slot per GPU where there are some, the model on it, the local engine's bytes.

The clusters have logical GPUs only: Ray hands them out as it does real ones, and no card is needed to see which slot
got which. What cannot be seen so is the arithmetic on a card.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import parquet

from assay._errors import RunError
from assay.conformal.calibration import Calibration
from assay.conformal.human import calibrate
from assay.conformal.human_corpus import HumanTests, run_human
from assay.detection.corpus import pool, ray_engine
from assay.detection.corpus.key_tests import KeyTests
from assay.detection.corpus.subject import Setup
from assay.detection.text import load_tokenizer
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation

NODE = {"object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def calibration(human_text: str) -> Calibration:
    scorer = ModelScorer(load_model(), load_tokenizer_for_generation())
    return calibrate([human_text[i : i + 300] for i in range(0, 9000, 300)], scorer, level=0.1)


def setup_of(calibration: Calibration, device: Any) -> Setup:
    return Setup(HumanTests(calibration, "default", None, device), Path("folder"))


@pytest.mark.parametrize(
    ("device", "resources", "count", "expected"),
    [
        ("auto", {"CPU": 8.0, "GPU": 2.0}, None, ("cuda", 2)),
        ("auto", {"CPU": 8.0, "GPU": 2.0}, 1, ("cuda", 1)),
        ("cuda", {"CPU": 8.0, "GPU": 2.0}, 5, ("cuda", 2)),  # more slots would wait for ever
        ("auto", {"CPU": 8.0}, None, ("cpu", 8)),
        ("cpu", {"CPU": 8.0, "GPU": 2.0}, 3, ("cpu", 3)),
        ("auto", {}, None, ("cpu", 1)),
    ],
)
def test_a_model_takes_the_gpus_of_the_cluster(
    calibration: Calibration, device: str, resources: dict[str, float], count: int | None, expected: tuple[str, int]
) -> None:
    setup, slots = ray_engine._placed(setup_of(calibration, device), count, resources)
    assert (setup.tests.device, slots) == expected


def test_a_cluster_without_the_gpus_that_were_asked_for_is_refused(calibration: Calibration) -> None:
    with pytest.raises(RunError, match="the cluster has no GPU"):
        ray_engine._placed(setup_of(calibration, "cuda"), None, {"CPU": 4.0})


def test_tests_of_keys_leave_the_gpus_alone() -> None:
    setup = Setup(KeyTests(load_tokenizer(), ()), Path("folder"))
    assert ray_engine._placed(setup, None, {"CPU": 3.0, "GPU": 2.0}) == (setup, 3)


@pytest.mark.parametrize(("device", "gpu"), [("cuda", {"num_gpus": 1}), ("cpu", {})])
def test_a_slot_asks_for_a_gpu_only_where_the_model_runs_on_one(
    calibration: Calibration, device: str, gpu: dict[str, int]
) -> None:
    asked: list[dict[str, int]] = []

    def remote(**options: int) -> Callable[[type], type]:
        asked.append(options)
        return lambda cls: cls

    ray_engine._Cluster(SimpleNamespace(remote=remote), setup_of(calibration, device), 1, Path("sign"))
    assert asked == [{"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, **gpu}]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without a GPU, and a second machine with two, as Ray is told."""
    pytest.importorskip("ray", reason="these tests start a Ray cluster: pip install 'assay[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **NODE})
    cluster.add_node(num_cpus=2, num_gpus=2, **NODE)
    yield cluster
    cluster.shutdown()


def watched(notes: Path) -> str:
    """The workers' program: each notes the device it is to use and the GPU it sees, then computes on the CPU."""
    head, tail = pool._COMMAND.split("from assay.detection.corpus.worker import main")
    return f"""{head}
import os
from assay.conformal import human_corpus
from assay.conformal.human_corpus import HumanTests
original = HumanTests.open
def open_noted(self):
    with open({str(notes)!r}, "a") as file:
        file.write(self.device + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "-") + "\\n")
    return original(self.on("cpu"))
HumanTests.open = open_noted
from assay.detection.corpus.worker import main{tail}"""


@pytest.mark.slow
def test_models_are_scored_by_slots_with_gpus(
    tmp_path: Path, human_text: str, calibration: Calibration, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun here, stopped, resumed on the cluster's GPUs: every document once, the bytes of a run on this machine."""
    import ray

    texts = [human_text[200 * i : 200 * i + 300] for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    program = watched(tmp_path / "notes")

    def watch() -> None:  # nested, so that Ray carries its code and not the name of this module
        from assay.detection.corpus import pool

        pool._COMMAND = program

    options: dict[str, Any] = {"shard_rows": 3, "progress": False}
    run_human(tmp_path / "a.jsonl", calibration, out=tmp_path / "here", device="cpu", workers=1, **options)
    begun = tmp_path / "out"
    work = pool.work

    def stopped(*arguments: Any) -> Iterator[Any]:
        with closing(work(*arguments)) as answers:
            yield from itertools.islice(answers, 7)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "work", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_human(tmp_path / "a.jsonl", calibration, out=begun, device="cpu", workers=1, **options)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": watch})
    try:
        summary = run_human(tmp_path / "a.jsonl", calibration, out=begun, engine="ray", **options)
    finally:
        ray.shutdown()
    assert (summary.documents, summary.rejects, summary.resumed) == (60, 0, True)
    assert (begun / "ledger/manifest.jsonl").read_bytes().count(b'"kind":"shard"') == 20
    assert sorted((tmp_path / "notes").read_text().split("\n")) == ["", "cuda 0", "cuda 1"]
    for name in ("results.parquet", "rejects.jsonl"):
        assert (begun / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert parquet.read_table(begun / "results.parquet")["row"].to_pylist() == list(range(1, 61))


@pytest.mark.slow
def test_a_gpu_that_is_not_there_ends_the_run_with_what_to_do(
    tmp_path: Path, human_text: str, calibration: Calibration, cluster: Any
) -> None:
    (tmp_path / "a.txt").write_text(human_text[:500])
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and its number 0 would be used")
    with pytest.raises(RunError, match=r"given a GPU \(CUDA_VISIBLE_DEVICES='[01]'\) .*, or choose device='cpu'"):
        run_human(
            tmp_path / "a.txt", calibration, out=tmp_path / "out", engine="ray", ray_address=cluster.address, workers=1
        )
