"""What the exact null laws cost and what they gain: python benchmarks/null_laws.py

Process CPU time of one thread, best of three. Tails: a thousand different coins by convolution, with the width of the
proved bracket. Goodness of fit, localisation and streams: time against length. Gains: median p-values of 40 texts.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

import numpy as np

from assay.detection import (
    StreamingTest,
    berk_jones_test,
    least_favourable_test,
    localise,
    log_crossing_probability,
    sum_tail,
    sum_test,
)
from assay.watermark.gumbel import GumbelConfig, Pivots
from assay.watermark.keys import SecretKey


def cpu_ms(call: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return 1e3 * best


def pivots_of(u: np.ndarray) -> Pivots:
    words = np.minimum(np.floor((1 - u) * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    return Pivots(np.arange(len(u)), words, len(u), 0)


def convolution() -> None:
    rng = np.random.default_rng(0)
    weights, chances = rng.exponential(size=1000), rng.uniform(0.1, 0.6, 1000)
    values = np.stack([np.zeros(1000), weights], axis=1)
    probabilities = np.stack([1 - chances, chances], axis=1)
    mean, deviation = weights @ chances, math.sqrt(weights**2 @ (chances * (1 - chances)))
    print("A thousand different coins: log10 p, bracket as a factor, ms")
    for z in (5, 10, 20):
        observed = mean + z * deviation
        tail = sum_tail(values, probabilities, observed)
        took = cpu_ms(lambda at=observed: sum_tail(values, probabilities, at))
        print(f"  {tail.log_upper / math.log(10):8.1f}  {math.exp(tail.log_upper - tail.log_lower):6.3f}  {took:6.1f}")


def goodness_of_fit() -> None:
    print("Crossing probability of n bounds: n, ms")
    for n in (500, 1000, 2000, 5000):
        with np.errstate(divide="ignore"):
            bounds = np.log(np.maximum(np.arange(1, n + 1) / n - 3 / math.sqrt(n), 0.0))
        print(f"  {n:6d}  {cpu_ms(lambda at=bounds: log_crossing_probability(at)):8.1f}")


def documents() -> None:
    key = SecretKey(hashlib.sha256(b"null laws").digest(), id="null-laws", config=GumbelConfig())
    ids = np.random.default_rng(1).integers(0, 5000, 100_000).astype(np.uint32)
    print("Localisation: tokens, ms")
    for n in (1000, 10_000, 100_000):
        print(f"  {n:6d}  {cpu_ms(lambda at=n: localise(ids[:at], key)):8.1f}")
    print("Stream: tokens a call, ms a call")
    for size in (1, 100):
        test = StreamingTest(key)
        calls = 50
        start = time.process_time()
        for number in range(calls):
            test.update_many(ids[number * size : (number + 1) * size])
        print(f"  {size:6d}  {1e3 * (time.process_time() - start) / calls:8.2f}")


def gains() -> None:
    rng = np.random.default_rng(5)
    print("Tokens of law (1 - d, d): d, tokens, median log10 p of the sum test and of the least-favourable score")
    for d, n in ((0.01, 6000), (0.02, 3000), (0.05, 800), (0.1, 300)):
        law = np.array([1 - d, d])
        texts = [pivots_of(rng.random(n) ** law[rng.choice(2, n, p=law)]) for _ in range(40)]
        plain = np.median([sum_test(text).log10_pvalue for text in texts])
        best = np.median([least_favourable_test(text, delta=d).log10_pvalue for text in texts])
        print(f"  {d:5.2f}  {n:6d}  {plain:6.1f}  {best:6.1f}")
    print(
        "2,000 tokens, 60 left by an editor, drawn at probability q: q, median log10 p of the sum test and Berk-Jones"
    )
    for q in (0.1, 0.01, 0.002):
        texts = [pivots_of(np.concatenate([rng.random(60) ** q, rng.random(1940)])) for _ in range(40)]
        plain = np.median([sum_test(text).log10_pvalue for text in texts])
        shape = np.median([berk_jones_test(text).log10_pvalue for text in texts])
        print(f"  {q:5.3f}  {plain:6.1f}  {shape:6.1f}")


if __name__ == "__main__":
    convolution()
    goodness_of_fit()
    documents()
    gains()
