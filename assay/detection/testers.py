"""Which module tests which scheme. A module is loaded when a key of its scheme is tested, not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.schemes import SchemeConfig

_HOMES = {
    "dipmark": "assay.detection.dipmark",
    "dual-gumbel": "assay.detection.dual_gumbel",
    "fixed-list": "assay.detection.fixed_list",
    "green-list": "assay.detection.green_list",
    "gumbel": "assay.detection.gumbel",
    "hf-kgw": "assay.detection.hf_kgw",
    "hf-synthid": "assay.detection.hf_synthid",
    "inverse-transform": "assay.detection.inverse_transform",
    "payload-gumbel": "assay.detection.payload_gumbel",
    "sglang-gumbel": "assay.detection.sglang_gumbel",
    "synthid-text": "assay.detection.synthid_text",
    "tournament": "assay.detection.tournament",
    "vllm-gumbel": "assay.detection.vllm_gumbel",
}


class Tester(Protocol):
    """What a scheme's module of tests provides."""

    TESTS: tuple[str, ...]
    """Names of its tests, the model-free one first."""

    NEEDS_MODEL: frozenset[str]
    """Those of its tests that need a model."""

    NULL: str
    """The null hypothesis in words."""

    ASSUMPTIONS: tuple[str, ...]
    """What the guarantee of the model-free test rests on, one sentence each."""

    def documents_test(
        self, ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: Any
    ) -> DocumentStatistics:
        """The model-free test on many documents that lie end to end; row d equals `test_ids` on document d.

        ids: uint32, shape (n,). offsets: int64, shape (documents + 1,). prf_key: uint32, from `keys.use_key`.
        """

    def test_ids(
        self, ids: Words, prompt_length: int, prf_key: Words, config: Any, *, test: str, model: ModelView | None
    ) -> TestResult:
        """One text under one key.

        ids: uint32, shape (n,), prompt and text. prompt_length: how many of them are the prompt, which gives context
        and is not itself tested. test: "auto" or one of `TESTS`; "auto" is the model-free test without a model and the
        best of several, corrected for the choice, with one.
        """

    def token_log_tails(self, ids: Words, prf_key: Words, config: Any) -> npt.NDArray[np.float64]:
        """For pictures: the evidence of each token of a text, float64, shape (n,).

        Natural log of the chance under the null of a score at least as large as the token's own; NaN where the token
        does not count.
        """


def tester(config: SchemeConfig) -> Tester:
    """The tests of a key's scheme.

    Raises
    ------
    ValueError
        If no test of the scheme is known.
    """
    if config.scheme == "sequence":
        raise ValueError(
            "scheme 'sequence' must be tested with the nonce of the text: use assay.detection.sequence.sequence_test."
        )
    if config.scheme not in _HOMES:
        raise ValueError(f"scheme must be one of {sorted(_HOMES)} to be tested, got {config.tag!r}.")
    return cast("Tester", import_module(_HOMES[config.scheme]))
