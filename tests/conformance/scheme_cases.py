"""What the suite needs of a scheme: draw tokens, write texts, test documents; the same calls for every scheme.

A registered scheme is taken up by itself: its settings come from their defaults, its sampler and tests from their
contracts. What a scheme must be told stands in `SETTINGS`; a scheme with a contract of its own stands in `OTHERS`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from assay.detection.model_view import ModelView
from assay.detection.testers import tester
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import SchemeConfig, known_schemes, newest, sampler_of

VOCABULARY = 2048
PROMPT = 8

# Settings that have no default, or whose default would only make the suite slow.
SETTINGS: dict[str, dict[str, Any]] = {"hf-kgw": {"vocab_size": VOCABULARY}, "payload-gumbel": {"bits": 4}}


def watermark_schemes() -> list[str]:
    """Names of all registered watermark schemes."""
    names = {tag.rpartition("/")[0] for tag in known_schemes()}
    return sorted(name for name in names if newest(name).purpose == "watermark")


def law(rng: np.random.Generator, concentration: float, candidates: int = 40) -> np.ndarray:
    """Log-probabilities of a law on some of the vocabulary, float32."""
    row = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    chosen = rng.choice(VOCABULARY, candidates, replace=False)
    row[chosen] = np.log(np.maximum(rng.dirichlet(np.full(candidates, concentration)), 1e-30))
    return row


class Case:
    """A scheme that draws token by token and brings a module of tests."""

    def __init__(self, scheme: str, **settings: Any) -> None:
        self.config: Any = newest(scheme)(**{**SETTINGS.get(scheme, {}), **settings})
        self.completion_only = getattr(self.config, "completion_only", False)

    def key(self, number: int) -> np.ndarray:
        secret = hashlib.sha256(f"conformance {number}".encode()).digest()
        return use_key(SecretKey(secret, id=f"conformance-{number}", config=self.config))

    def sampler(self, key: np.ndarray, seed: int = 0) -> Any:
        return sampler_of(self.config, key, unmarked_key(seed.to_bytes(4, "little")))

    def next_tokens(self, number: int, histories: np.ndarray, laws: np.ndarray) -> np.ndarray:
        """One token after each history, under one key; unmarked draws are fresh for each number."""
        return self.sampler(self.key(number), number)(histories, laws, None)

    def write(self, number: int, laws: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Texts under one key, one per prompt: laws float32 (rows, n, V); int64 (rows, prompt + n)."""
        draw, ids = self.sampler(self.key(number)), prompts
        for t in range(laws.shape[1]):
            ids = np.concatenate([ids, draw(ids, laws[:, t], None)[:, None]], axis=1)
        return ids

    def log_pvalue(
        self, number: int, ids: np.ndarray, prompt_length: int, laws: np.ndarray | None = None, test: str = "auto"
    ) -> float:
        """Of one document; without laws, of the model-free test."""
        view = None
        if laws is not None:
            text = ids[prompt_length:].astype(np.int64)
            own = laws[np.arange(len(text)), text].astype(np.float64)
            view = ModelView(lambda: own, lambda: iter([(0, laws)]))
        module = tester(self.config)
        words = np.asarray(ids, dtype=np.uint32)
        return module.test_ids(words, prompt_length, self.key(number), self.config, test=test, model=view).log_pvalue

    def null_log_pvalues(self, documents: list[np.ndarray], keys: range) -> np.ndarray:
        """Of the model-free test: document number mod len(documents) under each key."""
        module, out = tester(self.config), np.empty(len(keys))
        for place, number in enumerate(keys):
            ids = documents[number % len(documents)]
            offsets = np.array([0, len(ids)], dtype=np.int64)
            out[place] = module.documents_test(ids, offsets, self.key(number), self.config).log_pvalue[0]
        return out


class SequenceCase(Case):
    """The sequence watermark: it reads every law of a text in order, and its test needs them and the nonce."""

    completion_only = False

    def next_tokens(self, number: int, histories: np.ndarray, laws: np.ndarray) -> np.ndarray:
        from assay.watermark.sequence import SequenceDecoder

        nonces = [hashlib.sha256(row.tobytes()).digest() for row in histories]
        return SequenceDecoder(self.key(number), nonces, self.config)(histories, laws)

    def write(self, number: int, laws: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        from assay.watermark.sequence import SequenceDecoder

        decoder = SequenceDecoder(self.key(number), [self._nonce(prompt) for prompt in prompts], self.config)
        ids = prompts
        for t in range(laws.shape[1]):
            ids = np.concatenate([ids, decoder(ids, laws[:, t])[:, None]], axis=1)
        return ids

    def log_pvalue(
        self, number: int, ids: np.ndarray, prompt_length: int, laws: np.ndarray | None = None, test: str = "auto"
    ) -> float:
        from assay.detection.sequence import evidence, prefix_result, ump_result
        from assay.watermark.sequence import nonce_words, reals

        text = np.asarray(ids[prompt_length:], dtype=np.uint32)
        if laws is None:
            laws = np.full((len(text), VOCABULARY), -math.log(VOCABULARY), dtype=np.float32)
        nonce = nonce_words(self._nonce(np.asarray(ids[:prompt_length])))
        points = reals(self.key(number), nonce, np.arange(len(text) + 1))
        found = evidence(text, [(0, laws)], points, self.config, tolerance=1e-4)
        smallest = min(ump_result(found).log_pvalue, prefix_result(found).log_pvalue)
        return min(0.0, smallest + math.log(2.0))

    def null_log_pvalues(self, documents: list[np.ndarray], keys: range) -> np.ndarray:
        short = [ids[:12] for ids in documents]  # uniform laws: a dozen tokens say all
        return np.array([self.log_pvalue(number, short[number % len(short)], 0) for number in keys])

    @staticmethod
    def _nonce(prompt: np.ndarray) -> bytes:
        return hashlib.sha256(prompt.astype(np.int64).tobytes()).digest()


# Schemes that cannot be drawn token by token; each has a case of its own, so that the checks still run.
OTHERS: dict[str, type[Case]] = {"sequence": SequenceCase}


def case_of(scheme: str, **settings: Any) -> Case:
    return OTHERS.get(scheme, Case)(scheme, **settings)


def without_default(config: type[SchemeConfig]) -> bool:
    """Whether the settings cannot be made without arguments."""
    try:
        config()
    except TypeError:
        return True
    return False


@cache
def marked(scheme: str, rows: int = 6, n: int = 120) -> tuple[np.ndarray, np.ndarray, int]:
    """Texts under key 1, the laws of their tokens, and the length of their prompts."""
    case, rng = case_of(scheme), np.random.default_rng(11)
    laws = np.stack([[law(rng, 0.1) for _ in range(n)] for _ in range(rows)])
    length = 0 if case.completion_only else PROMPT
    return case.write(1, laws, rng.integers(0, VOCABULARY, (rows, length))), laws, length


def histories(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Histories no two of which end alike, whatever the width of the context."""
    ids = rng.integers(0, VOCABULARY, (rows, PROMPT))
    ids[:, -1] = rng.choice(VOCABULARY, rows, replace=False)
    return ids


def numbered(rows: int, n: int, d: float) -> Iterator[np.ndarray]:
    """Laws (1 - d, d) on two ids that no other step uses: i.i.d. tokens, and no context twice."""
    for t in range(n):
        row = np.full((rows, 2 * n), -np.inf, dtype=np.float32)
        row[:, 2 * t], row[:, 2 * t + 1] = math.log1p(-d), math.log(d)
        yield row
