"""Hashes of token uni- and bigrams: functions of the token ids alone, the same on every machine."""

from __future__ import annotations

from torch import Tensor

from megatron_opus.selection.hashing import layer_key, mix

_UNIGRAM = layer_key(0, "ngrams", "unigram")
_BIGRAM = layer_key(0, "ngrams", "bigram")


def ngram_hashes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return int64 hashes of the unigrams [..., L] and of the bigrams [..., L - 1] along the last axis of ids."""
    unigrams = mix(_UNIGRAM, ids)
    return unigrams, mix(unigrams[..., :-1] + _BIGRAM, ids[..., 1:])
