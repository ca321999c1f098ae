"""Corpus runs: local processes against Ray, the same shards and the same results: python benchmarks/ray_engine.py

All ways run in one process, interleaved. CPU time is that of every process involved (driver, Ray's own, workers),
sampled from /proc; it depends least on what else the machine does. A run's own start-up is inside its figures, the
cluster's is given apart. "Ray Data" is the same worker function under `map_batches` with an actor pool; the shards are
handed to it ready cut and nothing is recorded in a ledger or combined: the least that it could cost.

A model's rate is that of `run_human` with the bundled model in one worker: the CPU time that the added documents of a
larger run take, so that loading torch does not count. The last table puts the rates into the cost model of
docs/explanation/scaling.md; give your price of a core hour by --price.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from assay.detection.corpus import run
from assay.detection.corpus.key_tests import DetectionKey, KeyTests
from assay.detection.corpus.reading import Columns, read
from assay.detection.corpus.shards import cut
from assay.detection.corpus.sources import find_inputs
from assay.detection.corpus.subject import Setup
from assay.detection.corpus.worker import shard_results, write_shard
from assay.detection.text import load_tokenizer
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey, use_key

TEXT = Path(__file__).resolve().parent.parent / "data/corpus/the-time-machine.txt.gz"
KEY = SecretKey(hashlib.sha256(b"benchmark").digest(), id="benchmark", config=GumbelConfig())
TICKS = os.sysconf("SC_CLK_TCK")


def write_corpus(path: Path, documents: int, characters: int) -> None:
    """Passages of a book at random places: the tokeniser and the test see real words."""
    text = " ".join(gzip.decompress(TEXT.read_bytes()).decode("utf-8").split())
    starts = np.random.default_rng(0).integers(len(text) - characters, size=documents)
    path.write_text("".join(json.dumps({"text": text[a : a + characters]}) + "\n" for a in starts))


class CpuTime:
    """CPU seconds of this process and all below it, those that end meanwhile included up to one sample."""

    def __init__(self, interval: float = 0.1) -> None:
        self.interval, self.seen, self.stop = interval, {}, threading.Event()

    def __enter__(self) -> CpuTime:
        self.sample()
        self.before = dict(self.seen)
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop.set()
        self.thread.join()
        self.sample()
        self.seconds = sum(value - self.before.get(pid, 0) for pid, value in self.seen.items()) / TICKS

    def _watch(self) -> None:
        while not self.stop.wait(self.interval):
            self.sample()

    def sample(self) -> None:
        """Note the CPU time of every process of the tree."""
        parents, used = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)], used[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
        for pid in used:
            above = pid
            while above not in (0, 1, os.getpid()):
                above = parents.get(above, 0)
            if above == os.getpid():
                self.seen[pid] = used[pid]


class Tested:
    """The worker of the Ray Data way."""

    def __init__(self, setup: bytes) -> None:
        self.setup = pickle.loads(setup)
        self.test = self.setup.tests.open()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Test and write the shards of a batch."""
        shards = [pickle.loads(data) for data in batch["shard"]]
        records = [write_shard(shard, *shard_results(shard, self.test), self.setup) for shard in shards]
        return {"documents": np.array([record.documents for record in records])}


def with_ray_data(corpus: Path, out: Path, workers: int, shard_rows: int) -> None:
    """The same shards through Ray Data."""
    import ray

    out.mkdir()
    setup = Setup(KeyTests(load_tokenizer(), (DetectionKey(KEY.id, KEY.config, use_key(KEY)),)), out)
    rows = read(find_inputs([corpus]), Columns())
    shards = [{"shard": pickle.dumps(s)} for s in cut(rows, first=0, max_rows=shard_rows, max_characters=4_000_000)]
    data = ray.data.from_items(shards, override_num_blocks=len(shards))
    done = data.map_batches(
        Tested,
        fn_constructor_kwargs={"setup": pickle.dumps(setup)},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    sum(int(row["documents"]) for row in done.iter_rows())


def driver_rate(corpus: Path, shard_rows: int) -> float:
    """Bytes per CPU second that the driver reads, cuts and makes ready to send: the bound on the whole."""
    begun = time.process_time()
    for shard in cut(read(find_inputs([corpus]), Columns()), first=0, max_rows=shard_rows, max_characters=4_000_000):
        pickle.dumps(shard)
    return corpus.stat().st_size / (time.process_time() - begun)


def model_rate(folder: Path, documents: int, characters: int, rounds: int) -> float:
    """Tokens per CPU second of model scoring by one worker, from the difference of two runs."""
    from assay.conformal.human import calibrate
    from assay.conformal.human_corpus import run_human
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model, load_tokenizer_for_generation

    text = " ".join(gzip.decompress(TEXT.read_bytes()).decode("utf-8").split())
    scorer = ModelScorer(load_model(), load_tokenizer_for_generation())
    known = calibrate([text[a : a + 300] for a in range(0, 9000, 300)], scorer, level=0.1)
    costs = {}
    for count in (documents, 3 * documents):
        corpus = folder / f"model-{count}.jsonl"
        write_corpus(corpus, count, characters)
        measured = []
        for round_ in range(rounds):
            with CpuTime() as cpu:
                summary = run_human(
                    corpus, known, out=folder / f"model-{count}-{round_}", device="cpu", workers=1, progress=False
                )
            measured.append(cpu.seconds)
        costs[count] = (summary.n_tokens, min(measured))
    (few, little), (many, much) = costs.values()
    return (many - few) / (much - little)


def show_costs(rates: dict[str, float], price: float) -> None:
    """Core hours, hours on 64 cores, and money for 1e9 and 1e12 tokens at these rates."""
    print(f"\n| at the rate of | tokens | core hours | hours on 64 cores | money at {price} a core hour |")
    print("|---" * 5 + "|")
    for name, rate in rates.items():
        for tokens in (1e9, 1e12):
            hours = tokens / (3600 * rate)
            print(f"| {name}: {rate:,.0f}/s | {tokens:.0e} | {hours:,.3g} | {hours / 64:,.3g} | {hours * price:,.3g} |")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--characters", type=int, default=1500)
    parser.add_argument("--shard-rows", type=int, default=500)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-documents", type=int, default=300, help="0 leaves the model out")
    parser.add_argument("--price", type=float, default=0.05, help="of a core hour, in your currency")
    options = parser.parse_args()
    import logging

    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    cpus = max(options.workers) + 1  # Ray Data's own tasks need one
    begun = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=512 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    print(f"cluster up in {time.perf_counter() - begun:.1f} s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, options.documents, options.characters)

        rate = max(driver_rate(corpus, options.shard_rows) for _ in range(3))
        print(
            f"driver alone: {rate / 1e6:.0f} MB, {rate * options.documents / corpus.stat().st_size:,.0f} rows per CPU s"
        )

        def engine(which: Any, workers: int) -> Callable[[Path], Any]:
            return lambda out: run(
                corpus, KEY, out=out, engine=which, workers=workers, shard_rows=options.shard_rows, progress=False
            )

        ways: dict[str, Callable[[Path], Any]] = {}
        for workers in options.workers:
            ways[f"local, {workers}"] = engine("local", workers)
            ways[f"ray, {workers}"] = engine("ray", workers)
            ways[f"Ray Data, {workers}"] = lambda out, w=workers: with_ray_data(corpus, out, w, options.shard_rows)
        figures: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        results = set()
        tokens = 0
        for round_ in range(options.rounds):
            for number, (way, call) in enumerate(ways.items()):
                out = folder / f"{round_}-{number}"
                begun = time.perf_counter()
                with CpuTime() as cpu:
                    summary = call(out)
                figures[way].append((time.perf_counter() - begun, cpu.seconds))
                if summary is not None:
                    tokens = summary.n_tokens
                    results.add((out / "results.parquet").read_bytes())
        print(f"{options.documents} documents, {tokens} tokens; results equal to the byte: {len(results) == 1}")
        print("| engine, workers | wall s | CPU s | rows/s | rows per CPU s | tokens per CPU s |\n" + "|---" * 6 + "|")
        costs = {}
        for way, measured in figures.items():
            wall, cpu_s = min(wall for wall, _ in measured), min(cpu for _, cpu in measured)
            rates = (options.documents / wall, options.documents / cpu_s, tokens / cpu_s)
            costs[way] = rates[-1]
            print(f"| {way} | {wall:.1f} | {cpu_s:.1f} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
        ray.shutdown()
        # Ray Data does not do all the work, and the rates of the others differ by less than the machine's noise.
        shown = {way: rate for way, rate in costs.items() if way.endswith(f", {max(options.workers)}")}
        shown.pop(f"Ray Data, {max(options.workers)}")
        if options.model_documents:
            shown["bundled model, 1 worker"] = model_rate(
                folder, options.model_documents, options.characters, options.rounds
            )
        show_costs(shown, options.price)


if __name__ == "__main__":
    main()
