"""From text to token ids: tokenizers by name, path or object, checked text, batches that lie end to end.

Only the `tokenizers` library is used, so testing a text needs no torch.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from assay._errors import TextError
from assay.kernels.chacha import Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "default"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what identifies it in a result.

    Attributes
    ----------
    backend
        The `tokenizers.Tokenizer`.
    name
        Where it came from, for people.
    sha256
        Hash of its canonical JSON: two tokenizers with equal hashes give equal ids.
    """

    backend: Tokenizer
    name: str
    sha256: str

    def encode(self, text: str) -> Words:
        """Token ids of one checked text, no special tokens added: uint32, shape (n,)."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> Words:
        """Token ids of a checked prompt as a generator reads it, with the special tokens that the tokenizer adds."""
        return np.array(self.backend.encode(check_text(text)).ids, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> tuple[Words, npt.NDArray[np.int64]]:
        """Token ids of many texts end to end.

        Returns
        -------
        ids
            uint32, shape (n,).
        offsets
            int64, shape (len(texts) + 1,): text i is ids[offsets[i]:offsets[i + 1]].
        """
        for text in texts:
            check_text(text)
        encode = getattr(self.backend, "encode_batch_fast", self.backend.encode_batch)
        # array reads a list of ints four times as fast as numpy does, which is felt beside the tokeniser.
        pieces = [array("I", encoding.ids) for encoding in encode(list(texts), add_special_tokens=False)]
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        ids = np.empty(int(offsets[-1]), dtype=np.uint32)
        for i, piece in enumerate(pieces):
            ids[offsets[i] : offsets[i + 1]] = piece
        return ids, offsets


def load_tokenizer(spec: Any = None) -> LoadedTokenizer:
    """A tokenizer from whatever names it.

    Parameters
    ----------
    spec
        None or "default" for the bundled model's; a folder with tokenizer.json or such a file; a hub id; a
        `tokenizers.Tokenizer`; or a fast transformers tokenizer.

    Raises
    ------
    ValueError
        If nothing usable is found there; the message says what was looked for.
    """
    from tokenizers import Tokenizer

    if isinstance(spec, LoadedTokenizer):
        return spec
    if isinstance(spec, Tokenizer):
        return _loaded(spec, "tokenizers.Tokenizer object")
    backend = getattr(spec, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return _loaded(backend, str(getattr(spec, "name_or_path", "") or type(spec).__name__))
    if spec is None or spec == "default":
        return _loaded(Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json")), "default")
    if not isinstance(spec, (str, os.PathLike)):
        raise ValueError(
            f"tokenizer must be a path, a hub id, a tokenizers.Tokenizer or a fast transformers tokenizer, "
            f"got {type(spec).__name__}. A slow tokenizer has no tokenizer.json: load it with use_fast=True."
        )
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        try:
            return _loaded(Tokenizer.from_file(str(path)), str(spec))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {str(spec)!r} is not a tokenizer.json that can be read: {error}.") from error
    if path.exists() or path.suffix == ".json" or str(spec).startswith((".", os.sep)):
        raise ValueError(f"tokenizer must be a folder with tokenizer.json or such a file; none is at {str(spec)!r}.")
    try:
        return _loaded(Tokenizer.from_pretrained(str(spec)), str(spec))
    except Exception as error:
        raise ValueError(
            f"tokenizer {str(spec)!r} is neither a local path nor a hub id that can be fetched: {error}. "
            "Pass a folder that holds tokenizer.json."
        ) from error


def _loaded(backend: Tokenizer, name: str) -> LoadedTokenizer:
    # Truncation and padding are left over from training in some files; either would change what is tested.
    if backend.truncation is not None or backend.padding is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return LoadedTokenizer(backend, name, hashlib.sha256(backend.to_str(pretty=False).encode()).hexdigest())


def check_text(text: str) -> str:
    """The text itself if it can be encoded as UTF-8.

    Raises
    ------
    TextError
        On a lone surrogate; the message gives its place and the next step.
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"text must be valid Unicode, got a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}. Replace it, for example with text.encode('utf-8', 'replace').decode()."
        ) from error
    return text


def decode_text(data: bytes) -> str:
    """UTF-8 bytes as text.

    Raises
    ------
    TextError
        On invalid UTF-8; the message gives the byte's place and the next step.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text must be UTF-8, got byte 0x{data[error.start]:02X} at position {error.start}. "
            "Decode it yourself with the right encoding and pass the text; `iconv -t UTF-8` converts a file."
        ) from error
