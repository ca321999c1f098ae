"""Excerpts: tokens of a document with the evidence of each, cut to the part that has most of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from assay.report.records import Excerpt

if TYPE_CHECKING:
    from assay.detection.text import LoadedTokenizer
    from assay.watermark.keys import SecretKey

MOST_TOKENS = 200
MOST_CHARACTERS = 200


def excerpt_of(doc_id: str, text: str, tokenizer: LoadedTokenizer, key: SecretKey) -> Excerpt:
    """The tokens of a text that show most evidence, with the tail probability of each token's score under the key.

    The whole text is tokenised and repeats are found in the whole text, as the test does; only then is it cut.

    Parameters
    ----------
    doc_id
        The document's id.
    text
        The whole document.
    tokenizer, key
        As in the test.
    """
    from assay.detection.testers import tester
    from assay.watermark.keys import use_key

    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, dtype=np.uint32)
    log_tails = tester(key.config).token_log_tails(ids, use_key(key), key.config)
    tails = [None if math.isnan(tail) else tail for tail in log_tails.tolist()]
    return fit(Excerpt(doc_id=doc_id, pieces=_pieces(text, encoding.offsets), log_tail=tuple(tails)))


def fit(excerpt: Excerpt) -> Excerpt:
    """The excerpt cut to the 200 consecutive tokens with most evidence, each to 200 characters."""
    first = _strongest_window(excerpt.log_tail, MOST_TOKENS)
    shown = slice(first, first + MOST_TOKENS)
    return Excerpt(
        doc_id=clean(excerpt.doc_id),
        pieces=tuple(clean(piece, most=MOST_CHARACTERS) for piece in excerpt.pieces[shown]),
        log_tail=excerpt.log_tail[shown],
        start=excerpt.start + first,
    )


def _strongest_window(log_tail: tuple[float | None, ...], size: int) -> int:
    """Where the `size` consecutive tokens begin whose scores exceed their mean under the null, 1 each, by most."""
    if len(log_tail) <= size:
        return 0
    excess = np.array([0.0 if tail is None else min(-tail, 1e3) - 1.0 for tail in log_tail])
    sums = np.concatenate([[0.0], np.cumsum(excess)])
    return int(np.argmax(sums[size:] - sums[:-size]))


def clean(text: str, *, most: int = 1000) -> str:
    """The text cut to `most` characters, with lone surrogates, which no UTF-8 file can hold, as visible escapes."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut.encode("utf-8", "backslashreplace").decode("utf-8")


def _pieces(text: str, offsets: list[tuple[int, int]]) -> tuple[str, ...]:
    """Consecutive pieces of the text, one per token: a character shared by several tokens goes to the first."""
    pieces = []
    reached = 0
    for _, end in offsets:
        pieces.append(text[reached : max(reached, end)])
        reached = max(reached, end)
    return tuple(pieces)
