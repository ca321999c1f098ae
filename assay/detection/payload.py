"""Decoding a payload, with p-values that hold over all 2^bits payloads.

"The payload is THIS one": for each bit, the tokens whose registers would show it flipped. If the flipped payload is the
true one, or there is none, their words under the named payload are independent of the text and uniform, so their sum
of -log(1 - U) is Gamma(n, 1). Proofs: docs/explanation/schemes.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.detection.payload_gumbel import sum_test, tables
from assay.detection.result import TestResult, format_pvalue
from assay.detection.tails import log_gamma_sf
from assay.detection.trellis import best_payload
from assay.watermark.gumbel import token_ids
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.payload import PayloadConfig, PayloadPivots, observe, registers


@dataclass(frozen=True, kw_only=True)
class PayloadResult:
    """What a text carries under one key, and how sure that is.

    Guarantee: for a text written without the key, P(marked.pvalue <= a) <= a. For a text that carries no mark or
    another payload than `payload`, however it was edited without the key, P(payload_pvalue <= a) <= a: the chance that
    ANY wrong payload is named at level a is at most a. Both count all 2^bits payloads.

    Attributes
    ----------
    payload
        The maximum-likelihood payload, in [0, 2^bits). Named for every text; trust it as far as the p-values go.
    bits
        Its length.
    marked
        The test of "written without the key" against "marked under the key with some payload".
    log_payload_pvalue
        Natural logarithm of the family-wise p-value of "the payload is another one, or there is none".
    log_bit_pvalues
        float64, shape (bits,): the same for each bit of the payload, bit 0 first, corrected for all bits together.
        Where the whole payload is not certain, these say which of its bits are.
    tokens_per_step
        int64, shape (bits,): how many counted tokens each step of the code has.
    """

    payload: int
    bits: int
    marked: TestResult
    log_payload_pvalue: float
    log_bit_pvalues: npt.NDArray[np.float64]
    tokens_per_step: npt.NDArray[np.int64]

    @property
    def payload_pvalue(self) -> float:
        """The p-value of the named payload; 0.0 only where it is below the smallest float."""
        return math.exp(self.log_payload_pvalue)

    def sentence(self) -> str:
        """The result as one sentence for a reader who knows no statistics."""
        if self.marked.n_scored == 0:
            return self.marked.sentence()
        odds, right = format_pvalue(self.marked.log_pvalue), format_pvalue(self.log_payload_pvalue)
        return (
            f"A text written without the key would look this marked with probability at most {odds}; payload "
            f"{self.payload} would be named for a text that does not carry it with probability at most {right} "
            f"({self.marked.n_scored} of {self.marked.n_tokens} tokens counted)."
        )

    def __repr__(self) -> str:
        return (
            f"PayloadResult(payload={self.payload}, bits={self.bits}, "
            f"marked_pvalue={format_pvalue(self.marked.log_pvalue)}, "
            f"payload_pvalue={format_pvalue(self.log_payload_pvalue)}, n_scored={self.marked.n_scored})"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "schema": "assay.payload-result/1",
            "payload": self.payload,
            "bits": self.bits,
            "marked": self.marked.to_dict(),
            "log_payload_pvalue": self.log_payload_pvalue,
            "log_bit_pvalues": self.log_bit_pvalues.tolist(),
            "tokens_per_step": self.tokens_per_step.tolist(),
        }


def decode(tokens: npt.ArrayLike, key: SecretKey, *, prompt: npt.ArrayLike = ()) -> PayloadResult:
    """The payload of a text, with p-values that hold over all 2^bits payloads. Needs no model.

    Parameters
    ----------
    tokens
        Integers, shape (n,): token ids of the text.
    key
        A key of scheme "payload-gumbel".
    prompt
        Token ids before the text, where known: context for its first tokens, not itself tested.

    Returns
    -------
    PayloadResult. With no scorable token its p-values are 1.

    Raises
    ------
    ValueError
        On ids out of range or a key of another scheme.

    Notes
    -----
    2^(K + 1) ChaCha permutations per token and O(bits 4^K) for the code, K = min(8, bits).

    Examples
    --------
    >>> key = SecretKey.generate(config=PayloadConfig(bits=16))
    >>> decode(range(40), key).bits
    16
    """
    if not isinstance(key, SecretKey) or not isinstance(key.config, PayloadConfig):
        got = key.config.tag if isinstance(key, SecretKey) else type(key).__name__
        raise ValueError(
            f"key must be for scheme 'payload-gumbel', got {got!r}. Make one with "
            "SecretKey.generate(config=PayloadConfig())."
        )
    before = token_ids(prompt)
    ids = np.concatenate([before, token_ids(tokens)])
    return decode_pivots(observe(ids, use_key(key), key.config, prompt_length=len(before)), key.config)


def decode_pivots(pivots: PayloadPivots, config: PayloadConfig) -> PayloadResult:
    """As `decode`, from what a document shows."""
    scores, counts = tables(pivots.steps, pivots.words, config)
    payload, _ = best_payload(scores)
    code = registers(payload, config)
    along = scores[np.arange(config.bits), code]
    # Bit i shows in registers i, ..., i + K - 1: the tokens of these steps speak for it.
    windows = (np.arange(config.bits)[:, None] + np.arange(config.memory)) % config.bits
    tails = log_gamma_sf(counts[windows].sum(axis=1), along[windows].sum(axis=1))
    any_payload, any_bit = _log_wrong_claims(config)
    return PayloadResult(
        payload=payload,
        bits=config.bits,
        marked=sum_test(pivots, config),
        log_payload_pvalue=min(0.0, float(tails.max()) + any_payload),
        log_bit_pvalues=np.minimum(0.0, tails + any_bit),
        tokens_per_step=counts,
    )


def _log_wrong_claims(config: PayloadConfig) -> tuple[float, float]:
    """log of how many statistics there are of which one must be extreme to name a wrong payload, or a wrong bit.

    Bit i is judged by K registers, which show w = min(2 K - 1, bits) bits: 2^w patterns. A wrong payload has a wrong
    bit i, and is named only if one of the 2^(w - 1) patterns with that bit flipped is extreme; or it is named for a
    text without a mark, for which bit 0 alone must have one of 2^w. Nor are there more than 2^bits payloads.
    """
    shown = min(2 * config.memory - 1, config.bits)
    windows = 1 if config.memory == config.bits else config.bits  # all bits share one window in a short payload
    any_payload = min(config.bits, max(math.log2(windows) + shown - 1, shown))
    return any_payload * math.log(2.0), math.log(windows) + shown * math.log(2.0)
