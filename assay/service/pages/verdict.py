"""A verdict as a reader sees it: one line in plain words, and the text with its marked parts.

Marked parts are those of `assay.detection.localisation`: over all keys tested, the probability that any part shown
holds no marked token is at most 1 in 100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup

from assay.detection.evidence import SCHEMES, gather, window_of
from assay.detection.localisation import of_lone_contexts, scan
from assay.detection.text import LoadedTokenizer
from assay.report.render import visible
from assay.watermark.keys import SecretKey, use_key

LEVEL: Final = 0.01
MOST_TOKENS: Final = 50_000
_STEPS: Final = (
    (1e-6, 3, "Very strong evidence of a mark"),
    (1e-3, 2, "Strong evidence of a mark"),
    (1e-2, 1, "Some evidence of a mark"),
)


@dataclass(frozen=True)
class Piece:
    """A stretch of the text.

    Attributes
    ----------
    html
        Escaped; characters that cannot be seen are written out.
    marked
        Whether marked tokens were found in it.
    """

    html: Markup
    marked: bool


def headline(log_pvalue: float, n_scored: int) -> tuple[int, str]:
    """How strong the evidence is, 0 to 3, and that in words."""
    if n_scored == 0:
        return 0, "Nothing could be tested"
    for pvalue, strength, words in _STEPS:
        # A value rounded to a power of ten is the bound itself, give or take the last bit.
        if log_pvalue <= math.log(pvalue) + 1e-9:
            return strength, words
    return 0, "No evidence of a mark"


def marked_spans(text: str, key: SecretKey, tokenizer: LoadedTokenizer, *, keys: int) -> list[tuple[int, int]] | None:
    """Ranges of characters in which marked tokens were found; None where it cannot be said.

    Parameters
    ----------
    text
        Checked.
    key
        The most significant of `keys` keys that were tested.
    tokenizer
        Of the marked model.
    keys
        How many; they share the level.
    """
    config = key.config
    if config.scheme not in SCHEMES or window_of(config) == 0 or getattr(config, "seeding", "left") == "self":
        return None
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, dtype=np.uint32)
    if not 0 < len(ids) <= MOST_TOKENS:
        return None
    found = of_lone_contexts(gather(ids, use_key(key), config), ids, 0, window_of(config))
    _, segments = scan(found, LEVEL / keys)
    return [(encoding.offsets[one.start][0], encoding.offsets[one.stop - 1][1]) for one in segments]


def pieces(text: str, spans: list[tuple[int, int]]) -> list[Piece]:
    """The whole text in pieces, marked and plain in turn; spans are in order and do not overlap."""
    out, reached = [], 0
    for start, stop in spans:
        start = max(start, reached)
        for until, marked in ((start, False), (stop, True)):
            if until > reached:
                out.append(Piece(visible(text[reached:until], keep="\n\t"), marked))
                reached = until
    if reached < len(text):
        out.append(Piece(visible(text[reached:], keep="\n\t"), False))
    return out
