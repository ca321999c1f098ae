"""A private reference corpus: how far a new text is, in style, from texts that may not be shown.

Each text becomes a vector of shares in [0, 1], so that its bounds are public by construction; an `L1KDE` of the vectors
is released; the distance of a new text is its noisy sum over the noisy number of texts.
Guarantee: that of `L1KDE`, one text being one record. The distance is a score: it has no null law here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from assay._errors import TextError
from assay.privacy.accounting import Adjacency, Unit
from assay.privacy.kde.frame import Floats
from assay.privacy.kde.l1 import L1KDE
from assay.privacy.ledger import Ledger
from assay.privacy.noise import NoiseSource, Real

FEATURES = (
    "letters",
    "capitals among letters",
    "digits",
    "white space",
    "commas",
    "sentence ends",
    "other punctuation",
    "vowels among letters",
    "words of at most 3 letters",
    "words of at least 7 letters",
    "distinct among the first 100 words",
    "words that follow their like within 10",
)


@dataclass(frozen=True)
class Distances:
    """Mean distances of texts to a reference corpus; scores, no p-values.

    Attributes
    ----------
    values
        float64, shape (m,): mean over the corpus of the mean absolute difference of a feature, about 0 to 1.
    standard_errors
        float64, shape (m,): bound on the standard deviation of the noise in them, to first order.
    """

    values: Floats
    standard_errors: Floats


def style_features(text: str) -> Floats:
    """Twelve shares that describe how a text is written, in the order of `FEATURES`.

    Parameters
    ----------
    text
        Any text; the empty one has only zeros.

    Returns
    -------
    float64, shape (12,), each in [0, 1].

    Raises
    ------
    TypeError
        If it is not a string.
    TextError
        If it holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}.")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise TextError("text must be valid Unicode, got a lone surrogate. Decode the file as UTF-8 first.")
    letters = [c for c in text if c.isalpha()]
    words = ["".join(c for c in word if c.isalnum()).lower() for word in text.split()]
    words = [word for word in words if word]
    repeats = sum(word in words[max(0, i - 10) : i] for i, word in enumerate(words))
    shares = [
        _share(len(letters), len(text)),
        _share(sum(c.isupper() for c in letters), len(letters)),
        _share(sum(c.isdigit() for c in text), len(text)),
        _share(sum(c.isspace() for c in text), len(text)),
        _share(text.count(","), len(text)),
        _share(sum(c in ".!?" for c in text), len(text)),
        _share(sum(not c.isalnum() and not c.isspace() and c not in ",.!?" for c in text), len(text)),
        _share(sum(c.lower() in "aeiouy" for c in letters), len(letters)),
        _share(sum(len(word) <= 3 for word in words), len(words)),
        _share(sum(len(word) >= 7 for word in words), len(words)),
        _share(len(set(words[:100])), len(words[:100])),
        _share(repeats, len(words)),
    ]
    return np.array(shares)


def release_corpus(
    texts: Iterable[str],
    *,
    n: int,
    adjacency: Adjacency,
    epsilon: Real | None = None,
    delta: float = 0.0,
    rho: Real | None = None,
    unit: Unit = "document",
    noise: NoiseSource | None = None,
    ledger: Ledger | None = None,
) -> L1KDE:
    """Release the style of a private corpus, once.

    Guarantee: epsilon-DP, (epsilon, delta)-DP through zCDP, or rho-zCDP, for one text.

    Parameters
    ----------
    texts
        The private texts. Bound what one author contributes before, if authors are to be protected.
    n
        Declared number of texts, public; it sizes the release.
    adjacency, epsilon, delta, rho, unit
        As for `L1KDE`.
    noise, ledger
        As for `L1KDE.fit`.

    Returns
    -------
    A fitted `L1KDE` over `FEATURES`; `save` and `load` are its own.
    """
    # The whole plan is checked before a text is read.
    kde = L1KDE(
        low=0.0,
        high=1.0,
        dims=len(FEATURES),
        n=n,
        adjacency=adjacency,
        unit=unit,
        epsilon=epsilon,
        delta=delta,
        rho=rho,
    )
    kde.plan()
    vectors = np.array([style_features(text) for text in texts]).reshape(-1, len(FEATURES))
    return kde.fit(vectors, noise=noise, ledger=ledger)


def corpus_distance(corpus: L1KDE, texts: Iterable[str]) -> Distances:
    """Mean distances of new texts to a released corpus.

    The texts asked about are not protected; the corpus is, for any number of them.

    Parameters
    ----------
    corpus
        From `release_corpus`, or loaded.
    texts
        New texts.

    Raises
    ------
    ValueError
        If `corpus` was not made from `FEATURES`, or its noisy size is not positive.
    """
    if corpus.dims != len(FEATURES):
        raise ValueError(
            f"corpus must have {len(FEATURES)} features, got {corpus.dims}. Make it with release_corpus()."
        )
    size, size_error = corpus.count()
    if size <= 0:
        raise ValueError(f"corpus must have a positive noisy size, got {size:.0f}. It holds too few texts to publish.")
    vectors = np.array([style_features(text) for text in texts]).reshape(-1, len(FEATURES))
    whole = size * len(FEATURES)
    values = np.asarray(corpus.query(vectors)) / whole
    # By Minkowski, whatever the dependence of the two noises: sd(S / n) <= (sd S + (S / n) sd n) / n to first order.
    errors = corpus.standard_error(vectors) / whole + np.abs(values) * size_error / size
    return Distances(values, errors)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
