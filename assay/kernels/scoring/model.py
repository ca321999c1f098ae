"""Documents through a causal language model: per-token statistics for corpora, whatever the documents are batched with.

The base model runs once per window; the vocabulary projection runs on the tokens that count and keeps no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from assay.kernels.scoring import statistics
from assay.kernels.scoring.causal import take_apart
from assay.kernels.scoring.decoding import Decoding, warp
from assay.kernels.scoring.fingerprint import weights_sha256
from assay.kernels.scoring.head import Projection
from assay.kernels.scoring.statistics import DEFAULT_TILTS, TokenStatistics
from assay.kernels.scoring.tokens import score_logits, score_tokens
from assay.kernels.scoring.windows import Ids, Window, batch_end, cut, longest_first

if TYPE_CHECKING:
    from collections.abc import Iterator

Document = str | Sequence[int] | npt.NDArray[np.integer[Any]]

_CPU_BUDGET, _GPU_BUDGET = 2048, 32768
_LAWS = 1 << 22  # log-probabilities in one piece: 16 MiB
_WHOLE_LOGITS = 1 << 27  # logits per call where a model gives no hidden states to work from: half a gigabyte


class ModelScorer:
    """Per-token statistics of documents under a causal language model.

    A document's statistics do not depend on what it is batched with, up to the rounding of the model's own arithmetic:
    in float32 about 1e-5 per log-probability.

    Parameters
    ----------
    model
        A transformers causal language model. It is put into evaluation mode, and moved if `device` or `dtype` is given.
    tokenizer
        Turns documents given as text into ids; not needed for documents given as ids.
    device, dtype
        Where and in which precision the model runs; None leaves it as it is.
    window
        Tokens the model reads at once, >= 2; None takes the model's own limit, or 2048 if it has none.
    stride
        Step between windows of a longer document, in [1, window]; None takes half a window. A token past the first
        window is predicted from at least window - stride tokens.
    token_budget
        Tokens per model call, padding included, >= 1; None takes 2048 on a CPU and 32768 on a GPU. A batch that does
        not fit into memory is halved, and those after it too.
    add_bos
        Whether documents without a prompt are read after the model's beginning-of-sequence token, where it has one.
    tilts
        The grid s of `TokenStatistics.tilted_log_sums`, each below 1.
    logits_dtype
        See `tokens.score_tokens`.

    Raises
    ------
    ValueError
        On a setting out of range or a model that is not causal.

    Notes
    -----
    Documents are not packed into one row. Batches of like length carry about 1 % of padding, which is all that packing
    could save, and without a fused variable-length attention packing costs more than that. Padding stands on the right,
    where causal attention does not see it.
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
        token_budget: int | None = None,
        add_bos: bool = True,
        tilts: Sequence[float] = DEFAULT_TILTS,
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
        self._parts = take_apart(model.eval())
        self.model = model
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        self.window = _whole("window", window if window is not None else limit or 2048, 2, limit)
        self.stride = _whole("stride", stride if stride is not None else self.window // 2, 1, self.window)
        default = _CPU_BUDGET if self._parts.device.type == "cpu" else _GPU_BUDGET
        self.token_budget = _whole("token_budget", token_budget if token_budget is not None else default, 1, None)
        self.tilts = np.asarray(tilts, dtype=np.float64)
        self._logits_dtype = logits_dtype
        bos = config.bos_token_id if add_bos else None
        self._bos: Ids = np.array([] if bos is None else [bos], dtype=np.int64)

    @property
    def full_logits_reason(self) -> str:
        """Why the model's own logits are used, all held at once; empty where the projection runs on its own."""
        return self._parts.reason

    def identity(self) -> dict[str, Any]:
        """All that decides this scorer's numbers, as a JSON-ready dict: two scorers with equal dicts score alike.

        Returns
        -------
        dict of name (where the model came from, for people), weights_sha256, dtype, logits_dtype, window, stride and
        bos, the id that documents without a prompt are read after, or None.

        Notes
        -----
        Hashing reads all weights, about a second per gigabyte.
        """
        parameters = next(iter(self.model.parameters()))
        return {
            "name": str(getattr(self.model, "name_or_path", "") or type(self.model).__name__),
            "weights_sha256": weights_sha256(self.model),
            "dtype": str(parameters.dtype).removeprefix("torch."),
            "logits_dtype": str(self._logits_dtype).removeprefix("torch."),
            "window": self.window,
            "stride": self.stride,
            "bos": int(self._bos[0]) if len(self._bos) else None,
        }

    def score(
        self,
        documents: Sequence[Document],
        *,
        prompt: Sequence[int] | Sequence[Document | None] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        other: ModelScorer | None = None,
        progress: bool = False,
    ) -> list[TokenStatistics]:
        """Statistics of every token of every document, aligned to the document's tokens.

        Parameters
        ----------
        documents
            Token ids, one integer array of shape (n,) per document, or texts if the scorer has a tokenizer.
        prompt
            What stood before the documents and is not scored: ids for all of them, or one entry per document. A
            prompt replaces the beginning-of-sequence token; an entry None keeps it.
        temperature, top_k, top_p, min_p
            The decoding rule the null hypothesis assumes; see `decoding.Decoding`.
        other
            A scorer of a second model over the same vocabulary; its law q gives the cross-entropy -sum_v p_v log q_v.
            Windows and prompts are those of this scorer.
        progress
            Whether to show a progress bar on standard error.

        Returns
        -------
        One `TokenStatistics` per document, float64 on the CPU. The first token of a document that has nothing before
        it is not scored.

        Raises
        ------
        ValueError
            On ids outside the model's vocabulary, a text without a tokenizer, or a decoding rule out of range.
        """
        decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        ids = [self._ids(document, f"documents[{d}]") for d, document in enumerate(documents)]
        contexts = self._contexts(prompt, len(ids))
        out = [statistics.empty(len(one), self.tilts, cross=other is not None) for one in ids]
        windows = longest_first(
            w for d, one in enumerate(ids) for w in cut(d, contexts[d], one, self.window, self.stride)
        )
        budget, start = self._budget(other), 0
        with _progress(progress, sum(len(w.targets) for w in windows)) as advance:
            while start < len(windows):
                end = batch_end(windows, start, budget)
                try:
                    rows = self._score_batch(windows[start:end], decoding, other)
                except (RuntimeError, MemoryError) as error:
                    if not _out_of_memory(error) or end - start == 1:
                        raise
                    budget = len(windows[start].inputs) * ((end - start) // 2)
                    continue
                place = 0
                for window in windows[start:end]:
                    count = len(window.targets)
                    target = slice(window.place, window.place + count)
                    statistics.fill(out[window.document], target, rows.rows(slice(place, place + count)))
                    place += count
                start = end
                advance(place)
        return out

    @torch.inference_mode()
    def log_probabilities(
        self,
        document: Document,
        *,
        prompt: Document | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """The whole law of each token of one document, in pieces that keep memory bounded.

        Parameters
        ----------
        document, prompt
            As one entry of `score`'s.
        temperature, top_k, top_p, min_p
            The decoding rule; see `decoding.Decoding`.

        Yields
        ------
        place
            Index in the document of the piece's first token; pieces come in order.
        log_probabilities
            float32, shape (k, V), natural log; -inf where the rule removed a candidate. Row i is the law of token
            place + i, given all before it. A first token that has nothing before it has no row.

        Raises
        ------
        ValueError
            As `score`.
        """
        decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        ids = self._ids(document, "document")
        context = self._bos if prompt is None else self._ids(prompt, "prompt")
        parts, step = self._parts, max(1, _LAWS // self._parts.vocabulary)
        for window in cut(0, context, ids, self.window, self.stride):
            inputs = torch.from_numpy(window.inputs)[None]
            states = parts.logits(inputs)[0] if parts.head is None else parts.hidden(inputs)[0]
            for start in range(window.first, len(window.inputs), step):
                rows = states[start : start + step]
                if parts.head is not None:
                    rows = Projection(rows, parts.head, self._logits_dtype).whole()
                law = torch.log_softmax(warp(rows.float(), decoding), dim=-1)
                yield window.place + start - window.first, law.numpy(force=True)

    def _budget(self, other: ModelScorer | None) -> int:
        if self._parts.head is not None and (other is None or other._parts.head is not None):
            return self.token_budget
        return min(self.token_budget, max(1, _WHOLE_LOGITS // self._parts.vocabulary))

    def _ids(self, document: Document, name: str) -> Ids:
        if isinstance(document, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is a text, and the scorer has no tokenizer. Pass token ids, or tokenizer=.")
            document = self.tokenizer(document, add_special_tokens=False)["input_ids"]
        array = np.asarray(document)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"{name} must be integers of shape (n,), got {array.dtype} of shape {array.shape}.")
        if array.size and not (array.min() >= 0 and array.max() < self._parts.vocabulary):
            raise ValueError(
                f"{name} must hold ids in [0, {self._parts.vocabulary}), got {array.min()} to {array.max()}. "
                "Use the tokenizer that belongs to the model."
            )
        return array.astype(np.int64)

    def _contexts(self, prompt: Sequence[Any] | None, count: int) -> list[Ids]:
        if prompt is None:
            return [self._bos] * count
        if all(isinstance(entry, int | np.integer) for entry in prompt):
            return [self._ids(prompt, "prompt")] * count
        if len(prompt) != count:
            raise ValueError(f"prompt must have one entry per document ({count}), got {len(prompt)}.")
        return [self._bos if entry is None else self._ids(entry, f"prompt[{d}]") for d, entry in enumerate(prompt)]

    @torch.inference_mode()
    def _score_batch(self, batch: list[Window], decoding: Decoding, other: ModelScorer | None) -> TokenStatistics:
        """Statistics of all targets of the batch, window after window."""
        length = max(len(w.inputs) for w in batch)
        # No attention mask: padding on the right is invisible to causal attention, and the mask would cost the fast
        # path of attention on a CPU.
        inputs = torch.zeros((len(batch), length), dtype=torch.int64)
        for row, window in enumerate(batch):
            inputs[row, : len(window.inputs)] = torch.from_numpy(window.inputs)
        places = np.concatenate([r * length + np.arange(w.first, len(w.inputs)) for r, w in enumerate(batch)])
        index = torch.from_numpy(places)
        targets = torch.from_numpy(np.concatenate([w.targets for w in batch]))

        def rows(states: torch.Tensor) -> torch.Tensor:
            return states.flatten(0, 1)[index.to(states.device)]

        ours, theirs = self._parts, None if other is None else other._parts
        tilts = tuple(self.tilts)
        if ours.head is None or (theirs is not None and theirs.head is None):
            logits = rows(ours.logits(inputs))
            beside = None if theirs is None else rows(theirs.logits(inputs)).to(logits.device)
            targets = targets.to(logits.device)
            return score_logits(logits, targets, decoding=decoding, tilts=tilts, other_logits=beside)
        hidden = rows(ours.hidden(inputs))
        second = None if theirs is None or theirs.head is None else (rows(theirs.hidden(inputs)), theirs.head)
        return score_tokens(
            hidden,
            ours.head,
            targets.to(hidden.device),
            decoding=decoding,
            tilts=tilts,
            other=second,
            logits_dtype=self._logits_dtype,
        )


def _whole(name: str, value: int, lowest: int, highest: int | None) -> int:
    if isinstance(value, bool) or value != int(value) or value < lowest or (highest is not None and value > highest):
        accepted = f"at least {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise ValueError(f"{name} must be an integer {accepted}, got {value}.")
    return int(value)


def _out_of_memory(error: BaseException) -> bool:
    # On the CPU torch raises a plain RuntimeError that only its text tells apart.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Scoring tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
