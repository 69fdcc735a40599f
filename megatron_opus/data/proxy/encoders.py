"""Texts to unit vectors, and the nearest benchmark item of each: what a document's similarity is measured with.

`SentenceEncoder` is any sentence-transformers model, the paper's Arctic-Embed-L v2 among them; `LexicalEncoder` needs
no model: TF-IDF over hashed words. Both give rows of length 1 (0 for a text without a known word), whose dot products
are cosines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from megatron_opus.errors import Refusal

LEXICAL = "lexical"
Matrix: TypeAlias = Any  # [n, d] float32, rows of length 1 or 0: np.ndarray or scipy.sparse.csr_matrix
_COLUMNS = 4096  # benchmark items compared at once


class EncoderError(Refusal, ValueError):
    """An encoder that cannot be used: says what was expected, what was found and what to change."""


class Encoder(Protocol):
    """window: tokens of a document that one vector can stand for; None: any number.
    device: of the vectors' comparison."""

    window: int | None
    device: str

    def identity(self) -> dict[str, Any]:
        """What the vectors depend on, to be compared when a run goes on."""
        ...

    def encode_items(self, texts: Sequence[str]) -> Matrix: ...

    def encode_documents(self, texts: Sequence[str]) -> Matrix: ...

    def too_long(self, texts: Sequence[str]) -> np.ndarray:
        """[n] bool: of which texts only the beginning is read."""
        ...


# --- lexical --------------------------------------------------------------------------------------------------------


class LexicalEncoder:
    """TF-IDF over words hashed to 2^18 columns; English function words are left out, counts enter as 1 + log(count).

    idf = 1 + ln((1 + n) / (1 + df)), n texts of which df have the word (scikit-learn's smooth form): integers that add
    up over pieces of the corpus in any order. Memory: the 2^18 counts and one batch.
    """

    device = "cpu"

    def __init__(self, columns: int = 1 << 18, window: int | None = None) -> None:
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ImportError as error:
            raise EncoderError(f"the lexical encoder needs scikit-learn ({error}): pip install -e '.[proxy]'") from None
        self.window = window
        self.columns = columns
        self.texts = 0
        self.having = np.zeros(columns, dtype=np.int64)
        self._vectorizer = HashingVectorizer(
            n_features=columns, alternate_sign=False, norm=None, stop_words="english", dtype=np.float32
        )

    def identity(self) -> dict[str, Any]:
        return {"encoder": LEXICAL, "columns": self.columns}

    def count(self, texts: Sequence[str]) -> None:
        """Let the idf know these texts."""
        found = self._vectorizer.transform(texts)
        self.having += np.bincount(found.indices, minlength=self.columns)
        self.texts += len(texts)

    def encode_items(self, texts: Sequence[str]) -> Matrix:
        return self.encode_documents(texts)

    def encode_documents(self, texts: Sequence[str]) -> Matrix:
        from sklearn.preprocessing import normalize

        found = self._vectorizer.transform(texts)
        idf = 1.0 + np.log((1.0 + self.texts) / (1.0 + self.having))
        found.data = ((1.0 + np.log(found.data)) * idf[found.indices]).astype(np.float32)
        return normalize(found, copy=False)

    def too_long(self, texts: Sequence[str]) -> np.ndarray:
        return np.zeros(len(texts), dtype=bool)


# --- sentence-transformers ------------------------------------------------------------------------------------------


class SentenceEncoder:
    """A sentence-transformers model by name or directory, frozen.

    Benchmark items are encoded as queries, documents as documents, with the prompts that the model defines for the two
    (Arctic: `query: ` and none); a model without prompts encodes both alike. precision: of the weights while encoding;
    vectors are float32.
    """

    def __init__(
        self,
        name: str,
        device: str | None = None,
        batch_size: int = 16,
        precision: str = "fp32",
        window: int | None = None,
    ) -> None:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if precision not in dtypes:
            raise EncoderError(f"precision: expected one of {', '.join(dtypes)}, got {precision!r}")
        if batch_size < 1:
            raise EncoderError(f"encoder batch size: expected a positive number, got {batch_size}")
        self.name = name
        self.precision = precision
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size
        self._model = _load(name, self.device, dtypes[precision])
        self._limit = self._model.max_seq_length
        window = window or self._limit
        if window is None:
            raise EncoderError(f"{name} states no longest input; say how many tokens of a document count (--window)")
        self.window: int | None = int(window)

    def identity(self) -> dict[str, Any]:
        """Weights, tokenizer and prompts rather than the name: a directory may hold another model tomorrow."""
        found = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        words: dict[str, Any] = json.loads(backend.to_str()) if backend else self._model.tokenizer.get_vocab()
        for state in ("padding", "truncation"):  # of the last call
            words.pop(state, None)
        found.update(json.dumps(words, sort_keys=True).encode())
        return {
            "encoder": self.name,
            "weights": found.hexdigest(),
            "prompts": dict(sorted(self._model.prompts.items())),
            "precision": self.precision,
            "longest_input": self._limit,
            "batch_size": self._batch_size,  # padding changes the last bits
        }

    def encode_items(self, texts: Sequence[str]) -> np.ndarray:
        return self._encoded(self._model.encode_query, texts)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._encoded(self._model.encode_document, texts)

    def _encoded(self, encode: Any, texts: Sequence[str]) -> np.ndarray:
        vectors = encode(list(texts), batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False)
        vectors = torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise EncoderError(
                f"{self.name}: NaN or infinite values in the vector of a text that begins "
                f"{texts[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])][:60]!r}; try --precision fp32"
            )
        return vectors

    def too_long(self, texts: Sequence[str]) -> np.ndarray:
        result = np.zeros(len(texts), dtype=bool)
        if self._limit is None:
            return result
        # A token is at least a byte: only longer texts can be cut, and need to be tokenized to know.
        long = [i for i, text in enumerate(texts) if len(text.encode("utf-8", "replace")) > self._limit - 2]
        if long:
            ids = self._model.tokenizer([texts[i] for i in long], truncation=False, verbose=False)["input_ids"]
            result[long] = [len(one) > self._limit for one in ids]
        return result


def _load(name: str, device: str, dtype: torch.dtype) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import is_sentence_transformer_model
    except ImportError as error:
        raise EncoderError(
            f"encoder {name}: sentence-transformers is not installed ({error}): pip install -e '.[proxy]', or choose "
            f"--encoder {LEXICAL}"
        ) from None
    remedy = f"give the path of a directory that a machine with a connection has saved, or choose --encoder {LEXICAL}"
    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise EncoderError(
            f"encoder {name}: expected the directory of a sentence-transformers model, found none; {remedy}"
        )
    try:
        # Without this the library would put mean pooling on top of any model, which is another encoder.
        if not is_sentence_transformer_model(name):
            what = "no modules.json in it" if local else "not in the local cache and not to be had from the Hub"
            raise EncoderError(f"encoder {name}: expected a sentence-transformers model, found {what}; {remedy}")
        model = SentenceTransformer(name, device=device, model_kwargs={"torch_dtype": dtype})
    except EncoderError:
        raise
    except Exception as error:  # the libraries below raise many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EncoderError(
            f"encoder {name}: expected a model that loads on {device}, got: {reason}; {remedy}"
        ) from error
    return model.eval()


# --- similarity -----------------------------------------------------------------------------------------------------


class Nearest:
    """Largest cosine similarity of each document over the items, and the item that has it (the first among equals).

    Compares blocks of items, so that memory is the items and batch x block. Dense vectors are compared on `device`.
    """

    def __init__(self, items: Matrix, device: str = "cpu") -> None:
        self._count = items.shape[0]
        if self._count == 0:
            raise EncoderError("nothing to compare with: there is no benchmark item")
        blocks = [items[start : start + _COLUMNS] for start in range(0, self._count, _COLUMNS)]
        self._sparse = not isinstance(items, np.ndarray)
        self._device = device
        self._blocks: list[Any] = [
            b.T.tocsr() if self._sparse else torch.from_numpy(np.ascontiguousarray(b)).to(device) for b in blocks
        ]

    def best(self, documents: Matrix) -> tuple[np.ndarray, np.ndarray]:
        """documents: [n, d]. Returns [n] float32 similarities and [n] int32 item indices."""
        rows = documents.shape[0]
        score = np.full(rows, -np.inf, dtype=np.float32)
        index = np.zeros(rows, dtype=np.int32)
        mine = documents if self._sparse else torch.from_numpy(np.asarray(documents)).to(self._device)
        for number, block in enumerate(self._blocks):
            if self._sparse:
                products = (mine @ block).toarray()
                at = products.argmax(axis=1)
                value = products[np.arange(rows), at]
            else:
                found, where = (mine @ block.T).max(dim=1)
                value, at = found.cpu().numpy(), where.cpu().numpy()
            better = value > score
            score[better] = value[better]
            index[better] = at[better] + number * _COLUMNS
        return np.clip(score, -1.0, 1.0), index
