"""Documents through a causal language model: per-token statistics for corpora, whatever the documents are batched with.

The base model runs once per window; the vocabulary projection runs on the tokens that count and keeps no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay.kernels.scoring import statistics
from assay.kernels.scoring.decoding import Decoding, warp
from assay.kernels.scoring.reference import row_statistics
from assay.kernels.scoring.statistics import DEFAULT_TILTS, TokenStatistics
from assay.kernels.scoring.windows import Ids, Window, batches, cut

Document = str | Sequence[int] | npt.NDArray[np.integer[Any]]


class ModelScorer:
    """Per-token statistics of documents under a causal language model.

    Parameters
    ----------
    model
        A transformers causal language model.
    tokenizer
        Turns documents given as text into ids; not needed for documents given as ids.
    device, dtype
        Where and in which precision the model runs; None leaves it as it is.
    window
        Tokens the model reads at once, >= 2; None takes the model's own limit.
    stride
        Step between windows of a longer document, in [1, window]; None takes half a window. A token past the first
        window is predicted from at least window - stride tokens.
    token_budget
        Tokens per model call, padding included, >= 1.
    add_bos
        Whether documents without a prompt are read after the model's beginning-of-sequence token, where it has one.
    tilts
        The grid s of `TokenStatistics.tilted_log_sums`, each below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
        stride: int | None = None,
        token_budget: int = 16384,
        add_bos: bool = True,
        tilts: Sequence[float] = DEFAULT_TILTS,
    ) -> None:
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.window = window or getattr(model.config, "max_position_embeddings", None) or 2048
        self.stride = stride or max(1, self.window // 2)
        self.token_budget = token_budget
        self.tilts = np.asarray(tilts, dtype=np.float64)
        bos = model.config.bos_token_id if add_bos else None
        self._bos: Ids = np.array([] if bos is None else [bos], dtype=np.int64)

    def score(
        self,
        documents: Sequence[Document],
        *,
        prompt: Sequence[int] | Sequence[Document | None] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        progress: bool = False,
    ) -> list[TokenStatistics]:
        """Statistics of every token of every document, aligned to the document's tokens.

        Parameters
        ----------
        documents
            Token ids, one integer array of shape (n,) per document, or texts if the scorer has a tokenizer.
        prompt
            What stood before the documents and is not scored: ids for all of them, or one entry per document. A
            prompt replaces the beginning-of-sequence token.
        temperature, top_k, top_p, min_p
            The decoding rule the null hypothesis assumes; see `decoding.Decoding`.
        progress
            Whether to show a progress bar on standard error.

        Returns
        -------
        One `TokenStatistics` per document, float64 on the CPU. The first token of a document that has nothing before
        it is not scored.
        """
        decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        ids = [self._ids(document) for document in documents]
        contexts = self._contexts(prompt, len(ids))
        out = [statistics.empty(len(one), self.tilts) for one in ids]
        windows = [w for d, one in enumerate(ids) for w in cut(d, contexts[d], one, self.window, self.stride)]
        for batch in batches(windows, self.token_budget):
            for window, rows in zip(batch, self._score_batch(batch, decoding), strict=True):
                statistics.fill(out[window.document], slice(window.place, window.place + len(rows)), rows)
        return out

    def _ids(self, document: Document | None) -> Ids:
        if document is None:
            return self._bos
        if isinstance(document, str):
            document = self.tokenizer(document, add_special_tokens=False)["input_ids"]
        return np.asarray(document, dtype=np.int64)

    def _contexts(self, prompt: Sequence[Any] | None, count: int) -> list[Ids]:
        if prompt is None:
            return [self._bos] * count
        if all(isinstance(entry, (int, np.integer)) for entry in prompt):
            return [np.asarray(prompt, dtype=np.int64)] * count
        if len(prompt) != count:
            raise ValueError(f"prompt must have one entry per document ({count}), got {len(prompt)}.")
        return [self._ids(entry) for entry in prompt]

    @torch.inference_mode()
    def _score_batch(self, batch: list[Window], decoding: Decoding) -> list[TokenStatistics]:
        length = max(len(w.inputs) for w in batch)
        # Padding on the right is invisible to causal attention, so no mask is needed: that keeps the fast path.
        inputs = torch.zeros((len(batch), length), dtype=torch.int64)
        for row, window in enumerate(batch):
            inputs[row, : len(window.inputs)] = torch.from_numpy(window.inputs)
        logits = self.model(input_ids=inputs.to(self.model.device), use_cache=False).logits
        out = []
        for row, window in enumerate(batch):
            one = logits[row, window.first : len(window.inputs)].float().cpu()
            out.append(row_statistics(warp(one, decoding), torch.from_numpy(window.targets), self.tilts))
        return out
