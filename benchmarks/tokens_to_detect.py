"""Tokens until a mark is found: every scheme, every test, verbatim and edited, beside the limit of any watermark.

    python benchmarks/tokens_to_detect.py [--model FOLDER]... [--out benchmarks/results/tokens_to_detect]

For each model and temperature, texts are sampled once per scheme, each under a key of its own; then the tests see
longer and longer beginnings. A row's number is the median over texts of the first length at which p < alpha, on a grid
of 8 % steps (30 % where the text was edited). Tests that use the model know it, the prompt and the
temperature. Edits replace tokens at random places by random ids, in the whole text before it is cut.

"limit" is the length at which the most powerful distortion-free watermark finds half of the texts: the mean over texts
of min(1, alpha / rho) reaches 1/2. It binds every scheme but those that change the law of the text (marked *).

Targets: on a model of 0.5 nats a token (stories260k, T = 0.5) the model-aware test needs at most 0.40 of the tokens of
the sum test to p < 1e-6, at T = 0.7 at most 0.55. One thread; results do not depend on the machine's load.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.detection import goodness_of_fit, pivot_score
from assay.detection import gumbel as gumbel_tests
from assay.detection import sequence as sequence_tests
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.detection.testers import Tester, tester
from assay.kernels.scoring.continuations import continuations
from assay.kernels.scoring.decoding import Decoding
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation
from assay.watermark import gumbel
from assay.watermark.edits import edit
from assay.watermark.gumbel import GumbelConfig, unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import SchemeConfig, known_schemes, newest, sampler_of
from assay.watermark.sequence import SequenceConfig, SequenceDecoder, nonce_words, reals

ALPHAS = (1e-3, 1e-6)
TEMPERATURES = (0.5, 0.7, 1.0)
EDIT_RATES = (0.0, 0.1, 0.2, 0.3)
PROMPTS = ("It was late in the evening when", "One day, a little girl", "We walked along the shore until")
LONGEST = 480
EDITED_TEXTS = 4  # of each prompt's texts, for the edits
COSTLY = {"payload-gumbel": 1}  # texts of each prompt, and no edits: a whole code is decoded at every length
TARGET_TEXTS = 40  # of each prompt, for the ratio of the two Gumbel tests


# Model-free tests of Gumbel pivots that are no part of "auto".
PIVOT_TESTS: dict[str, Callable[[gumbel.Pivots], TestResult]] = {
    "berk-jones": goodness_of_fit.berk_jones_test,
    "higher-criticism": goodness_of_fit.divergence_test,
    "least-favourable": pivot_score.least_favourable_test,
}
# What the short table shows.
SHORT = (
    ("sequence", "sequence", "ump"),
    ("Gumbel, model-aware", "gumbel", "model-aware"),
    ("Gumbel, auto", "gumbel", "auto"),
    ("Gumbel, sum", "gumbel", "sum"),
    ("inverse transform, model-aware", "inverse-transform", "model-aware"),
    ("tournament, model-aware", "tournament", "model-aware"),
    ("tournament, sum", "tournament", "sum"),
    ("DiPmark, model-aware", "dipmark", "model-aware"),
    ("green list *, model-aware", "green-list", "model-aware"),
    ("green list *, sum", "green-list", "sum"),
)
# Deployed schemes: as their owners read them, with the sum over tokens, and with the model where that is known.
DEPLOYED = (
    ("vllm-gumbel, sum", "vllm-gumbel", "sum"),
    ("vllm-gumbel, auto", "vllm-gumbel", "auto"),
    ("sglang-gumbel, sum", "sglang-gumbel", "sum"),
    ("sglang-gumbel, auto", "sglang-gumbel", "auto"),
    ("hf-synthid, sum", "hf-synthid", "sum"),
    ("synthid-text, sum", "synthid-text", "sum"),
    ("hf-kgw *, sum", "hf-kgw", "sum"),
)


@dataclass
class Row:
    """One test of one scheme: for each edit rate and level, the first lengths of the texts (inf: never)."""

    scheme: str
    test: str
    distortion_free: bool = True
    first: dict[tuple[float, float], list[float]] = field(default_factory=dict)


def schemes(vocabulary: int) -> Iterator[tuple[SchemeConfig, Tester]]:
    """Every registered scheme that draws token by token, deployed ones too, with default settings, and its tests."""
    for name in sorted({tag.rpartition("/")[0] for tag in known_schemes()} - {"sequence"}):
        kind = newest(name)
        if kind.purpose == "watermark":
            config = kind(**({"vocab_size": vocabulary} if name == "hf-kgw" else {}))
            yield config, tester(config)


def key_for(config: SchemeConfig, *parts: object) -> SecretKey:
    """A key whose secret is a hash of what it is for: the same in every run."""
    secret = hashlib.blake2b(repr((config.tag, *parts)).encode(), digest_size=32).digest()
    return SecretKey(secret, id="benchmark", config=config)


@dataclass
class Source:
    """A model at one temperature, its prompts, and the texts' length."""

    model: Any
    scorer: ModelScorer
    prompts: list[list[int]]
    temperature: float
    texts: int
    length: int

    def sample(self, prompt: list[int], choose: Any) -> np.ndarray:
        """One text for each key, all after one prompt."""
        ends = self.model.config.eos_token_id
        return continuations(
            self.model,
            prompt,
            choose,
            rows=self.texts,
            tokens=self.length,
            decoding=Decoding(temperature=self.temperature),
            banned=[] if ends is None else np.atleast_1d(ends).tolist(),
        )

    def laws(self, text: np.ndarray, prompt: list[int]) -> np.ndarray:
        """The law of every token of a text; float32, shape (n, V)."""
        pieces = self.scorer.log_probabilities(text, prompt=prompt, temperature=self.temperature)
        return np.concatenate([rows for _, rows in pieces])


def lengths(longest: int, step: float) -> list[int]:
    """Lengths at which a test looks: growing by a factor, but by one token at least."""
    grid = [1]
    while grid[-1] < longest:
        grid.append(min(longest, max(grid[-1] + 1, round(step * grid[-1]))))
    return grid


def edited(text: np.ndarray, rate: float, vocabulary: int, *seed: int) -> np.ndarray:
    return edit(text, "substitute", rate, vocabulary, np.random.default_rng(seed)).astype(np.int64)


def firsts(series: list[float], grid: list[int]) -> dict[float, float]:
    """First length at which log p is below each level."""
    return {
        alpha: next((float(n) for n, log_p in zip(grid, series, strict=False) if log_p < math.log(alpha)), math.inf)
        for alpha in ALPHAS
    }


def run_tests(
    tests: Tester,
    config: SchemeConfig,
    key: SecretKey,
    prompt: list[int],
    text: np.ndarray,
    laws: np.ndarray,
    grid: list[int],
) -> dict[str, dict[float, float]]:
    """First lengths of every test of a scheme, and of the best of them corrected for the choice ("auto")."""
    prf_key, log_prob = use_key(key), laws[np.arange(len(text)), text].astype(np.float64)
    whole = np.concatenate([prompt, text]).astype(np.uint32)
    series: dict[str, list[float]] = {}
    for n in grid:
        view = ModelView(lambda n=n: log_prob[:n], lambda n=n: iter([(0, laws[:n])]))
        ids = whole[: len(prompt) + n]

        def run(test: str, ids: np.ndarray = ids, view: ModelView = view) -> Any:
            return tests.test_ids(ids, len(prompt), prf_key, config, test=test, model=view)

        found = {}
        by_name = {}
        if len(tests.TESTS) > 1:
            auto = run("auto")
            found = {"auto": auto.log_pvalue}
            by_name = {one.test: one.log_pvalue for one in auto.components}
        for test in tests.TESTS:
            name = f"{config.scheme}-{test}"
            # A text too short for any coin gives no components; nothing is found there.
            found[test] = by_name[name] if name in by_name else run(test).log_pvalue
        if isinstance(config, GumbelConfig):
            seen = gumbel.observe(ids, prf_key, config, prompt_length=len(prompt))
            found |= {name: one(seen).log_pvalue for name, one in PIVOT_TESTS.items()}
        for test, log_p in found.items():
            series.setdefault(test, []).append(log_p)
        if all(min(values) < math.log(min(ALPHAS)) for values in series.values()):
            break
    return {test: firsts(values, grid) for test, values in series.items()}


def token_wise(source: Source, config: SchemeConfig, tests: Tester, rows: dict[tuple[str, str], Row]) -> None:
    vocabulary = source.model.config.vocab_size
    source = replace(source, texts=min(source.texts, COSTLY.get(config.scheme, source.texts)))
    edited_texts = 0 if config.scheme in COSTLY else EDITED_TEXTS
    # Some deployed schemes read the generated tokens alone, when they draw and when they test.
    unread = getattr(config, "completion_only", False)
    for number, prompt in enumerate(source.prompts):
        keys = [key_for(config, number, row) for row in range(source.texts)]
        draws = [
            sampler_of(config, use_key(key), unmarked_key(f"{number} {row}".encode())) for row, key in enumerate(keys)
        ]

        def choose(
            ids: np.ndarray, law: np.ndarray, draws: list[Any] = draws, skip: int = len(prompt) if unread else 0
        ) -> np.ndarray:
            rows = range(len(draws))
            return np.array([int(draws[r](ids[r : r + 1, skip:], law[r : r + 1], None)[0]) for r in rows])

        for row, text in enumerate(source.sample(prompt, choose)):
            for rate in EDIT_RATES[: 1 if row >= edited_texts else None]:
                grid = lengths(source.length, 1.3 if rate else 1.08)
                changed = edited(text, rate, vocabulary, number, row)
                laws = source.laws(changed, prompt)
                context = [] if unread else prompt
                for test, found in run_tests(tests, config, keys[row], context, changed, laws, grid).items():
                    one = rows.setdefault((config.scheme, test), Row(config.scheme, test, config.distortion_free))
                    for alpha, n in found.items():
                        one.first.setdefault((rate, alpha), []).append(n)


def sequences(source: Source, rows: dict[tuple[str, str], Row]) -> None:
    config, grid = SequenceConfig(), list(range(1, source.length + 1))
    key = key_for(config)
    for number, prompt in enumerate(source.prompts):
        nonces = [f"prompt {number} text {row}".encode() for row in range(source.texts)]
        for row, text in enumerate(source.sample(prompt, SequenceDecoder(use_key(key), nonces, config))):
            points = reals(use_key(key), nonce_words(nonces[row]), np.arange(source.length + 1))
            for rate in EDIT_RATES[: 1 if row >= EDITED_TEXTS else None]:
                changed = edited(text, rate, source.model.config.vocab_size, number, row)
                laws = source.laws(changed, prompt)
                found = sequence_tests.evidence(changed, [(0, laws)], points, config, tolerance=1e-4)
                best = -np.maximum.accumulate(np.maximum(found.log_martingale, 0.0))
                for test, series in (("ump", found.log_pvalue), ("prefix", best)):
                    one = rows.setdefault(("sequence", test), Row("sequence", test))
                    for alpha, n in firsts(series.tolist(), grid).items():
                        one.first.setdefault((rate, alpha), []).append(n)


def gumbel_medians(source: Source) -> tuple[float, float]:
    """Median lengths to p < 1e-6 of the model-aware and the sum test, on more texts: the targets."""
    config, many = GumbelConfig(), replace(source, texts=TARGET_TEXTS)
    aware, total = [], []
    for number, prompt in enumerate(source.prompts):
        keys = [use_key(key_for(config, "target", number, row)) for row in range(many.texts)]
        draws = [sampler_of(config, key, unmarked_key(b"target")) for key in keys]

        def choose(ids: np.ndarray, law: np.ndarray, draws: list[Any] = draws) -> np.ndarray:
            return np.array([int(draw(ids[r : r + 1], law[r : r + 1], None)[0]) for r, draw in enumerate(draws)])

        for key, text in zip(keys, many.sample(prompt, choose), strict=True):
            whole = np.concatenate([prompt, text]).astype(np.uint32)
            found = gumbel.observe(whole, key, config, prompt_length=len(prompt))
            (scored,) = source.scorer.score([text], prompt=prompt, temperature=source.temperature)
            for test, out in ((gumbel_tests.sum_test, total), (gumbel_tests.model_aware_test, aware)):
                first = math.inf
                for k in range(1, len(found.positions) + 1):
                    part = replace(found, positions=found.positions[:k], words=found.words[:k])
                    weights = () if test is gumbel_tests.sum_test else (scored.log_prob[part.positions],)
                    if test(part, *weights).log_pvalue < math.log(1e-6):
                        first = float(found.positions[k - 1]) + 1
                        break
                out.append(first)
    return float(np.median(aware)), float(np.median(total))


def limit_of(source: Source) -> tuple[float, dict[float, float]]:
    """Entropy per token of unmarked texts, and the limit of any distortion-free watermark."""
    surprisals, entropies = [], []
    for number, prompt in enumerate(source.prompts):
        rng = np.random.default_rng(number)
        texts = source.sample(prompt, lambda ids, law, rng=rng: (law + rng.gumbel(size=law.shape)).argmax(axis=1))
        for text in texts:
            laws = source.laws(text, prompt).astype(np.float64)
            surprisals.append(-np.cumsum(laws[np.arange(len(text)), text]))
            entropies.append(-np.sum(np.exp(laws) * np.where(np.isfinite(laws), laws, 0.0), axis=1).mean())
    found = np.array(surprisals)
    limits = {}
    for alpha in ALPHAS:
        power = np.exp(np.minimum(0.0, math.log(alpha) + found)).mean(axis=0)
        limits[alpha] = float(np.argmax(power >= 0.5)) + 1 if (power >= 0.5).any() else math.inf
    return float(np.mean(entropies)), limits


def measure(spec: str | None, temperature: float, texts: int, only: list[str] | None) -> dict[str, Any]:
    """All rows of one model at one temperature."""
    torch.set_num_threads(1)
    began = time.process_time()
    model, tokenizer = load_model(spec), load_tokenizer_for_generation(spec)
    name = "bundled" if spec is None else Path(spec).name
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    # Models of 2,048 tokens here were trained on 256 positions; longer texts of theirs say nothing.
    room = min(model.config.max_position_embeddings, 256 if model.config.vocab_size == 2048 else 10**9)
    length = min(LONGEST, room - max(map(len, prompts)))
    source = Source(model, ModelScorer(model), prompts, temperature, texts, length)
    entropy, limits = limit_of(source)
    rows: dict[tuple[str, str], Row] = {}
    for config, tests in schemes(model.config.vocab_size):
        if only and config.scheme not in only:
            continue
        started = time.process_time()
        token_wise(source, config, tests, rows)
        print(f"{name} T={temperature} {config.scheme}: {time.process_time() - started:.0f} s", file=sys.stderr)
    if not only or "sequence" in only:
        sequences(source, rows)
    records = []
    for row in rows.values():
        for (rate, alpha), values in row.first.items():
            quartiles = np.percentile(np.minimum(values, 1e9), [25, 50, 75])
            records.append(
                {
                    "model": name,
                    "temperature": temperature,
                    "entropy_nats_per_token": entropy,
                    "limit": None if math.isinf(limits[alpha]) else limits[alpha],
                    "scheme": row.scheme,
                    "distortion_free": row.distortion_free,
                    "test": row.test,
                    "edit_rate": rate,
                    "alpha": alpha,
                    "quartiles": [None if q >= 1e8 else float(q) for q in quartiles],
                    "longest": length,
                    "texts": len(values),
                }
            )
    ratios = []
    if not only:
        aware, total = gumbel_medians(source)
        ratios = [{"model": name, "temperature": temperature, "entropy": entropy, "model_aware": aware, "sum": total}]
    return {"rows": records, "ratios": ratios, "seconds": time.process_time() - began}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="folder or hub id, besides the bundled model")
    parser.add_argument("--texts", type=int, default=5, help="texts for each of the three prompts")
    parser.add_argument("--scheme", action="append", help="only these schemes")
    parser.add_argument("--temperature", action="append", type=float, help="only these temperatures")
    parser.add_argument("--no-default", action="store_true", help="leave out the bundled model")
    parser.add_argument(
        "--add", action="append", default=[], help="JSON of an earlier run, to stand in the same tables"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", default="benchmarks/results/tokens_to_detect", help="writes OUT.md and OUT.json")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    specs = ([] if arguments.no_default else [None]) + arguments.model
    jobs = [(spec, temperature) for spec in specs for temperature in arguments.temperature or TEMPERATURES]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(measure, *job, arguments.texts, arguments.scheme) for job in jobs]
        done = [task.result() for task in tasks]
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    seconds = sum(one["seconds"] for one in done)
    content = {
        "runs": [f"{processor()}, {versions}, commit {commit}, {seconds:.0f} CPU seconds"] if done else [],
        "prompts": PROMPTS,
        "ratios": [ratio for one in done for ratio in one["ratios"]],
        "rows": [row for one in done for row in one["rows"]],
    }
    for path in arguments.add:
        earlier = json.loads(Path(path).read_text(encoding="utf-8"))
        for part in ("runs", "ratios", "rows"):
            content[part] += [one for one in earlier[part] if one not in content[part]]
    Path(f"{arguments.out}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    text = report(content)
    Path(f"{arguments.out}.md").write_text(text, encoding="utf-8")
    print(text)


def report(content: dict[str, Any]) -> str:
    """The tables: verbatim and edited at p < 1e-6 in short, the two Gumbel tests, and everything."""
    rows = content["rows"]
    sources = list(dict.fromkeys((row["model"], row["temperature"]) for row in rows))
    lookup = {
        (*(row[name] for name in ("model", "temperature", "scheme", "test")), row["edit_rate"], row["alpha"]): row
        for row in rows
    }
    first = {(row["model"], row["temperature"], row["alpha"]): row for row in rows}

    def cell(source: tuple[str, float], scheme: str, test: str, rate: float, alpha: float = 1e-6) -> str:
        row = lookup.get((*source, scheme, test, rate, alpha))
        if row is None:
            return "not run"
        return f"> {row['longest']}" if row["quartiles"][1] is None else f"{row['quartiles'][1]:g}"

    def facts(source: tuple[str, float]) -> list[str]:
        low, high = (first[*source, alpha] for alpha in ALPHAS)
        bounds = ["-" if one["limit"] is None else f"{one['limit']:g}" for one in (low, high)]
        return [source[0], f"{source[1]:g}", f"{low['entropy_nats_per_token']:.2f}", " / ".join(bounds)]

    pairs = list(dict.fromkeys((row["scheme"], row["test"]) for row in rows))
    marked = {row["scheme"] for row in rows if not row["distortion_free"]}
    facts_head = ["model", "T", "nats", "limit 1e-3 / 1e-6"]
    lines = ["Median tokens to p < 1e-6, verbatim text.", ""]
    lines += table(
        [*facts_head, *(label for label, *_ in SHORT)],
        [[*facts(source), *(cell(source, scheme, test, 0.0) for _, scheme, test in SHORT)] for source in sources],
    )
    lines += ["", "Deployed schemes: median tokens to p < 1e-6, verbatim text.", ""]
    lines += table(
        [*facts_head, *(label for label, *_ in DEPLOYED)],
        [[*facts(source), *(cell(source, scheme, test, 0.0) for _, scheme, test in DEPLOYED)] for source in sources],
    )
    lines += ["", "Median tokens to p < 1e-6 with the default test, 10 % / 20 % / 30 % of the tokens replaced.", ""]
    # "auto" with a model; a scheme with one test has that.
    default = {scheme: "auto" if (scheme, "auto") in pairs else test for scheme, test in pairs}
    edited_schemes = [scheme for scheme in default if scheme not in COSTLY and scheme != "sequence"]
    lines += table(
        [*facts_head, *(scheme + " *" * (scheme in marked) for scheme in edited_schemes)],
        [
            [
                *facts(source),
                *(
                    " / ".join(cell(source, scheme, default[scheme], rate) for rate in EDIT_RATES[1:])
                    for scheme in edited_schemes
                ),
            ]
            for source in sources
        ],
    )
    lines += ["", f"Gumbel, verbatim, {len(PROMPTS) * TARGET_TEXTS} texts each, to p < 1e-6.", ""]
    lines += table(
        ["model", "T", "nats", "model-aware", "sum", "ratio"],
        [
            [
                one["model"],
                f"{one['temperature']:g}",
                f"{one['entropy']:.2f}",
                f"{one['model_aware']:g}",
                f"{one['sum']:g}",
                f"{one['model_aware'] / one['sum']:.2f}",
            ]
            for one in content["ratios"]
        ],
    )
    lines += ["", "Every test: median tokens to p < 1e-3 / p < 1e-6.", ""]
    lines += table(
        [*facts_head, "scheme", "test", "verbatim", *(f"{rate:.0%} edited" for rate in EDIT_RATES[1:])],
        [
            [
                *facts(source),
                scheme + " *" * (scheme in marked),
                test,
                *(" / ".join(cell(source, scheme, test, rate, alpha) for alpha in ALPHAS) for rate in EDIT_RATES),
            ]
            for source in sources
            for scheme, test in pairs
            if (*source, scheme, test, 0.0, 1e-6) in lookup
        ],
    )
    return "\n".join([*lines, "", *content["runs"], ""])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
