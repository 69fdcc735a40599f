"""Which tokens are not to be learned: spans of a token stream, kept beside its `.bin` as `<prefix>.mask.npy`.

The file is an int64 array [spans, 2] of half-open token ranges, ascending and apart from each other: 16 bytes for each
span, next to nothing where documents carry a header each. Megatron's readers see the `.bin` and `.idx` they know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_opus.errors import Refusal
from megatron_opus.files import atomic_file

SUFFIX = ".mask.npy"
SCORE_SUFFIX = ".score.npy"


class MaskError(Refusal, ValueError):
    """A mask file that is missing, damaged or of another token stream."""


def token_spans(starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n, 2] int64: ranges of tokens that share a character with one of `spans`.

    starts, ends: [tokens] characters of each token. What the tokenizer drops between two tokens counts to the second;
    a token without characters (a byte of a longer character) counts to the character where it stands.
    """
    if not len(starts) or not len(spans):
        return np.empty((0, 2), dtype=np.int64)
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    left = np.minimum(starts, before)
    right = np.maximum(ends, starts + 1)
    inside = np.zeros(max(int(right.max()), *(end for _, end in spans)) + 1, dtype=np.int64)
    for start, end in spans:
        inside[start:end] = 1
    counted = np.concatenate([[0], np.cumsum(inside)])  # characters of spans before each position
    return ranges(counted[right] > counted[left])


def ranges(flags: np.ndarray) -> np.ndarray:
    """[n, 2] int64: the runs of True in a [length] array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).astype(np.int64)


def without_documents(spans: np.ndarray, lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`spans` of a stream of documents, for the stream in which only the documents `kept` [documents] bool are left."""
    if kept.all() or not len(spans):
        return spans
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    new_starts = np.cumsum(np.where(kept, lengths, 0), dtype=np.int64) - np.where(kept, lengths, 0)
    document = np.searchsorted(starts, spans[:, 0], side="right") - 1
    stay = kept[document]
    return spans[stay] + (new_starts - starts)[document[stay]][:, None]


def joined(parts: Sequence[np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """The spans of streams put one after the other; tokens: length of each."""
    offsets = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    return np.concatenate([np.empty((0, 2), np.int64), *(p + o for p, o in zip(parts, offsets, strict=False))])


def write(prefix: Path, suffix: str, array: np.ndarray) -> str:
    """Keep an array beside a token stream; sha256 of its values."""
    with atomic_file(prefix.with_name(prefix.name + suffix)) as stream:
        np.save(stream, array)
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def open_spans(name: str, prefix: Path, spans: int, tokens: int) -> np.ndarray:
    """[spans, 2] int64, memory-mapped. Raises MaskError unless it holds `spans` ranges of a stream of `tokens`."""
    path = prefix.with_name(prefix.name + SUFFIX)
    again = "prepare the data again or restore the file"
    try:
        found = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise MaskError(f"{name}: {path} is missing, without it metadata would be learned; {again}") from None
    except (ValueError, OSError, EOFError) as error:
        raise MaskError(f"{name}: {path} is damaged ({error}); {again}") from error
    if found.dtype != np.int64 or found.shape != (spans, 2):
        raise MaskError(
            f"{name}: {path}: expected int64 [{spans}, 2], found {found.dtype} {list(found.shape)}; {again}"
        )
    edges = found.reshape(-1)
    if len(edges) and (edges[0] < 0 or edges[-1] > tokens or (np.diff(edges) <= 0).any()):
        raise MaskError(
            f"{name}: {path}: expected ascending ranges within the {tokens} tokens of the stream, found "
            f"{edges[0]}..{edges[-1]}; {again}"
        )
    return found


def within(spans: np.ndarray, start: int, length: int) -> np.ndarray:
    """[length] bool: which of the tokens from `start` lie in one of the spans."""
    first = np.searchsorted(spans[:, 1], start, side="right")
    last = np.searchsorted(spans[:, 0], start + length, side="left")
    flags = np.zeros(length, dtype=bool)
    for a, b in np.asarray(spans[first:last]) - start:
        flags[max(a, 0) : b] = True
    return flags
