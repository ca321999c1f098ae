"""Anytime-valid tests: evidence token by token, valid whenever one stops, for whatever reason.

Under H0 each factor has mean at most 1 given the past, so their running product, averaged over alternatives, is a
supermartingale that starts at 1: P(it ever reaches 1 / a) <= a. Reference: Ville (1939); Shafer, Shen, Vereshchagin and
Vovk (2011), arXiv:0912.4269; Ramdas et al. (2023), arXiv:2210.01948.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from assay.detection.evidence import Counts, Floats, gather, window_of
from assay.detection.gumbel import ASSUMPTIONS, MODEL_ASSUMPTIONS, NULL
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.gumbel import token_ids
from assay.watermark.keys import SecretKey, use_key

SCHEMA = "assay.stream/1"
ANYTIME = (
    "The text does not depend on the key, so neither on what the test showed: a writer who watches the evidence and "
    "reacts to it knows something of the key."
)


class StreamingTest:
    """A test that reads a text token by token and may stop at any time.

    Guarantee: for a text written without the key, P(log_pvalue <= log a at any time) <= a, and the e-value at any
    stopping time has mean at most 1. This holds for any rule to stop, and for any probabilities computed from the text
    alone.

    Parameters
    ----------
    key
        A key of one of the schemes "gumbel", "dual-gumbel", "green-list", "fixed-list", "tournament", "dipmark",
        "inverse-transform".
    alpha
        The level at which `stopped` becomes true, in (0, 1).
    prompt
        Integers, shape (m,): token ids before the text. They give context; what they show does not count.
    model_aware
        Whether each token comes with its log-probability under a model; for all schemes but "dipmark" and
        "inverse-transform", whose tokens' own probabilities say little. The evidence is then mixed over edit rates, as
        in `robust_test`; without, over strengths of the mark, as in `sum_test`.

    Raises
    ------
    ValueError
        If alpha is out of range, the scheme is another, or model_aware is asked of one that has no use for it.

    Notes
    -----
    Memory grows with the text: distinct coins are remembered, since each counts once. A call costs about 0.3 ms on one
    core, whether it brings one token or a hundred; 2 ms where compiled code is not loaded (see `kernels.prf`).
    """

    def __init__(
        self, key: SecretKey, *, alpha: float = 1e-6, prompt: npt.ArrayLike = (), model_aware: bool = False
    ) -> None:
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must be in (0, 1), got {alpha}.")
        self._window = window_of(key.config)
        self._config: Any = key.config
        self._prf_key = use_key(key)
        self._key_id = key.id
        self._alpha = alpha
        self._model_aware = model_aware
        self._ids: list[int] = []
        self._seen: set[bytes] = set()
        self._n_scored = 0
        self._n_repeats = 0
        self._best = 0.0  # largest log e-value so far; the empty product is 1
        self._stopped_at: int | None = None
        # With no ids: how many alternatives there are, and whether the scheme takes probabilities.
        nothing = gather(token_ids([]), self._prf_key, self._config, log_prob=np.empty(0) if model_aware else None)
        self._log_products = np.zeros(nothing.log_ratios.shape[1])
        self._take(token_ids(prompt), None)
        self._prompt_length = len(self._ids)
        self._n_repeats = 0  # of the text, not of the prompt

    def update(self, token: int, log_prob: float | None = None) -> float:
        """One more token; returns the log e-value.

        Parameters
        ----------
        token
            Token id.
        log_prob
            Natural logarithm of its probability given the text before it, at most 0 or NaN where unknown; exactly if
            the test is model-aware.
        """
        return self.update_many([token], None if log_prob is None else [log_prob])

    def update_many(self, tokens: npt.ArrayLike, log_prob: npt.ArrayLike | None = None) -> float:
        """Several more tokens; the same as `update` for each of them. Returns the log e-value.

        Parameters
        ----------
        tokens
            Integers, shape (n,).
        log_prob
            float64, shape (n,), exactly if the test is model-aware.

        Raises
        ------
        ValueError
            On ids out of range, log_prob missing, superfluous, of another length or above 0. Nothing is taken then.
        """
        ids = token_ids(tokens)
        if (log_prob is not None) != self._model_aware:
            raise ValueError(
                "log_prob must be given for every token of a model-aware test."
                if self._model_aware
                else "log_prob must be None unless the test was made with model_aware=True."
            )
        probabilities = None
        if log_prob is not None:
            probabilities = np.asarray(log_prob, dtype=np.float64)
            if probabilities.shape != ids.shape or np.any(probabilities > 0.0):
                raise ValueError(
                    f"log_prob must be natural logarithms, at most 0, of shape {ids.shape}; got shape "
                    f"{probabilities.shape}."
                )
        first = len(self._ids) - self._prompt_length
        places, ratios = self._take(ids, probabilities)
        if len(places):
            products = self._log_products + np.cumsum(ratios, axis=0)  # (k, alternatives)
            evalues = np.logaddexp.reduce(products, axis=1) - math.log(products.shape[1])
            self._best = max(self._best, float(evalues.max()))
            passed = np.flatnonzero(evalues >= -math.log(self._alpha))
            if self._stopped_at is None and len(passed):
                self._stopped_at = first + int(places[passed[0]]) + 1
            self._log_products = products[-1]
            self._n_scored += len(places)
        return self.log_evalue

    def _take(self, ids: Words, log_prob: Floats | None) -> tuple[Counts, Floats]:
        """Append ids; places among them of coins not seen before, and their log ratios."""
        before = self._ids[max(0, len(self._ids) - self._window) :] if self._window else []
        block = np.concatenate([np.array(before, dtype=np.uint32), ids])
        found = gather(block, self._prf_key, self._config, prompt_length=len(before), log_prob=log_prob)
        names = self._coin_names(block, found.positions + len(before))
        new = [name not in self._seen for name in names]
        self._seen.update(names)
        self._ids.extend(ids.tolist())
        self._n_repeats += found.n_repeats_dropped + new.count(False)
        kept = np.array(new, dtype=np.bool_)
        return found.positions[kept], found.log_ratios[kept]

    def _coin_names(self, block: Words, places: Counts) -> list[bytes]:
        """What tells the coins at these places apart: context and token, anchor and token, or the context alone."""
        if getattr(self._config, "seeding", None) == "self" and len(places):
            from assay.watermark.green_list import anchors_of

            contexts = np.lib.stride_tricks.sliding_window_view(block, self._window)[places - self._window]
            anchors = anchors_of(contexts, block[places], self._prf_key)
            return [row.tobytes() for row in np.stack([anchors, block[places]], axis=1)]
        # One uniform number of a context serves whatever token follows it.
        end = 0 if self._config.scheme == "inverse-transform" else 1
        return [block[place - self._window : place + end].tobytes() for place in places.tolist()]

    @property
    def log_evalue(self) -> float:
        """Natural logarithm of the e-value now."""
        return float(np.logaddexp.reduce(self._log_products)) - math.log(len(self._log_products))

    @property
    def log_pvalue(self) -> float:
        """Natural logarithm of 1 / (largest e-value so far): valid at every time together."""
        return 0.0 - self._best

    @property
    def stopped(self) -> bool:
        """Whether the p-value has come down to alpha; stays true."""
        return self._stopped_at is not None

    @property
    def stopped_at(self) -> int | None:
        """How many tokens of the text had been read when it stopped."""
        return self._stopped_at

    @property
    def n_tokens(self) -> int:
        """Tokens of the text read so far."""
        return len(self._ids) - self._prompt_length

    def result(self) -> TestResult:
        """The state of the test as a result that can be quoted."""
        return TestResult(
            test=f"{self._config.scheme}-stream",
            statistic=self._best,
            log_pvalue=self.log_pvalue,
            log_evalue=self.log_evalue,
            n_tokens=self.n_tokens,
            n_scored=self._n_scored,
            n_repeats_dropped=self._n_repeats,
            null=NULL,
            alternative="greater",
            key_id=self._key_id,
            scheme=self._config.tag,
            assumptions=(*(MODEL_ASSUMPTIONS if self._model_aware else ASSUMPTIONS), ANYTIME),
        )

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, ready for JSON. It holds the token ids read and the key's name, not its secret."""
        return {
            "schema": SCHEMA,
            "scheme": self._config.tag,
            "key_id": self._key_id,
            "alpha": self._alpha,
            "model_aware": self._model_aware,
            "ids": list(self._ids),
            "prompt_length": self._prompt_length,
            "log_products": self._log_products.tolist(),
            "n_scored": self._n_scored,
            "n_repeats": self._n_repeats,
            "log_evalue_max": self._best,
            "stopped_at": self._stopped_at,
        }

    def __getstate__(self) -> NoReturn:
        raise TypeError("StreamingTest refuses to be pickled: the key would go with it. Use state() and restore().")

    @classmethod
    def restore(cls, state: dict[str, Any], key: SecretKey) -> StreamingTest:
        """The test as it was when `state` was called.

        Parameters
        ----------
        state
            From `state`, perhaps by way of JSON.
        key
            The same key.

        Raises
        ------
        ValueError
            If the schema is another, or the key is not the one the state names.
        """
        if state.get("schema") != SCHEMA:
            raise ValueError(f"state must have schema {SCHEMA!r}, got {state.get('schema')!r}.")
        if (key.id, key.config.tag) != (state["key_id"], state["scheme"]):
            raise ValueError(
                f"key must be {state['key_id']!r} of scheme {state['scheme']!r}, got {key.id!r} of {key.config.tag!r}."
            )
        ids = token_ids(np.array(state["ids"], dtype=np.int64))
        test = cls(key, alpha=state["alpha"], prompt=ids, model_aware=state["model_aware"])
        test._prompt_length = int(state["prompt_length"])
        test._log_products = np.array(state["log_products"], dtype=np.float64)
        test._n_scored, test._n_repeats = int(state["n_scored"]), int(state["n_repeats"])
        test._best, test._stopped_at = float(state["log_evalue_max"]), state["stopped_at"]
        return test
